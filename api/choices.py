"""The tokens of a request as OpenAI's answers: choices with texts, finish reasons, log-probabilities, and the usage.

A `Choice` takes the tokens of one sequence as they come and says what a stream sends of each; its sums are what an
answer has that is sent at once. So a stream and an answer say the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from api.texts import StopCutter, TextStream, special_tokens
from api.wishes import ChatWish, CompletionWish
from polytrace.certificate import Token

_LEAST = -9999.0  # how OpenAI writes the log-probability of what cannot be
_FINISH = {"length": "length", "eos": "stop", "stop": "stop"}


@dataclass(slots=True)
class Piece:
    """What a token, or the end, adds to a choice."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)  # that the text is of: none while their text is held back
    finish: str | None = None


class Choice:
    """One sequence on its way."""

    def __init__(
        self,
        index: int,
        tokenizer: Any,
        special: frozenset[int],
        prompt: Sequence[int],
        stops: Sequence[str],
        *,
        is_chat: bool,
    ) -> None:
        self.index = index
        self.num_tokens = 0
        self.finish: str | None = None
        self._is_chat = is_chat
        self._tokenizer = tokenizer
        self._text = TextStream(tokenizer, prompt, special) if tokenizer is not None else None
        self._stops = StopCutter(stops)
        self._held: list[Token] = []
        self._offset = 0  # characters that were given

    def take(self, token: Token) -> Piece:
        """The next token of the sequence."""
        self.num_tokens += 1
        self._held.append(token)
        text = ""
        if self._text is not None and token.finish != "eos":
            text = self._stops.add(self._text.add(token.id))
        if token.finish is not None:
            return self.end(token.finish, text)
        if not text:
            return Piece()
        held, self._held = self._held, []
        return Piece(text=text, tokens=held)

    def end(self, finish: str | None, text: str = "") -> Piece:
        """The sequence has ended, with what is left of its text."""
        if self._text is not None:
            text += self._stops.add(self._text.rest()) + self._stops.rest()
        self.finish = _FINISH.get(finish or "", "stop")
        held, self._held = self._held, []
        return Piece(text=text, tokens=held, finish=self.finish)

    def logprobs(self, piece: Piece) -> dict[str, Any] | None:
        """Of a piece's tokens, when they were asked for; call it once for each piece, in their order."""
        told = [token for token in piece.tokens if token.logprob is not None]
        start, self._offset = self._offset, self._offset + len(piece.text)
        if not told:
            return None
        if self._is_chat:
            return {"content": [self._chat_logprob(token) for token in told], "refusal": None}
        texts = [self._name(token.id) for token in told]
        offsets = []
        for text in texts:
            offsets.append(start)
            start += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [_number(token.logprob) for token in told],
            "top_logprobs": [self._likeliest(token) for token in told],
            "text_offset": offsets,
        }

    def _likeliest(self, token: Token) -> dict[str, float]:
        found = {self._name(other): _number(logprob) for other, logprob in token.likeliest}
        return {self._name(token.id): _number(token.logprob)} | found  # OpenAI's has the token's own too

    def _chat_logprob(self, token: Token) -> dict[str, Any]:
        others = [self._entry(other, logprob) for other, logprob in token.likeliest]
        return self._entry(token.id, token.logprob) | {"top_logprobs": others}

    def _entry(self, token: int, logprob: float | None) -> dict[str, Any]:
        name = self._name(token)
        is_text = "�" not in name  # else it is a part of a character, whose bytes are nobody's text
        return {"token": name, "logprob": _number(logprob), "bytes": list(name.encode()) if is_text else None}

    def _name(self, token: int) -> str:
        if self._tokenizer is None:
            return f"token_id:{token}"
        return str(self._tokenizer.decode([token], skip_special_tokens=False))


