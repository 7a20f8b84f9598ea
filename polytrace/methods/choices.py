"""What a method's arguments choose in a model: layers, tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from polytrace.errors import GraphError
from polytrace.lines import user_line
from polytrace.literals import scalar
from polytrace.prompts import PromptBook
from polytrace.tokenizer import token_texts

if TYPE_CHECKING:
    from polytrace.model import Model

Layers = int | slice | Iterable[int] | None
Token = int | str


def prompt_ids(model: Model, prompts: Any) -> list[list[int]]:
    """Each prompt's token ids, of whatever `model.trace` takes. Raises as that does."""
    made = PromptBook(model.description, lambda: model.tokenizer).invoke(prompts)
    return [list(sequence) for sequence in made.sequences]


def chosen_layers(model: Model, layers: Layers) -> list[int]:
    """Numbers of layers, in the order given: an int, several, a slice, None for all; negative ones from the end.

    Raises GraphError for a layer that is not there, and for none at all.
    """
    number = model.description.num_layers
    if layers is None or isinstance(layers, slice):
        found = list(range(number)[layers or slice(None)])
    else:
        found = []
        for one in [layers] if isinstance(layers, int) or scalar(layers) is not None else list(layers):
            layer = scalar(one)
            if not isinstance(layer, int) or isinstance(layer, bool) or not -number <= layer < number:
                told = f"there is no layer {one!r}; this model has layers 0-{number - 1}"
                raise GraphError(told, where=user_line())
            found.append(layer % number)
    if not found:
        raise GraphError(f"no layer is chosen; this model has layers 0-{number - 1}", where=user_line())
    return found


def token_id(model: Model, token: Token) -> int:
    """The id of a token. Raises GraphError for a text that is several, with the pieces, or an id that is not there."""
    if isinstance(token, str):
        if model.tokenizer is None:
            raise GraphError("this model came without a tokenizer: give token ids, not texts", where=user_line())
        ids = list(model.tokenizer.encode(token, add_special_tokens=False).ids)
        if len(ids) != 1:
            pieces = " + ".join(repr(text) for text in token_texts(model.tokenizer, ids)) or "nothing"
            told = f"{token!r} is not one token but {pieces}: name one of them, or begin with a space where words do"
            raise GraphError(told, where=user_line())
        return int(ids[0])
    number = scalar(token)
    if not isinstance(number, int) or not 0 <= number < model.description.vocab_size:
        told = f"{token!r} is no token; ids are 0-{model.description.vocab_size - 1}"
        raise GraphError(told, where=user_line())
    return number


def token_of_each(model: Model, tokens: Token | Sequence[Token], num_prompts: int, what: str) -> list[int]:
    """One token for each prompt: one for all, or a list as long as the prompts."""
    if isinstance(tokens, str) or scalar(tokens) is not None:
        return [token_id(model, tokens)] * num_prompts  # type: ignore[arg-type]
    ids = [token_id(model, one) for one in tokens]  # type: ignore[union-attr]
    if len(ids) != num_prompts:
        raise GraphError(f"there are {len(ids)} {what} for {num_prompts} prompts: give one of each", where=user_line())
    return ids


def texts_of(model: Model, ids: Sequence[int]) -> list[str]:
    """Tokens as texts."""
    return list(token_texts(model.tokenizer, ids))


def needs_torch(method: str) -> Any:
    """The module torch. Raises GraphError where it cannot be imported: what methods work with here are its tensors."""
    if find_spec("torch") is None:
        raise GraphError(f"{method} needs torch on this machine: pip install torch", where=user_line())
    import torch

    return torch
