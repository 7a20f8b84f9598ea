"""The command line: `polytrace serve`, `polytrace status`, and what rooms above add to it.

Other packages and rooms add commands through the entry-point group `polytrace.commands`: a name and a function that
typer can run. Everything heavy is imported inside the command that needs it, so that help and errors come at once.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: importing rich for it takes as long as everything else
    help="Many traces, one forward pass: serve a model to many interpretability experiments at once.",
)


def main() -> None:
    """The console script."""
    asked = {argument for argument in sys.argv[1:] if not argument.startswith("-")}
    try:
        for name, target in _added_commands().items():
            # its module is imported when the command is meant, and not when help lists all
            help_ = None if name in asked else f"See `polytrace {name} --help`."
            app.command(name, help=help_)(_load(target) if name in asked else _stand_in)
        app()
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] in ("polytrace", "engine", "cluster", "api"):
            raise
        sys.exit(f"polytrace: this needs {error.name}, which the client alone does without: pip install polytrace[all]")


@app.command()
def serve(
    model: Annotated[str, typer.Argument(help="A folder with a Hugging Face model, or a hub id.")],
    stages: Annotated[int, typer.Option(min=1, help="Pipeline stages: blocks of layers.")] = 1,
    ranks: Annotated[int, typer.Option(min=1, help="Tensor-parallel ranks of every stage.")] = 1,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")] = 8765,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for every one.")] = "127.0.0.1",
    name: Annotated[str | None, typer.Option(help="Name of the deployment; default: the model's last part.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    address: Annotated[
        str | None, typer.Option(help="A Ray cluster to join, HOST:PORT or auto; default: an own one.")
    ] = None,
    store: Annotated[
        Path | None, typer.Option(help="Folder for requests and results; default: a temporary one.")
    ] = None,
    key: Annotated[str | None, typer.Option(help="Key that callers must bring; better set as POLYTRACE_KEY.")] = None,
    random_weights: Annotated[
        int | None,
        typer.Option(metavar="SEED", help="Read no weights but draw them; MODEL may be one that ships, as for plan."),
    ] = None,
    offload: Annotated[
        float, typer.Option(min=0, metavar="GIB", help="Of each shard's weights to keep in its host's memory.")
    ] = 0.0,
) -> None:
    """Serve MODEL over HTTP until SIGTERM or Ctrl-C."""
    with _errors():
        from api.settings import serve_settings
        from api.supervisor import Supervisor

        settings = serve_settings(
            source=model,
            name=name,
            stages=stages,
            ranks=ranks,
            dtype=dtype,
            host=host,
            port=port,
            address=address,
            store=None if store is None else str(store),
            key=key,
            random_weights_seed=random_weights,
            offload_bytes=int(offload * (1 << 30)),
        )
        with _progress(f"starting {settings.name} on {stages} x {ranks} shards") as report:
            Supervisor(settings, report).run(lambda url: report(f"ready: {url} serves {settings.name}"))


@app.command()
def status(
    url: Annotated[str, typer.Argument(help="Of a service.")] = "http://127.0.0.1:8765",
    key: Annotated[str | None, typer.Option(help="The service's key; default: POLYTRACE_KEY.")] = None,
) -> None:
    """Show a service's models, their state and their queues."""
    with _errors():
        import httpx
        from rich.console import Console
        from rich.table import Table

        from polytrace.errors import ServiceError, from_fields

        key = key or os.environ.get("POLYTRACE_KEY")
        try:
            answer = httpx.get(
                f"{url.rstrip('/')}/v1/models", headers={"Authorization": f"Bearer {key}"} if key else {}
            )
        except httpx.HTTPError as error:
            raise ServiceError(f"no service answers at {url}: {error}") from error
        if answer.status_code != 200:
            problem = answer.json() if "json" in answer.headers.get("content-type", "") else {}
            code, message = problem.get("code", ""), problem.get("detail", f"{url} answered {answer.status_code}")
            raise from_fields({"code": code, "message": message})
        table = Table("model", "state", "what", "stages x ranks", "queued", "running")
        for one in answer.json()["models"]:
            is_known = "class_name" in one
            what = f"{one['class_name']}, {one['num_layers']} layers, {one['dtype']}" if is_known else one["progress"]
            shards = f"{one['stages']} x {one['ranks']}" if is_known else ""
            table.add_row(one["name"], one["state"], what, shards, str(one["queued"]), str(one["running"]))
        Console().print(table)


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help="A folder, a hub id, or one that ships: meta-llama/Llama-3.1-405B, ...")],
    gpus: Annotated[int, typer.Option(min=1, help="GPUs there are.")] = 8,
    nodes: Annotated[int, typer.Option(min=1, help="Machines that they stand in.")] = 1,
    hardware: Annotated[str, typer.Option(help="a100-40, a100, h100, h200, b200 or l40s.")] = "h100",
    gpu_memory: Annotated[str | None, typer.Option(help="Of each, such as 80GiB; default: the hardware's.")] = None,
    stages: Annotated[int | None, typer.Option(min=1, help="Only plans with so many stages.")] = None,
    ranks: Annotated[int | None, typer.Option(min=1, help="Only plans with so many ranks.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="All plans that fit, as JSON.")] = False,
) -> None:
    """Show how MODEL would be split over GPUs that need not be there: memory, traffic, speed at the roofline."""
    with _errors():
        from dataclasses import replace

        from cluster.planning.hardware import hardware_of, parse_bytes
        from cluster.planning.planner import Load, Machine, census_of, plan_splits_of
        from cluster.planning.report import as_plain, show

        kind = hardware_of(hardware)
        if gpu_memory is not None:
            kind = replace(kind, memory_bytes=parse_bytes(gpu_memory))
        machine = Machine(hardware=kind, gpus=gpus, nodes=nodes)
        with _progress(f"counting the weights of {model}"):
            planned = plan_splits_of(census_of(model, dtype), machine, Load(), stages=stages, ranks=ranks)
        print(as_plain(planned)) if as_json else show(model, planned)


def _added_commands() -> dict[str, str]:
    """`module:function` by name, of the entry-point group. Read by hand: importing importlib.metadata takes 50 ms."""
    found: dict[str, str] = {}
    for folder in sys.path:
        for path in Path(folder).glob("*.dist-info/entry_points.txt"):
            group = ""
            for line in path.read_text().splitlines():
                if line.startswith("["):
                    group = line.strip("[] ")
                elif group == "polytrace.commands" and "=" in line:
                    name, _, target = line.partition("=")
                    found.setdefault(name.strip(), target.strip())
    return found


def _load(target: str) -> Callable[..., Any]:
    module, _, function = target.partition(":")
    command: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return command


def _stand_in() -> None:
    """What help lists in the place of a command that was not asked for."""


@contextlib.contextmanager
def _progress(first: str) -> Iterator[Callable[[str], None]]:
    """Lines of progress with their time. "loading: ..." only moves a terminal's spinner, and elsewhere comes seldom."""
    import time

    from rich.console import Console

    console = Console(stderr=True)
    began = told = time.monotonic()
    with console.status(first) as spinner:

        def report(line: str) -> None:
            nonlocal told
            if "loading: " in line:
                spinner.update(line)
                if console.is_terminal or time.monotonic() - told < 10.0:
                    return
            told = time.monotonic()
            console.print(f"[dim]{time.monotonic() - began:6.1f} s[/dim]  {line}", highlight=False, soft_wrap=True)
            if line.startswith(("ready", "stopping")):
                spinner.stop()
            else:
                spinner.update(line)

        report(first)
        yield report


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    """Our own errors as one line and exit code 1, without a traceback."""
    from polytrace.errors import PolytraceError

    try:
        yield
    except PolytraceError as error:
        _fail(str(error))


def _fail(message: str) -> NoReturn:
    typer.secho(f"polytrace: {message}", err=True, fg="red")
    raise typer.Exit(code=1)


if __name__ == "__main__":
    main()
