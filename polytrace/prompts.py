"""Prompts as users give them, brought to token ids."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol

from polytrace.chat import conversations_in, render
from polytrace.description import ModelDescription
from polytrace.errors import ContextError, GraphError
from polytrace.graph import Invoke
from polytrace.image_prompts import images_among
from polytrace.images import PIXELS
from polytrace.lines import user_line
from polytrace.literals import scalar
from polytrace.storage import is_recorded


class Encoder(Protocol):
    """A tokenizer, as far as prompts need it."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> Any:
        """Has `.ids`, special tokens included where they are asked for."""


class PromptBook:
    """The prompts of one trace. Prompts that stand in many invokes are worked out once, and are one object."""

    def __init__(self, description: ModelDescription, tokenizer: Callable[[], Encoder | None]) -> None:
        self._description = description
        self._tokenizer = tokenizer  # asked for when the first text comes
        self._known: dict[Hashable, Invoke] = {}

    def invoke(
        self, prompts: Any, chat: Mapping[str, Any] = MappingProxyType({}), *, has_images: bool = False
    ) -> Invoke:
        """Prompts as token ids: a string, strings, ids, lists of ids, or 1-D and 2-D integer tensors and arrays.

        Conversations too: a list of messages, or a list of such lists; `chat` is what `polytrace.chat` takes.

        `has_images`: whoever asks takes the images of a processor's batch. Raises GraphError for anything else,
        ContextError for a prompt beyond the model's context.
        """
        if is_recorded(prompts):
            raise GraphError(
                "prompts are known before anything runs, and this is a value of a trace: save it, and give it to a "
                "trace of its own after the block",
                where=user_line(),
            )
        if not has_images and images_among(prompts).get(PIXELS) is not None:
            raise GraphError(f"prompts have no {PIXELS} here: give images to a trace of their own", where=user_line())
        key = _key(prompts)
        found = self._known.get(key) if key is not None else None
        if found is None:
            if (conversations := conversations_in(prompts)) is not None:
                prompts = [self._encoded_chat(one, chat) for one in conversations]
            made = _make_invoke(prompts, self._description, self._tokenizer)
            found = self._known.setdefault(made.sequences, made)
            if key is not None:
                self._known[key] = found
        return found

    def _encoded_chat(self, messages: Sequence[Any], chat: Mapping[str, Any]) -> list[int]:
        """The template writes its special tokens itself."""
        text = render(self._description.chat, messages, chat)
        encoder = self._tokenizer()
        if encoder is None:
            raise GraphError(
                "this model came without a tokenizer: give token ids instead of messages", where=user_line()
            )
        return list(encoder.encode(text, add_special_tokens=False).ids)


def _key(prompts: Any) -> Hashable:
    """What tells prompts of the commonest kinds apart; None for the others."""
    if isinstance(prompts, str):
        return prompts
    # what is equal to an int is not always an id: 1.0, True
    if isinstance(prompts, (list, tuple)) and set(map(type, prompts)) in ({int}, {str}):
        return tuple(prompts)
    return None


def _make_invoke(prompts: Any, description: ModelDescription, tokenizer: Callable[[], Encoder | None]) -> Invoke:
    where = user_line()
    sequences = tuple(_sequences(prompts, tokenizer, where))
    if not sequences:
        raise GraphError("there are no prompts", where=where)
    limit = description.limits.max_sequence_tokens
    for number, sequence in enumerate(sequences):
        if not sequence:
            raise GraphError(f"prompt {number} has no tokens", where=where)
        if len(sequence) > limit:
            raise ContextError(f"prompt {number} has {len(sequence)} tokens; this model takes {limit}", where=where)
        if not (min(sequence) >= 0 and max(sequence) < description.vocab_size):
            wrong = next(token for token in sequence if not 0 <= token < description.vocab_size)
            raise GraphError(f"prompt {number} has token {wrong}; ids are 0-{description.vocab_size - 1}", where=where)
    return Invoke(sequences=sequences)


def _sequences(prompts: Any, tokenizer: Callable[[], Encoder | None], where: str) -> Iterable[tuple[int, ...]]:
    if isinstance(prompts, str):
        return [_encoded(prompts, tokenizer, where)]
    if isinstance(prompts, Mapping):
        return _batch(prompts, tokenizer, where)
    plain = _plain(prompts, where)
    if all(isinstance(one, str) for one in plain):
        return [_encoded(one, tokenizer, where) for one in plain]
    if any(isinstance(one, str) for one in plain):
        raise GraphError("prompts are all strings or all token ids, not some of each", where=where)
    if any(scalar(one) is not None for one in plain):
        return [_ids(plain, where)]
    return [_ids(_plain(one, where), where) for one in plain]


def _batch(batch: Mapping[str, Any], tokenizer: Callable[[], Encoder | None], where: str) -> list[tuple[int, ...]]:
    """What a Hugging Face tokenizer returns: padding is taken out by its own mask."""
    if "input_ids" not in batch:
        raise GraphError(f"a batch needs input_ids; this one has {', '.join(map(str, batch))}", where=where)
    rows = list(_sequences(batch["input_ids"], tokenizer, where))
    if batch.get("attention_mask") is None:
        return rows
    masks = [_ids(_plain(row, where), where) for row in _rows(_plain(batch["attention_mask"], where))]
    if [len(mask) for mask in masks] != [len(row) for row in rows]:
        raise GraphError("attention_mask and input_ids have different shapes", where=where)
    return [
        tuple(token for token, is_kept in zip(row, mask, strict=True) if is_kept)
        for row, mask in zip(rows, masks, strict=True)
    ]


def _rows(plain: list[Any]) -> list[Any]:
    return [plain] if plain and scalar(plain[0]) is not None else plain


def _plain(value: Any, where: str) -> list[Any]:
    if hasattr(value, "ids") and not isinstance(value, (list, tuple)):  # a tokenizers.Encoding
        value = value.ids
    if hasattr(value, "tolist") and hasattr(value, "dtype"):
        if not any(kind in str(value.dtype) for kind in ("int", "bool")):
            raise GraphError(f"token ids are integers, not {value.dtype}", where=where)
        if len(value.shape) not in (1, 2):
            raise GraphError(f"token ids are 1-D or 2-D, not of shape {list(value.shape)}", where=where)
        value = value.tolist()
    if not isinstance(value, (list, tuple, range)):
        raise GraphError(
            f"prompts are a string, strings, token ids or lists of token ids, not a {type(value).__name__}", where=where
        )
    return list(value)


def _ids(plain: list[Any], where: str) -> tuple[int, ...]:
    if set(map(type, plain)) == {int}:
        return tuple(plain)
    numbers = [scalar(one) for one in plain]
    for one, number in zip(plain, numbers, strict=True):
        if not isinstance(number, int):
            raise GraphError(f"a token id is an integer, not a {type(one).__name__}", where=where)
    return tuple(int(number) for number in numbers if number is not None)


def _encoded(text: str, tokenizer: Callable[[], Encoder | None], where: str) -> tuple[int, ...]:
    encoder = tokenizer()
    if encoder is None:
        raise GraphError("this model came without a tokenizer: give token ids instead of text", where=where)
    return tuple(encoder.encode(text).ids)
