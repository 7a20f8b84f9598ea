"""`tracer.result` of a generation: how each sequence went on, once the block has ended."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from polytrace.certificate import Generated
from polytrace.errors import GraphError
from polytrace.images import is_image_row
from polytrace.lines import user_line


class Continuation:
    """How one sequence went on."""

    def __init__(self, prompt: tuple[int, ...], told: Generated, tokenizer: Any) -> None:
        self.prompt = prompt  # token ids
        self.ids = told.ids  # new ones, the end-of-sequence token included
        self.finish = told.finish  # "length", "eos" or "stop"
        self.logprobs = told.logprobs  # of the ids, with `logprobs=`
        self.likeliest = told.likeliest  # for each id the likeliest tokens there, (id, log-probability) each
        self.invoke, self.sequence = told.invoke, told.sequence
        self._tokenizer = tokenizer

    @property
    def text(self) -> str:
        """What is new as text, without special tokens. Raises GraphError where the model has no tokenizer."""
        if self._tokenizer is None:
            raise GraphError("this model came without a tokenizer: its new tokens are .ids", where=user_line())
        return new_text(self._tokenizer, self.prompt, self.ids)

    def __repr__(self) -> str:
        shown = repr(self.text) if self._tokenizer is not None else str(list(self.ids))
        return f"<{len(self.ids)} new tokens, {self.finish}: {shown}>"


class Continuations(Sequence[Continuation]):
    """Of the sequences of an invoke, or of all: prompts in order, samples of one side by side.

    Of a single sequence `.ids`, `.text`, `.finish`, `.logprobs` and `.likeliest` are its own; of several, lists.
    """

    def __init__(self, find: Callable[[], list[Continuation]]) -> None:
        self._find = find
        self._found: list[Continuation] | None = None

    def save(self) -> Continuations:
        """Nothing: what a generation gave always comes back. For programs written for nnsight."""
        return self

    @property
    def ids(self) -> Any:
        return self._each("ids")

    @property
    def text(self) -> Any:
        return self._each("text")

    @property
    def finish(self) -> Any:
        return self._each("finish")

    @property
    def logprobs(self) -> Any:
        return self._each("logprobs")

    @property
    def likeliest(self) -> Any:
        return self._each("likeliest")

    def _each(self, name: str) -> Any:
        found = [getattr(one, name) for one in self._all()]
        return found[0] if len(found) == 1 else found

    def _all(self) -> list[Continuation]:
        if self._found is None:
            self._found = self._find()
        return self._found

    def __getitem__(self, index: Any) -> Any:
        return self._all()[index]

    def __len__(self) -> int:
        return len(self._all())

    def __iter__(self) -> Iterator[Continuation]:
        return iter(self._all())

    def __repr__(self) -> str:
        return repr(self._all())


def new_text(tokenizer: Any, prompt: Sequence[int], ids: Sequence[int]) -> str:
    """The text that ids add to a prompt's: some tokenizers write a token's space only behind another."""
    prompt = [token for token in prompt if not is_image_row(token)]
    whole, before = tokenizer.decode([*prompt, *ids]), tokenizer.decode(prompt)
    return str(whole[len(before) :] if whole.startswith(before) else tokenizer.decode([*ids]))
