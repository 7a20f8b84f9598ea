"""The command line: `polytrace serve`, what operates a service (`api.operations`), and what rooms above add to it.

Other packages and rooms add commands through the entry-point group `polytrace.commands`: a name and a function that
typer can run. Everything heavy is imported inside the command that needs it, so that help and errors come at once.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from api import (
    accounting,
    job_commands,
    key_commands,
    model_commands,
    operations,
    purge_command,
    store_commands,
    tenant_commands,
    watch_commands,
)
from api.console import errors, progress
from api.deployment_flags import DeploymentFlags, takes_deployment

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
@takes_deployment
def serve(
    model: Annotated[
        str | None, typer.Argument(help="A folder with a Hugging Face model, or a hub id; without: what --store has.")
    ] = None,
    *,
    deployment: DeploymentFlags,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")] = 8765,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for every one.")] = "127.0.0.1",
    address: Annotated[
        str | None, typer.Option(help="A Ray cluster to join, HOST:PORT or auto; default: an own one.")
    ] = None,
    store: Annotated[
        Path | None, typer.Option(help="Folder for requests, results and deployments; default: a temporary one.")
    ] = None,
    database: Annotated[
        str | None, typer.Option(help="postgresql://... in the place of a file in --store; best as POLYTRACE_DATABASE.")
    ] = None,
    objects: Annotated[
        str | None, typer.Option(help="s3://BUCKET/PREFIX, or a URL of fsspec's, for all that outlives --store.")
    ] = None,
    key: Annotated[
        str | None, typer.Option(help="An operator's key beside the store's; better set as POLYTRACE_KEY.")
    ] = None,
    without_keys: Annotated[
        bool,
        typer.Option("--without-keys", help="Whoever reaches it is an operator: on a machine of one's own."),
    ] = False,
    jobs: Annotated[
        bool, typer.Option("--jobs", help="Its own Ray cluster takes `ray job submit`; needs ray[default].")
    ] = False,
    drain_seconds: Annotated[
        float | None,
        typer.Option(min=0, help="Most that it finishes accepted requests for when told to stop; default: 30."),
    ] = None,
    log_format: Annotated[
        str | None, typer.Option(help="Of the logs in the store's folder: text or json.", envvar="POLYTRACE_LOG_FORMAT")
    ] = None,
    otlp: Annotated[
        str | None, typer.Option(help="URL of a collector for OpenTelemetry.", envvar="OTEL_EXPORTER_OTLP_ENDPOINT")
    ] = None,
) -> None:
    """Serve MODEL over HTTP until SIGTERM or Ctrl-C, then finish what was accepted. `deploy` adds others."""
    with errors():
        from api import log_lines
        from api.otlp import check_url
        from api.settings import serve_settings
        from api.supervisor import Supervisor
        from engine.folders import check_source

        if log_format is not None:
            os.environ["POLYTRACE_LOG_FORMAT"] = log_format  # the processes that it starts read it there
        log_lines.check()
        if otlp is not None:
            check_url(otlp)
            os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"] = otlp
        spec = None if model is None else deployment.spec(model)
        if spec is not None and address is None:  # another machine's folders are not to be seen from here
            check_source(spec.source, stages=spec.stages, ranks=spec.ranks)
        settings = serve_settings(
            spec=spec,
            key=key,
            asks_key=not without_keys,
            host=host,
            port=port,
            address=address,
            store=None if store is None else str(store),
            database=database,
            objects=objects,
            takes_jobs=jobs,
            drain_s=drain_seconds,
        )
        shards = f"{deployment.stages} x {deployment.ranks}"
        shards = f"{deployment.replicas} x {shards}" if deployment.replicas > 1 else shards
        first = f"starting {spec.name} on {shards} shards" if spec else f"starting what {settings.store} has"
        with progress(first, tells_first=False) as report:
            serves = f"serves {spec.name}" if spec else "takes deployments"
            supervisor = Supervisor(settings, report)
            supervisor.run(lambda url: report(f"ready: {url} {serves}"), on_begun=lambda: report(first))


for _operation in (
    operations.status,
    operations.deploy,
    operations.drain,
    operations.resume,
    operations.resize,
    operations.remove,
):
    app.command()(_operation)
app.command()(tenant_commands.audit)
app.add_typer(job_commands.jobs, name="jobs")
app.add_typer(key_commands.keys, name="keys")
app.add_typer(model_commands.models, name="models")
app.add_typer(tenant_commands.tenants, name="tenants")
for _account in (accounting.validate, accounting.usage, accounting.limits):
    app.command()(_account)
app.command()(purge_command.purge)
app.command()(watch_commands.doctor)
app.command()(watch_commands.top)
app.add_typer(store_commands.store, name="store")


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
    with errors():
        from dataclasses import replace

        from cluster.planning.hardware import hardware_of, parse_bytes
        from cluster.planning.planner import Load, Machine, census_of, plan_splits_of
        from cluster.planning.report import as_plain, show

        kind = hardware_of(hardware)
        if gpu_memory is not None:
            kind = replace(kind, memory_bytes=parse_bytes(gpu_memory))
        machine = Machine(hardware=kind, gpus=gpus, nodes=nodes)
        with progress(f"counting the weights of {model}"):
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


if __name__ == "__main__":
    main()
