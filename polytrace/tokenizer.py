"""The service's tokenizer on the client, so that token counts are known when a prompt is written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from polytrace.images import is_image_row


def load_tokenizer(data: bytes) -> Any:
    """A `tokenizers.Tokenizer` of the model's own file, which neither pads nor cuts."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_buffer(data)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def token_texts(tokenizer: Any, ids: Sequence[int]) -> tuple[str, ...]:
    """Each token as text, special ones included; the id itself where there is no tokenizer."""
    if tokenizer is None:
        return tuple("<image>" if is_image_row(token) else str(token) for token in ids)
    return tuple(
        "<image>" if is_image_row(token) else tokenizer.decode([token], skip_special_tokens=False) for token in ids
    )


def decoder_of(data: bytes | None) -> Callable[[Sequence[int]], str] | None:
    """What gives the text of tokens, special ones included; None without a tokenizer's file."""
    if data is None:
        return None
    tokenizer = load_tokenizer(data)
    return lambda tokens: str(tokenizer.decode(list(tokens), skip_special_tokens=False))
