"""When a sequence that goes on token by token ends. Knows no model; of the tokenizer only how to decode.

A stop text may begin inside one token and end inside another, and a character may be several tokens. So new text is
decoded a few tokens at a time, behind tokens that are known already (some tokenizers write a token otherwise where a
text begins), and is settled where no character is left half done. What a token costs depends on neither the length of
the sequence nor how much of it there is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from polytrace.graph import Generation

Decode = Callable[[Sequence[int]], str]

LENGTH, EOS, STOP = "length", "eos", "stop"  # `polytrace.certificate.Generated.finish`
_CONTEXT = 8  # tokens of the prompt that the first new one is decoded behind
_HALF_DONE = "\ufffd"  # what decoders write for bytes that are no whole character
# Tokens that wait for a character's end; one takes four bytes at most, and what waits longer is no text.
_MOST_WAITING = 16


class Stopping:
    """Whether one sequence has ended, asked behind each of its new tokens."""

    def __init__(self, generation: Generation, decode: Decode | None = None, prompt: Sequence[int] = ()) -> None:
        """`decode` is needed for stop texts alone. They are looked for in the new text: none begins in the prompt."""
        self._left = generation.max_new_tokens
        self._eos = frozenset(generation.eos)
        self._texts = None
        if generation.stop:
            if decode is None:
                raise ValueError("texts that end a sequence need the model's tokenizer, and this model has none")
            self._texts = _StopTexts(generation.stop, decode, prompt)

    def advance(self, token: int) -> str | None:
        """Why the sequence ends with this token, or None. What ends it first of: its end token, a text, its length."""
        self._left -= 1
        if token in self._eos:
            return EOS
        if self._texts is not None and self._texts.are_in_text_with(token):
            return STOP
        return LENGTH if self._left <= 0 else None


class _StopTexts:
    """Texts that are looked for in a text that grows by tokens."""

    def __init__(self, texts: Sequence[str], decode: Decode, prompt: Sequence[int]) -> None:
        self._texts = texts
        self._decode = decode
        self._overlap = max(map(len, texts)) - 1  # of a text that is about to be found this much may be there already
        self._settled = ""  # the end of what is
        self._set_context(list(prompt[-_CONTEXT:]))

    def are_in_text_with(self, token: int) -> bool:
        """Whether the text, with one more token, has one of them; False for all tokens before."""
        self._waiting.append(token)
        decoded = self._decode([*self._context, *self._waiting])
        text = self._settled + decoded[self._context_length :]
        if any(one in text for one in self._texts):
            return True
        if len(decoded) == self._context_length:  # it writes nothing, and nothing can be decoded behind it
            self._waiting.clear()
        elif not decoded.endswith(_HALF_DONE) or len(self._waiting) == _MOST_WAITING:
            self._settled = text[len(text) - self._overlap :] if len(text) > self._overlap else text
            self._set_context(self._waiting)
        return False

    def _set_context(self, ids: list[int]) -> None:
        self._context = ids
        self._context_length = len(self._decode(ids))
        self._waiting: list[int] = []
