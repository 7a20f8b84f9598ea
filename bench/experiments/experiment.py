"""What an experiment is, and the prompts and small questions that several of them share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from bench.plain import Plain
from polytrace.certificate import Receipt

Values = Mapping[str, Tensor]

FACTS = (
    ("The Eiffel Tower is in the city of", " Paris"),
    ("The Colosseum is in the city of", " Rome"),
    ("The Reichstag is in the city of", " Berlin"),
    ("The Kremlin is in the city of", " Moscow"),
    ("The Acropolis is in the city of", " Athens"),
    ("The British Museum is in the city of", " London"),
    ("The Space Needle is in the city of", " Seattle"),
    ("The Prado Museum is in the city of", " Madrid"),
)
INDIRECT_OBJECTS = (
    ("When Mary and John went to the store, John gave a drink to", " Mary", " John"),
    ("When Tom and Anna went to the park, Anna gave a ball to", " Tom", " Anna"),
    ("When Paul and Lucy went to the school, Paul gave a book to", " Lucy", " Paul"),
)
COUNTRIES = {
    "Europe": ("France", "Germany", "Italy", "Spain", "Poland", "Greece", "Sweden", "Norway"),
    "Asia": ("Japan", "China", "Vietnam", "Thailand", "Nepal", "Iran", "Iraq", "Syria"),
    "Africa": ("Egypt", "Kenya", "Ghana", "Nigeria", "Morocco", "Angola", "Libya", "Senegal"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What an experiment brought back from polytrace."""

    values: Values
    receipts: tuple[Receipt, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Experiment:
    """One kind of experiment."""

    name: str
    ask: Callable[[Any, int], Answer]  # (a polytrace model, turn)
    check: Callable[[Plain, int], Values]  # the same values by hand
    tell: Callable[[Values, Any, int], str]  # what was found, in one sentence; the model is for its tokenizer


def layer_names(plain: Plain) -> list[str]:
    """Module paths of the decoder layers."""
    return [f"model.layers.{index}" for index in range(plain.model.config.num_hidden_layers)]


def heads(config: Mapping[str, Any]) -> tuple[int, int]:
    """Query heads and the channels of one."""
    num_heads = config["num_attention_heads"]
    return num_heads, config.get("head_dim") or config["hidden_size"] // num_heads


def first_token(model: Any, word: str) -> int:
    """The first token of a word inside a sentence, without special tokens."""
    return int(model.tokenizer.encode(word, add_special_tokens=False).ids[0])


def pieces(model: Any, text: str) -> list[str]:
    """The tokens of a prompt as text, special ones included."""
    ids = model.tokenizer.encode(text).ids
    return [model.tokenizer.decode([token], skip_special_tokens=False) for token in ids]
