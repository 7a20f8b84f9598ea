"""The main job in one command: a sharded model, eight researchers at once, every number checked.

    polytrace demo

Starts tinyworld on 2 stages x 2 ranks as a service of its own, lets eight users with four experiments each go at it at
the same time over HTTP, then does every experiment again with plain Hugging Face in this process and compares. Exit
status 1 when any value is off by more than `bench.plain.TOLERANCE`. The demo itself is `bench.visits`: this file loads
neither torch nor transformers, so that help comes at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from bench import tinyworld
from bench.service import ServiceDidNotStartError


def command(
    model: Annotated[Path, typer.Option(help="A Llama-shaped model's folder.")] = tinyworld.FOLDER,
    stages: Annotated[int, typer.Option(min=1, help="Blocks of layers.")] = 2,
    ranks: Annotated[int, typer.Option(min=1, help="Tensor-parallel slices of each block.")] = 2,
    turns: Annotated[int, typer.Option(min=1, help="Experiments of each user, with other prompts, all at once.")] = 4,
    out: Annotated[Path, typer.Option(help="Folder for the pictures and the service's log.")] = Path("out"),
) -> None:
    """Eight users with different experiments share a model split over 2 x 2 shards; every number is checked."""
    console = Console()
    with console.status("importing torch and transformers"):
        from bench import visits
        from bench.plain import TOLERANCE
    try:
        worst = visits.run(model, stages=stages, ranks=ranks, turns=turns, out=out, console=console)
    except ServiceDidNotStartError as error:
        console.print(f"[red]{error}[/red]")
        raise typer.Exit(1) from None
    if worst > TOLERANCE:
        console.print(f"[bold red]A value differs from plain Hugging Face by {worst:.1e}; {TOLERANCE:.0e} is allowed.")
        raise typer.Exit(1)
