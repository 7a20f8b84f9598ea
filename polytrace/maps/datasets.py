"""What a map runs over: prompts of any iterable, one after another, brought to token ids when they are needed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polytrace.description import ModelDescription
from polytrace.errors import GraphError, UserError
from polytrace.lines import user_line
from polytrace.prompts import Encoder, PromptBook

_KEYS = ("text", "prompt")


@dataclass(frozen=True, slots=True, kw_only=True)
class Datum:
    """One member of the dataset."""

    number: int
    item: Any
    sequence: tuple[int, ...] = ()
    problem: str | None = None  # why it cannot be run


def items_of(dataset: Any, where: str) -> tuple[Iterable[Any], int | None]:
    """The members of a dataset, and how many there are where that is known.

    An iterable of prompts (a list, a generator, a datasets.Dataset), or the `pathlib.Path` of a file, of which each
    line is a prompt, as JSON in a `.jsonl` file. A prompt is a string, token ids, or a row with input_ids, text or
    prompt.
    """
    if isinstance(dataset, os.PathLike):
        return _lines(Path(dataset)), None
    if isinstance(dataset, (str, bytes)) or not isinstance(dataset, Iterable):
        raise GraphError(
            f"a map runs over many prompts, not over a {type(dataset).__name__}: give a list, a generator, or "
            "pathlib.Path(file) for the lines of a file",
            where=where,
        )
    try:
        return dataset, len(dataset)  # type: ignore[arg-type]
    except TypeError:
        return dataset, None


class Encoding:
    """Prompts of one dataset as token ids."""

    def __init__(
        self, description: ModelDescription, tokenizer: Callable[[], Encoder | None], *, is_skipping: bool
    ) -> None:
        self._description = description
        self._tokenizer = tokenizer
        self._is_skipping = is_skipping

    def prompt(self, item: Any) -> tuple[int, ...]:
        """The ids of one prompt. Raises GraphError, TooLargeError."""
        invoke = PromptBook(self._description, self._tokenizer).invoke(_prompt_of(item))
        if len(invoke.sequences) != 1:
            raise GraphError(f"each member of the dataset is one prompt; this one has {len(invoke.sequences)}")
        return invoke.sequences[0]

    def data(self, items: Iterable[Any]) -> Iterator[Datum]:
        """The members in order. Raises what is wrong with one, by its number, unless such are to be skipped."""
        for number, item in enumerate(items):
            try:
                yield Datum(number=number, item=item, sequence=self.prompt(item))
            except UserError as error:
                told = error.message.removeprefix("prompt 0 ")
                told = f"prompt {number}{': ' if told == error.message else ' '}{told}"
                if not self._is_skipping:
                    raise type(error)(told, where=user_line()) from None
                yield Datum(number=number, item=item, problem=told)


def _lines(path: Path) -> Iterator[Any]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file):
            text = line.rstrip("\n")
            if path.suffix == ".jsonl":
                yield _parsed(text, f"{path.name}:{number + 1}")
            else:
                yield text


def _parsed(line: str, place: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise GraphError(f"{place} is not JSON: {error}") from error


def _prompt_of(item: Any) -> Any:
    """A row of a dataset has its prompt under one of a few names; ids may come with their mask."""
    if not isinstance(item, Mapping) or "input_ids" in item:
        return item
    key = next((key for key in _KEYS if key in item), None)
    if key is None:
        raise GraphError(f"a row with none of input_ids, {', '.join(_KEYS)}; it has {', '.join(map(str, item))}")
    return item[key]
