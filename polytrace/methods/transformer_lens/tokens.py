"""Texts and tokens as TransformerLens turns one into the other, with the model's own tokenizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from polytrace.errors import GraphError
from polytrace.lines import user_line
from polytrace.tokenizer import token_texts

if TYPE_CHECKING:
    from torch import Tensor

    from polytrace.model import Model


class Tokens:
    """The part of `HookedModel` that is about tokens."""

    model: Model
    default_prepend_bos: bool

    @property
    def tokenizer(self) -> Any:
        """The model's own `tokenizers.Tokenizer`. Raises GraphError where it came without."""
        if self.model.tokenizer is None:
            raise GraphError("this model came without a tokenizer: give token ids instead of texts", where=user_line())
        return self.model.tokenizer

    def to_tokens(self, input: str | list[str], prepend_bos: bool | None = None) -> Tensor:
        """`[texts, longest]` token ids, a BOS token in front unless `prepend_bos=False`.

        Shorter texts are padded on the right, as in TransformerLens: these pads are tokens like others to a run. Give
        the texts themselves to a run to have none.
        """
        import torch

        rows = [self._ids(text, prepend_bos) for text in ([input] if isinstance(input, str) else input)]
        longest = max(map(len, rows))
        if any(len(row) < longest for row in rows):
            pad = next((self._special(name) for name in ("pad", "eos") if self._special(name) is not None), None)
            if pad is None:
                raise GraphError("this model has no pad token for texts of different lengths", where=user_line())
            rows = [[*row, *[pad] * (longest - len(row))] for row in rows]
        return torch.tensor(rows)

    def to_string(self, tokens: Any) -> str | list[str]:
        """Token ids as a text, several rows of them as texts."""
        listed = tokens.tolist() if hasattr(tokens, "tolist") else tokens
        if isinstance(listed, int):
            listed = [listed]
        if listed and isinstance(listed[0], list):
            return [str(self.tokenizer.decode(row, skip_special_tokens=False)) for row in listed]
        return str(self.tokenizer.decode(list(listed), skip_special_tokens=False))

    def to_str_tokens(self, input: Any, prepend_bos: bool | None = None) -> Any:
        """The text of each token of a text, or of token ids; a list of these for a list of texts."""
        if isinstance(input, str):
            return list(token_texts(self.tokenizer, self._ids(input, prepend_bos)))
        listed = input.tolist() if hasattr(input, "tolist") else list(input)
        if listed and isinstance(listed[0], (str, list)):
            if len(listed) == 1 and isinstance(listed[0], list):
                listed = listed[0]
            else:
                return [self.to_str_tokens(one, prepend_bos) for one in listed]
        return list(token_texts(self.tokenizer, listed))

    def to_single_token(self, string: str) -> int:
        """The id of a text that is one token. Raises GraphError with its pieces where it is more."""
        ids = self._ids(string, False)
        if len(ids) != 1:
            pieces = ", ".join(map(repr, token_texts(self.tokenizer, ids)))
            raise GraphError(f"{string!r} is {len(ids)} tokens, not one: {pieces}", where=user_line())
        return ids[0]

    def to_single_str_token(self, int_token: int) -> str:
        """The text of one token."""
        return token_texts(self.tokenizer, [int_token])[0]

    def get_token_position(
        self,
        single_token: str | int,
        input: Any,
        mode: str = "first",
        prepend_bos: bool | None = None,
    ) -> int:
        """Where a token stands in a text or in token ids. Raises GraphError where it does not."""
        token = self.to_single_token(single_token) if isinstance(single_token, str) else int(single_token)
        given: Any = self._ids(input, prepend_bos) if isinstance(input, str) else input
        listed = list(given.tolist() if hasattr(given, "tolist") else given)
        if listed and isinstance(listed[0], list):
            (listed,) = listed
        places = [place for place, other in enumerate(listed) if other == token]
        if not places or mode not in ("first", "last"):
            told = f"{single_token!r} is not in it" if not places else f"mode is 'first' or 'last', not {mode!r}"
            raise GraphError(told, where=user_line())
        return places[0] if mode == "first" else places[-1]

    def _prompts(self, prompts: Any, prepend_bos: bool | None) -> Any:
        """Texts as token ids, BOS in front where it is wanted; everything else as it is."""
        if isinstance(prompts, str):
            return [self._ids(prompts, prepend_bos)]
        if isinstance(prompts, (list, tuple)) and prompts and all(isinstance(one, str) for one in prompts):
            return [self._ids(one, prepend_bos) for one in prompts]
        return prompts

    def _ids(self, text: str, prepend_bos: bool | None) -> list[int]:
        """Without special tokens of the tokenizer's own, with BOS or without."""
        ids = list(self.tokenizer.encode(text, add_special_tokens=False).ids)
        wanted = self.default_prepend_bos if prepend_bos is None else prepend_bos
        bos = self._special("bos")
        return [bos, *ids] if wanted and bos is not None else ids

    def _special(self, name: str) -> int | None:
        token = self.model.config.get(f"{name}_token_id")
        return int(token) if isinstance(token, int) else None
