"""The commands that operate a running service: deploy, drain, resume, remove, resize, status. They speak HTTP.

Each asks once and then follows the deployment until it is what was asked for; `--no-wait` returns at once. Ctrl-C ends
the following, not the deployment.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated, Any

import typer

from api.asking import HERE, Key, Url, quoted
from api.console import errors, progress
from api.deployment_flags import DeploymentFlags, takes_deployment
from api.service_calls import LOOK_S, Entry, Service
from cluster.config import DeploymentSpec

Wait = Annotated[bool, typer.Option(help="Follow it until it is so.")]
Name = Annotated[str, typer.Argument(help="Name of the deployment.")]


@takes_deployment
def deploy(
    model: Annotated[
        str,
        typer.Argument(help="A folder with a Hugging Face model or a hub id, which the service reads, or a known one."),
    ],
    deployment: DeploymentFlags,
    url: Url = HERE,
    key: Key = None,
    wait: Wait = True,
) -> None:
    """Serve another MODEL on a running service, or one again, by its name, that was drained or has failed: what is not
    said stays as it was, but for random weights, which are said again.
    """
    with errors():
        put(Service(url, key), deployment, model, wait=wait)


def put(service: Service, flags: DeploymentFlags, model: str, *, wait: bool, keeping: Mapping[str, Any] = {}) -> None:
    """Deploys a model, or a deployment by its name; with `keeping` how long it is to stay loaded.

    What flags do not say of a deployment that is there stays as it is, and is told; but for random weights, which have
    to be said again (`DeploymentFlags.spec`). Of one that has failed and never served, nothing stays when a source is
    said: it was a trial.
    """
    from api.settings import source_and_name

    source, name = source_and_name(model, flags.name)
    entry = service.deployment(name)
    known = None if entry is None else _spec_of(entry)
    if entry is not None and known is not None:
        has_never_served = entry["state"] == "failed" and not entry.get("is_described")
        if model == name and (flags.name is None or source == name):
            _tell_folder(known, source)
            source = known.source  # it was named
        elif known.source != source or has_never_served:
            known = None
    spec = flags.spec(source, known, name=name)
    wish = asdict(spec)
    del wish["name"]
    first = f"deploying {name} ({spec.source}) on {spec.replicas} x {spec.stages} x {spec.ranks} shards"
    if kept := flags.kept(known):
        first = f"{first}; it keeps {', '.join(kept)}"
    service.ask("PUT", f"/v1/models/{quoted(name)}", json=wish)
    if keeping:
        service.ask("PATCH", f"/v1/models/{quoted(name)}/keeping", json=dict(keeping))
    if wait:
        service.follow(name, first, lambda entry: entry is not None and bool(entry["is_ready"]))
    else:
        typer.echo(first, err=True)


def drain(
    name: Annotated[str | None, typer.Argument(help="Of a deployment; without: the whole service.")] = None,
    url: Url = HERE,
    key: Key = None,
    wait: Wait = True,
) -> None:
    """Let a deployment, or all, finish what it has and take nothing new; its shards stay. `resume` ends it."""
    with errors():
        service = Service(url, key)
        if name is None:
            _drain_all(service, wait)
            return
        service.ask("POST", f"/v1/models/{quoted(name)}/drain")
        if wait:
            service.follow(name, f"draining {name}", _is_drained)


def resume(
    name: Annotated[str | None, typer.Argument(help="Of a deployment; without: the whole service.")] = None,
    url: Url = HERE,
    key: Key = None,
    wait: Wait = True,
) -> None:
    """Let a drained deployment take requests again, or the service, which says which deployments are still drained."""
    with errors():
        service = Service(url, key)
        if name is not None:
            service.ask("DELETE", f"/v1/models/{quoted(name)}/drain")
            if wait:
                entry = service.follow(name, f"resuming {name}", _is_resumed)
                if entry is not None and entry["state"] in ("warm", "cold") and not entry["keeping"]["on_demand"]:
                    print(f"{name} rests, and requests do not load it: `polytrace models load {name}`")
            return
        service.ask("DELETE", "/v1/drain")
        print("the service takes requests")
        for one in service.deployments():
            if one["mode"] == "draining":
                print(f"{one['name']} is drained by itself and takes none: `polytrace resume {one['name']}`")


def remove(
    name: Name,
    now: Annotated[bool, typer.Option("--now", help="Do not finish what it has: refuse it.")] = False,
    url: Url = HERE,
    key: Key = None,
    wait: Wait = True,
) -> None:
    """Let a deployment finish what it has, then end its shards and forget it."""
    with errors():
        service = Service(url, key)
        service.ask("DELETE", f"/v1/models/{quoted(name)}", params={"now": now})
        if wait:
            service.follow(name, f"removing {name}", lambda entry: entry is None)


def resize(
    name: Name,
    replicas: Annotated[int, typer.Option(min=1, help="Copies that there are to be.")],
    url: Url = HERE,
    key: Key = None,
    wait: Wait = True,
) -> None:
    """Change the number of a deployment's replicas while it serves."""

    def is_so(entry: Entry | None) -> bool:
        if entry is None:
            return True
        ready = [one for one in entry["replicas"] if one["state"] == "ready"]
        return len(ready) == len(entry["replicas"]) == replicas

    with errors():
        service = Service(url, key)
        service.ask("PATCH", f"/v1/models/{quoted(name)}", json={"replicas": replicas})
        if wait:
            service.follow(name, f"{name} gets {replicas} replicas", is_so)


