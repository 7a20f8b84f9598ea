"""Shows how far something long is, to whoever looks: a bar in a terminal or a notebook, nothing anywhere else."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import ProgressColumn

    from polytrace.certificate import Token

# Takes how many (passes, bytes) are done, and of how many.
Tell = Callable[[int, int], None]

# Takes saved values that the user wants to see while a request runs, by their names.
Hear = Callable[[Mapping[str, Any]], None]

# Takes tokens of a generation as they come, in the order of their steps.
HearTokens = Callable[[Sequence["Token"]], None]

_PATIENCE_S = 2.0  # what is over sooner shows nothing


def tell_nobody(done: int, total: int) -> None:
    """For callers that nobody looks at."""


def hear_nothing(values: Mapping[str, Any]) -> None:
    """For callers that log nothing."""


def hear_no_tokens(tokens: Sequence[Token]) -> None:
    """For callers that wait for all of them."""


@contextmanager
def showing_progress(what: str) -> Iterator[Tell]:
    """Inside, the yielded function shows a bar of passes from the third second on. It goes away at the end."""
    if not _is_looked_at():
        yield tell_nobody
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

    with _bar(what, BarColumn(), MofNCompleteColumn(), TextColumn("passes"), TimeRemainingColumn()) as tell:
        yield tell


@contextmanager
def showing_prompts(what: str) -> Iterator[Callable[[int, int | None], None]]:
    """The same for prompts of a dataset, whose number may not be known."""
    if not _is_looked_at():
        yield lambda done, total: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

    with _bar(what, BarColumn(), MofNCompleteColumn(), TextColumn("prompts"), TimeRemainingColumn()) as tell:
        yield tell


@contextmanager
def showing_bytes(what: str) -> Iterator[Tell]:
    """The same for bytes, with their rate."""
    if not _is_looked_at():
        yield tell_nobody
        return
    from rich.progress import BarColumn, DownloadColumn, TimeRemainingColumn, TransferSpeedColumn

    with _bar(what, BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()) as tell:
        yield tell


def _is_looked_at() -> bool:
    return sys.stderr.isatty() or "ipykernel" in sys.modules


@contextmanager
def _bar(what: str, *columns: ProgressColumn) -> Iterator[Callable[[int, int | None], None]]:
    from rich.console import Console
    from rich.progress import Progress, TextColumn

    bar = Progress(TextColumn("{task.description}"), *columns, console=Console(stderr=True), transient=True)
    task = bar.add_task(what, total=None)
    began = time.monotonic()

    def tell(done: int, total: int | None) -> None:
        bar.update(task, completed=done, total=total)
        if time.monotonic() - began >= _PATIENCE_S:
            bar.start()

    try:
        yield tell
    finally:
        bar.stop()
