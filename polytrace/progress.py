"""Shows how far a long request is, to whoever looks: a bar in a terminal or a notebook, nothing anywhere else."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Takes how many passes are done, and of how many.
Tell = Callable[[int, int], None]

_PATIENCE_S = 2.0  # what is over sooner shows nothing


def tell_nobody(passes_done: int, passes: int) -> None:
    """For callers that nobody looks at."""


@contextmanager
def showing_progress(what: str) -> Iterator[Tell]:
    """Inside, the yielded function shows a bar from the third second on. It goes away at the end."""
    if not (sys.stderr.isatty() or "ipykernel" in sys.modules):
        yield tell_nobody
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("passes"))
    bar = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
    task = bar.add_task(what, total=None)
    began = time.monotonic()

    def tell(passes_done: int, passes: int) -> None:
        if time.monotonic() - began >= _PATIENCE_S:
            bar.start()
            bar.update(task, completed=passes_done, total=passes)

    try:
        yield tell
    finally:
        bar.stop()