class Answer:
    """All choices of one call."""

    def __init__(
        self,
        wish: CompletionWish | ChatWish,
        *,
        request: str,
        created: int,
        prompts: Mapping[int, Sequence[int]],  # by invoke
        tokenizer: Any,
    ) -> None:
        self._wish = wish
        self._is_chat = isinstance(wish, ChatWish)
        self._request = request
        self._created = created
        self._tokenizer = tokenizer
        self._prompts = list(prompts.values())
        self._first = {invoke: place * wish.samples for place, invoke in enumerate(prompts)}  # choice of an invoke
        samples = wish.samples
        special = frozenset[int]() if tokenizer is None else special_tokens(tokenizer)
        self._choices = [
            Choice(place * samples + sample, tokenizer, special, prompt, wish.stops, is_chat=self._is_chat)
            for place, prompt in enumerate(self._prompts)
            for sample in range(samples)
        ]

    # --- a stream

    def beginning(self) -> list[dict[str, Any]]:
        """What comes before the first token: a chat's roles, or the prompts when they are echoed."""
        if self._is_chat:
            return [self._chunk(one, delta={"role": "assistant", "content": ""}) for one in self._choices]
        return [self._chunk(one, text=echo) for one in self._choices if (echo := self._echo(one))]

    def news(self, tokens: Iterable[Token]) -> list[dict[str, Any]]:
        """What tokens add to the stream."""
        chunks = []
        for token in tokens:
            one = self._choices[self._first[token.invoke] + token.sequence]
            chunks += self._told(one, one.take(token))
        return chunks

    def ending(self) -> list[dict[str, Any]]:
        """What is left when all tokens came."""
        chunks = []
        for one in self._choices:
            if one.finish is None:  # a graph ended it
                chunks += self._told(one, one.end(None))
        if self._wish.has_usage:
            chunks.append(self._head(is_chunk=True) | {"choices": [], "usage": self.usage()})
        return chunks

    def _told(self, one: Choice, piece: Piece) -> list[dict[str, Any]]:
        logprobs = one.logprobs(piece)
        chunks = []
        if piece.text or logprobs is not None:
            chunks.append(self._chunk(one, logprobs=logprobs, **self._said(piece.text)))
        if piece.finish is not None:
            chunks.append(self._chunk(one, finish=piece.finish, **self._said("")))
        return chunks

    def _said(self, text: str) -> dict[str, Any]:
        if self._is_chat:
            return {"delta": {"content": text} if text else {}}
        return {"text": text}

    def _chunk(
        self, one: Choice, *, logprobs: Mapping[str, Any] | None = None, finish: str | None = None, **said: Any
    ) -> dict[str, Any]:
        choice = {"index": one.index, **said, "logprobs": logprobs, "finish_reason": finish}
        chunk = self._head(is_chunk=True) | {"choices": [choice]}
        return chunk | {"usage": None} if self._wish.has_usage else chunk

    # --- an answer

    def whole(self, tokens: Iterable[Token]) -> dict[str, Any]:
        """The answer that all tokens make."""
        pieces: list[list[Piece]] = [[] for _ in self._choices]
        logprobs: list[list[dict[str, Any]]] = [[] for _ in self._choices]

        def enter(one: Choice, piece: Piece) -> None:
            pieces[one.index].append(piece)
            if (told := one.logprobs(piece)) is not None:
                logprobs[one.index].append(told)

        for token in tokens:
            one = self._choices[self._first[token.invoke] + token.sequence]
            enter(one, one.take(token))
        for one in self._choices:
            if one.finish is None:
                enter(one, one.end(None))
        choices = []
        for one in self._choices:
            text = self._echo(one) + "".join(piece.text for piece in pieces[one.index])
            said: dict[str, Any] = {"text": text}
            if self._is_chat:
                said = {"message": {"role": "assistant", "content": text, "refusal": None}}
            joined = _joined(logprobs[one.index])
            choices.append({"index": one.index, **said, "logprobs": joined, "finish_reason": one.finish})
        return self._head(is_chunk=False) | {"choices": choices, "usage": self.usage()}

    def usage(self) -> dict[str, int]:
        """Tokens of the prompts and of what they went on with."""
        prompt, new = sum(map(len, self._prompts)), sum(one.num_tokens for one in self._choices)
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}

    def _echo(self, one: Choice) -> str:
        if not (isinstance(self._wish, CompletionWish) and self._wish.echo):
            return ""
        if isinstance(self._wish.prompt, str):
            return self._wish.prompt
        place = one.index // self._wish.samples
        said = self._wish.prompt[place]
        if isinstance(said, str):
            return said
        if self._tokenizer is None:
            return ""
        return str(self._tokenizer.decode(list(self._prompts[place]), skip_special_tokens=True))

    def _head(self, *, is_chunk: bool) -> dict[str, Any]:
        kind = ("chat.completion.chunk" if is_chunk else "chat.completion") if self._is_chat else "text_completion"
        prefix = "chatcmpl" if self._is_chat else "cmpl"
        return {
            "id": f"{prefix}-{self._request}",
            "object": kind,
            "created": self._created,
            "model": self._wish.model,
            "polytrace": {"request": self._request},
        }


def _joined(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Log-probabilities of pieces as those of all."""
    if not parts:
        return None
    return {
        name: [one for part in parts for one in part[name]] if isinstance(value, list) else value
        for name, value in parts[0].items()
    }


def _number(logprob: float | None) -> float:
    return logprob if logprob is not None and math.isfinite(logprob) else _LEAST