def status(
    address: Annotated[str | None, typer.Argument(metavar="[URL]", help="Of the service, as --url.")] = None,
    url: Url = HERE,
    key: Key = None,
) -> None:
    """Show a service's deployments, their replicas, states and queues."""
    with errors():
        from rich.console import Console
        from rich.table import Table

        table = Table("model", "state", "what", "stages x ranks", "queued", "running")
        told_all = Service(address or url, key).ask("GET", "/v1/models")
        for one in told_all["models"]:
            is_known = "class_name" in one
            told = first_line(one["progress"])
            what = f"{one['class_name']}, {one['num_layers']} layers, {one['dtype']}" if is_known else told
            shape = one if is_known else one["spec"] or {}
            shards = f"{shape['stages']} x {shape['ranks']}" if shape else ""
            table.add_row(one["name"], one["state"], what, shards, str(one["queued"]), str(one["running"]))
            if len(one["replicas"]) > 1 or (is_known and one["state"] != "ready"):
                for each in one["replicas"]:
                    own = first_line(each["progress"])
                    own = "" if own == told and not is_known else own
                    table.add_row(f"  replica {each['number']}", each["state"], own, "", "", str(each["requests"]))
        Console().print(table)
        if told_all.get("is_draining"):
            print("The service is drained or stopping: it finishes what it has and takes no new requests.")


def _is_drained(entry: Entry | None) -> bool:
    """Whether a deployment that is to be drained has nothing left and takes nothing."""
    if entry is None or entry["mode"] != "draining":  # somebody has ended it, or removes it
        return entry is None or entry["mode"] == "serving" or _has_nothing(entry)
    # one that runs says when it is over; another one, that loads or has failed, will not say so
    runs = entry["state"] in ("ready", "recovering", "draining")
    return _has_nothing(entry) and (not runs or entry["progress"].startswith("drained"))


def _is_resumed(entry: Entry | None) -> bool:
    """Whether a deployment takes requests: it runs, or they load it, or it rests until its hours or an operator."""
    return entry is not None and entry["state"] in ("ready", "recovering", "warm", "cold")


def _has_nothing(entry: Entry) -> bool:
    return bool(entry["queued"] + entry["running"] == 0)


def _spec_of(entry: Entry) -> DeploymentSpec | None:
    """What a deployment is."""
    from polytrace.codec import from_json

    return None if entry["spec"] is None else from_json(DeploymentSpec, entry["spec"])


def _tell_folder(known: DeploymentSpec, source: str) -> None:
    """To whoever may have meant the folder of a known deployment's name that is here."""
    if source not in (known.name, known.source):
        told = f"{known.name} is a deployment here, of {known.source}, and that is meant"
        typer.echo(f"{told}; the folder: `polytrace deploy ./{known.name} --name OTHER`", err=True)


def _drain_all(service: Service, wait: bool) -> None:
    """Of the whole service: until nothing waits and nothing runs."""
    told = service.ask("POST", "/v1/drain")
    with progress("draining the service") as report:
        line = ""
        while wait and told["queued"] + told["running"] > 0:
            if (now := f"{told['running']} requests run and {told['queued']} wait") != line:
                line = now
                report(line)
            time.sleep(LOOK_S)
            told = service.ask("GET", "/v1/drain")
        report("the service is drained" if told["queued"] + told["running"] == 0 else "the service is draining")


def first_line(text: str) -> str:
    """Of an error that others made: theirs are long."""
    return text.strip().partition("\n")[0]
