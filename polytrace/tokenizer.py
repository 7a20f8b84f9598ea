"""The service's tokenizer on the client, so that token counts are known when a prompt is written.

`ModelTokenizer` is what users have: the `tokenizers` package's, with the calls that they know of transformers'.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from polytrace.errors import GraphError
from polytrace.images import is_image_row
from polytrace.lines import user_line
from polytrace.literals import scalar
from polytrace.saved import SavedMapping


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


class ModelTokenizer:
    """The model's own `tokenizers.Tokenizer`, all of whose names are here, and which can be called.

    Special tokens are put around a text as the model's file says (`<s>` in front, in Llama): the first id is then not
    the text's. `add_special_tokens=False` leaves them out; `polytrace.methods.target_tokens` has words' first tokens.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.__dict__["_tokenizer"] = tokenizer

    def __call__(
        self, text: str | Sequence[str], *, add_special_tokens: bool = True, return_tensors: str | None = None
    ) -> SavedMapping:
        """`input_ids` and `attention_mask`, by key and attribute, as transformers' gives them: lists of ints, lists of
        these of several texts. `return_tensors`: "pt" (needs torch) or "np" makes them `[texts, tokens]`.

        Nothing is padded or cut. Raises GraphError for texts of different lengths as one tensor.
        """
        is_one = isinstance(text, str)
        try:
            texts = [text] if is_one else list(text)
        except TypeError:  # a number, None
            texts = [text]
        if not all(isinstance(one, str) for one in texts):
            raise GraphError(
                "model.tokenizer takes a text, or several: write .decode(ids) for tokens", where=user_line()
            )
        encodings = self._tokenizer.encode_batch(texts, add_special_tokens=add_special_tokens)
        ids, masks = [one.ids for one in encodings], [one.attention_mask for one in encodings]
        if return_tensors is not None:
            make = _maker(return_tensors, {len(row) for row in ids})
            return SavedMapping(input_ids=make(ids), attention_mask=make(masks))
        return SavedMapping(input_ids=ids[0] if is_one else ids, attention_mask=masks[0] if is_one else masks)

    def encode(self, *given: Any, **named: Any) -> Encoded:
        """As of `tokenizers`, whose `Encoding` (`.ids`, `.tokens`, `.offsets`) is a list of its ids too."""
        return Encoded(self._tokenizer.encode(*given, **named))

    def decode(self, ids: Any, skip_special_tokens: bool = True) -> Any:
        """The text of tokens: an int, a sequence of ints, a tensor or array. Of several rows a list of texts.

        Special tokens are left out unless `skip_special_tokens=False`, as in `tokenizers`; transformers keeps them.
        """
        plain = _plain(ids)
        if isinstance(plain, int):
            plain = [plain]
        if any(isinstance(row, list) for row in plain):
            return [self.decode(row, skip_special_tokens) for row in plain]
        return str(self._tokenizer.decode(plain, skip_special_tokens=skip_special_tokens))

    def batch_decode(self, rows: Any, skip_special_tokens: bool = True) -> list[str]:
        """The text of each row."""
        return [self.decode(row, skip_special_tokens) for row in rows]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or not hasattr(self._tokenizer, name):
            raise AttributeError(
                f"model.tokenizer has no {name!r}: it is the `tokenizers` package's, with transformers' call, "
                "decode and batch_decode"
            )
        return getattr(self._tokenizer, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._tokenizer, name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *dir(self._tokenizer)})

    def __len__(self) -> int:
        return int(self._tokenizer.get_vocab_size())

    def __repr__(self) -> str:
        return f"<tokenizer of {len(self)} tokens>"


class Encoded(list[int]):
    """The ids of a text, with what a `tokenizers.Encoding` has besides."""

    def __init__(self, encoding: Any) -> None:
        super().__init__(encoding.ids)
        self.encoding = encoding

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "encoding":
            raise AttributeError(name)
        return getattr(self.encoding, name)


def _maker(kind: str, lengths: set[int]) -> Callable[[list[list[int]]], Any]:
    """What makes a tensor of rows of equal length."""
    if len(lengths) > 1:
        raise GraphError(
            f"these texts have {min(lengths)} to {max(lengths)} tokens, which are no one tensor: leave out "
            "return_tensors; model.trace takes texts and lists of ids of different lengths",
            where=user_line(),
        )
    if kind == "np":
        import numpy as np

        return lambda rows: np.asarray(rows, np.int64)
    if kind != "pt":
        raise GraphError(f"return_tensors is 'pt' or 'np', not {kind!r}", where=user_line())
    try:
        import torch
    except ImportError:
        raise GraphError("return_tensors='pt' needs torch, which is not here: write 'np'", where=user_line()) from None
    return lambda rows: torch.tensor(rows, dtype=torch.int64)


def _plain(ids: Any) -> Any:
    """An int or (nested) lists of these."""
    if hasattr(ids, "tolist"):
        ids = ids.tolist()  # of a recorded value it raises what to do
    if isinstance(ids, (list, tuple, range)):
        return list(ids) if set(map(type, ids)) == {int} else [_plain(one) for one in ids]
    number = scalar(ids)
    if not isinstance(number, int) or isinstance(number, bool):
        raise GraphError(f"a token id is an integer, not {ids!r}", where=user_line())
    return number
