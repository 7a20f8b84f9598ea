"""`polytrace models`: the deployments of a running service, and for how long each stays loaded."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from api import operations
from api.asking import HERE, AsJson, Key, Url, quoted, show, when
from api.console import errors
from api.deployment_flags import DeploymentFlags, takes_deployment
from api.operations import Name, Wait
from api.service_calls import Entry, Service

models = typer.Typer(no_args_is_help=True, help="Deploy, list, load, evict, pin, schedule and remove deployments.")

OnDemand = Annotated[
    bool, typer.Option("--on-demand", help="Requests load it, and it may rest while others need its room.")
]
Idle = Annotated[float | None, typer.Option(metavar="MINUTES", help="Without a request, after which it rests.")]
Rests = Annotated[str | None, typer.Option(help="Where it goes then: warm (its weights stay in memory) or cold.")]


@models.command("list")
def list_(as_json: AsJson = False, url: Url = HERE, key: Key = None) -> None:
    """List the deployments: what is loaded, what rests and why, what keeps each, and when it was used."""
    with errors():
        columns = {
            "model": lambda one: str(one["name"]),
            "state": lambda one: str(one["state"]),
            "what": lambda one: operations.first_line(one["progress"]),
            "kept": lambda one: _kept(one["keeping"]),
            "last used": lambda one: when(one["last_used"]),
            "queued": lambda one: str(one["queued"]),
            "running": lambda one: str(one["running"]),
        }
        show(Service(url, key).deployments(), columns, as_json)


@models.command()
@takes_deployment
def deploy(
    model: Annotated[
        str,
        typer.Argument(
            help="A folder with a Hugging Face model, a hub id, a URL such as s3://BUCKET/MODEL, or a known deployment."
        ),
    ],
    deployment: DeploymentFlags,
    on_demand: OnDemand = False,
    idle: Idle = None,
    rests: Rests = None,
    url: Url = HERE,
    key: Key = None,
    wait: Wait = True,
) -> None:
    """Serve MODEL: it is loaded once, which tells what requests are checked against, and then kept as it is said."""
    change: dict[str, Any] = {"on_demand": True} if on_demand else {}
    change |= {} if idle is None else {"idle_minutes": idle}
    change |= {} if rests is None else {"rests": rests}
    with errors():
        operations.put(Service(url, key), deployment, model, wait=wait, keeping=change)


models.command()(operations.drain)
models.command()(operations.resume)
models.command()(operations.remove)
models.command()(operations.resize)


@models.command()
def load(name: Name, url: Url = HERE, key: Key = None, wait: Wait = True) -> None:
    """Load a deployment that rests, or try one again that has failed."""
    with errors():
        service = Service(url, key)
        service.ask("POST", f"/v1/models/{quoted(name)}/load")
        if wait:
            service.follow(name, f"loading {name}", _is_loaded)


@models.command()
def evict(
    name: Name,
    to: Annotated[str | None, typer.Option(help="warm or cold; default: where it rests.")] = None,
    url: Url = HERE,
    key: Key = None,
    wait: Wait = True,
) -> None:
    """Let a deployment finish what it has, and end its shards. It stays known."""
    with errors():
        service = Service(url, key)
        heat = service.ask("POST", f"/v1/models/{quoted(name)}/evict", json={"to": to})["heat"]
        if wait:
            # one that cannot be held warm says so and is cold; a request may have loaded it again
            service.follow(name, f"evicting {name}", lambda entry: entry is None or _rests(entry, heat))


@models.command()
def pin(name: Name, url: Url = HERE, key: Key = None, wait: Wait = True) -> None:
    """Load a deployment and keep it loaded, whoever needs the room."""
    with errors():
        service = Service(url, key)
        _keep(service, name, {"is_pinned": True})
        if wait:
            service.follow(name, f"loading {name}", _is_loaded)


@models.command()
def unpin(name: Name, url: Url = HERE, key: Key = None) -> None:
    """Let a deployment make room for others again."""
    with errors():
        _keep(Service(url, key), name, {"is_pinned": False})


@models.command()
def schedule(
    name: Name,
    hours: Annotated[
        str | None, typer.Argument(help="'mon-fri 08:00-20:00', UTC, or '...; sat 10:00-14:00 Europe/Berlin'.")
    ] = None,
    clear: Annotated[bool, typer.Option("--clear", help="No hours any more.")] = False,
    url: Url = HERE,
    key: Key = None,
) -> None:
    """Keep a deployment loaded in these hours, and outside of them only as long as it is used."""
    from polytrace.errors import UserError

    with errors():
        if (hours is None) != clear:
            raise UserError("name the hours, such as 'mon-fri 08:00-20:00', or --clear")
        _keep(Service(url, key), name, {"schedule": hours})


@models.command("set")
def set_(
    name: Name,
    on_demand: Annotated[bool | None, typer.Option("--on-demand/--not-on-demand", help="Requests load it.")] = None,
    idle: Idle = None,
    never_idle: Annotated[bool, typer.Option("--never-idle", help="It stays until others need its room.")] = False,
    rests: Rests = None,
    url: Url = HERE,
    key: Key = None,
) -> None:
    """Change what is named of how a deployment is kept; the rest stays."""
    with errors():
        change: dict[str, Any] = {} if on_demand is None else {"on_demand": on_demand}
        change |= {} if idle is None else {"idle_minutes": idle}
        change |= {"idle_minutes": None} if never_idle else {}
        change |= {} if rests is None else {"rests": rests}
        _keep(Service(url, key), name, change)


def _keep(service: Service, name: str, change: dict[str, Any]) -> None:
    service.ask("PATCH", f"/v1/models/{quoted(name)}/keeping", json=change)


def _is_loaded(entry: Entry | None) -> bool:
    """Raises ServiceError for one that will not say that it is ready, because it is drained."""
    from polytrace.errors import ServiceError

    if entry is not None and entry["mode"] == "draining":
        raise ServiceError(f"{entry['name']} is drained: `polytrace resume {entry['name']}`")
    return entry is not None and entry["state"] == "ready"


def _rests(entry: Entry, heat: str) -> bool:
    is_refused = entry["state"] == "cold" and "not warm" in entry["progress"]
    return entry["state"] == heat or is_refused or entry["heat"] == "hot"


def _kept(keeping: dict[str, Any]) -> str:
    """How it is kept, in few words."""
    words = ["pinned"] if keeping["is_pinned"] else []
    words += ["on demand"] if keeping["on_demand"] else []
    words += [keeping["schedule"]] if keeping["schedule"] else []
    words += [f"idle {keeping['idle_minutes']:g} min"] if keeping["idle_minutes"] else []
    words += [f"rests {keeping['rests']}"] if keeping["on_demand"] or keeping["schedule"] else []
    return ", ".join(words) or "always"
