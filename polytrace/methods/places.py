"""Layers, prompts, positions and tokens as every method takes them, checked before anything is recorded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from polytrace.errors import GraphError
from polytrace.lines import user_line
from polytrace.literals import scalar
from polytrace.points import DIMS, owners
from polytrace.prompts import PromptBook
from polytrace.tokenizer import token_texts

if TYPE_CHECKING:
    from polytrace.description import Leaf
    from polytrace.model import Model
    from polytrace.modules import Module

STREAM = ("sequence", "token", "feature")
Of = (
    str | Callable[[Any], Any]
)  # a named point of a layer, or what to read of a layer: `lambda layer: layer.mlp.output`


@dataclass(frozen=True, slots=True)
class Prompts:
    """Prompts as token ids."""

    sequences: tuple[tuple[int, ...], ...]
    texts: tuple[tuple[str, ...], ...]  # of each prompt's tokens

    def __len__(self) -> int:
        return len(self.sequences)

    @property
    def longest(self) -> int:
        return max(map(len, self.sequences))

    @property
    def labels(self) -> list[str]:
        """Each prompt as one text."""
        return ["".join(own) for own in self.texts]


def prompts_of(model: Model, prompts: Any) -> Prompts:
    """Prompts of every kind that `model.trace` takes. Raises as that does."""
    sequences = PromptBook(model.description, lambda: model.tokenizer).invoke(prompts).sequences
    return Prompts(sequences, tuple(token_texts(model.tokenizer, sequence) for sequence in sequences))


def layers_of(model: Model, layers: Any = None) -> list[int]:
    """Numbers of decoder layers from 0: an int, several, a slice; None is all, negative ones count from the end."""
    count = len(model.layers)
    if layers is None:
        return list(range(count))
    if isinstance(layers, slice):
        return list(range(count))[layers]
    found = []
    for one in [layers] if scalar(layers) is not None else list(layers):
        number = scalar(one)
        if not isinstance(number, int) or isinstance(number, bool) or not -count <= number < count:
            raise GraphError(f"there is no layer {one!r}; this model has layers 0-{count - 1}", where=user_line())
        found.append(number % count)
    if not found:
        raise GraphError("there are no layers to look at", where=user_line())
    return found


def positions_of(prompts: Prompts, positions: Any) -> tuple[list[int], bool]:
    """Positions as they label a result, and whether they are all of the prompts'.

    All positions of prompts that differ in length are counted from the end. Raises GraphError for a shorter prompt.
    """
    lengths = [len(sequence) for sequence in prompts.sequences]
    if positions is None:
        longest = max(lengths)
        return (list(range(longest)) if min(lengths) == longest else list(range(-longest, 0))), True
    found = []
    for one in [positions] if scalar(positions) is not None else list(positions):
        number = scalar(one)
        if not isinstance(number, int) or isinstance(number, bool):
            raise GraphError(f"a position is an integer, not {one!r}", where=user_line())
        for prompt, length in enumerate(lengths):
            if not -length <= number < length:
                raise GraphError(
                    f"there is no position {number} in prompt {prompt}, which has {length} tokens (0-{length - 1})",
                    where=user_line(),
                )
        found.append(number)
    if not found:
        raise GraphError("there are no positions to look at", where=user_line())
    return found, False


def token_ids(model: Model, tokens: Any) -> list[int]:
    """Ids of tokens that are ids already, or texts of one token each. Raises GraphError that names a text's pieces."""
    vocabulary = model.description.vocab_size
    found = []
    for one in [tokens] if isinstance(tokens, str) or scalar(tokens) is not None else list(tokens):
        number = scalar(one)
        if isinstance(one, str):
            found.append(_one_token(model, one))
        elif isinstance(number, int) and not isinstance(number, bool) and 0 <= number < vocabulary:
            found.append(number)
        else:
            raise GraphError(f"there is no token {one!r}; ids are 0-{vocabulary - 1}", where=user_line())
    if not found:
        raise GraphError("there are no tokens to look for", where=user_line())
    return found


def point_of(layer: Module, of: Of) -> Any:
    """What a method reads of a layer, `[sequences, tokens, features]`. Raises GraphError for another kind of point."""
    if not isinstance(of, str):
        return of(layer)
    if DIMS.get(of) != STREAM:
        known = ", ".join(name for name, dims in DIMS.items() if dims == STREAM)
        raise GraphError(f"{of!r} is no part of the residual; it is one of {known}, or a function", where=user_line())
    return getattr(layer, of)


def residual_leaf(model: Model) -> Leaf:
    """What is known of the residual without a trace: its features are `tail[-1]`."""
    leaves = model._index.ports[model.layers[0]._path, "output"].leaves
    return next(leaf for _, leaf in leaves.values())


def attention_of(model: Model, number: int) -> Module:
    """The attention module of a layer. Raises GraphError where the family has none that is known."""
    layer = model.layers[number]
    path = owners(layer._table, layer._path).get("pattern")
    if path is None:
        raise GraphError(f"layer {number} has no attention that is known", where=user_line())
    return model.get_submodule(path)


def _one_token(model: Model, text: str) -> int:
    if model.tokenizer is None:
        raise GraphError("this model came without a tokenizer: give token ids instead of text", where=user_line())
    ids = model.tokenizer.encode(text, add_special_tokens=False).ids
    if len(ids) != 1:
        pieces = ", ".join(map(repr, token_texts(model.tokenizer, ids)))
        raise GraphError(
            f"{text!r} is {len(ids)} tokens ({pieces}), not one: give one of them, or its id; "
            "polytrace.methods.target_tokens finds the first token of each way to write a word",
            where=user_line(),
        )
    return int(ids[0])
