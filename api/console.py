"""What the commands say to people: progress as it comes, errors as one line."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import NoReturn

import typer

_SELDOM_S = 10.0


@contextlib.contextmanager
def progress(first: str, *, tells_first: bool = True) -> Iterator[Callable[[str], None]]:
    """Lines of progress with their time. "loading: ..." only moves a terminal's spinner, and elsewhere comes seldom.
    Unless it `tells_first`, the first line only stands beside the spinner.
    """
    import time

    from rich.console import Console

    console = Console(stderr=True)
    began = told = time.monotonic()
    with console.status(first) as spinner:

        def report(line: str) -> None:
            nonlocal told
            if "loading: " in line:
                spinner.update(line)
                if console.is_terminal or time.monotonic() - told < _SELDOM_S:
                    return
            told = time.monotonic()
            console.print(f"[dim]{time.monotonic() - began:6.1f} s[/dim]  {line}", highlight=False, soft_wrap=True)
            if line.startswith(("ready", "stopping", "stopped")):
                spinner.stop()
            else:
                spinner.update(line)

        if tells_first:
            report(first)
        yield report


@contextlib.contextmanager
def errors() -> Iterator[None]:
    """Our own errors as one line and exit code 1, without a traceback."""
    from polytrace.errors import PolytraceError

    try:
        yield
    except PolytraceError as error:
        fail(str(error))


def fail(message: str) -> NoReturn:
    typer.secho(f"polytrace: {message}", err=True, fg="red")
    raise typer.Exit(code=1)
