"""`polytrace jobs`: list, show and cancel requests of a running service, and fetch their results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from api.asking import HERE, AsJson, Key, Url, quoted, show, when
from api.console import errors
from api.service_calls import Service

jobs = typer.Typer(no_args_is_help=True, help="List, show and cancel requests, and fetch their results.")

Job = Annotated[str, typer.Argument(metavar="ID", help="Of the request: 32 hex digits.")]


@jobs.command("list")
def list_(
    state: Annotated[str | None, typer.Option(help="queued, running, done, failed or cancelled.")] = None,
    model: Annotated[str | None, typer.Option(help="Only to this deployment.")] = None,
    tenant: Annotated[str | None, typer.Option(help="Only of this one; for operators.")] = None,
    user: Annotated[str | None, typer.Option(help="Only of this one; for operators.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Of the newest.")] = 50,
    as_json: AsJson = False,
    url: Url = HERE,
    key: Key = None,
) -> None:
    """List one's requests, the newest first; an operator's list has everyone's."""
    with errors():
        wish = {"state": state, "model": model, "tenant": tenant, "user": user}
        found = _pages(Service(url, key), {name: value for name, value in wish.items() if value is not None}, limit)
        columns = {
            "id": lambda one: str(one["id"]),
            "model": lambda one: str(one["model"]),
            "of": lambda one: f"{one['tenant']}/{one['user']}",
            "state": lambda one: str(one["state"]),
            "passes": lambda one: f"{one['passes_done']}/{one['passes']}" if one["passes"] else "",
            "accepted": lambda one: when(one["created"]),
            "ended": lambda one: when(one["finished"]),
            "error": lambda one: "" if one["error"] is None else str(one["error"]["message"]).partition("\n")[0][:80],
        }
        show(found, columns, as_json)


@jobs.command("show")
def show_(job: Job, url: Url = HERE, key: Key = None) -> None:
    """Show all that is known of a request, as JSON."""
    with errors():
        print(json.dumps(Service(url, key).ask("GET", f"/v1/requests/{quoted(job)}"), indent=2))


@jobs.command()
def cancel(job: Job, url: Url = HERE, key: Key = None) -> None:
    """Cancel a request that has not ended: one that waits at once, one that runs after its pass."""
    with errors():
        told = Service(url, key).ask("DELETE", f"/v1/requests/{quoted(job)}")
        is_asked = told["state"] == "running"
        typer.echo(f"{job} is {'running, and asked to end' if is_asked else told['state']}", err=True)


@jobs.command()
def result(
    job: Job,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Default: ID.safetensors.")] = None,
    url: Url = HERE,
    key: Key = None,
) -> None:
    """Fetch the result of a request that is done, into a safetensors file."""
    with errors():
        path = output or Path(f"{job}.safetensors")
        num_bytes = Service(url, key).download(f"/v1/requests/{quoted(job)}/result", path)
        typer.echo(f"{path}: {num_bytes} bytes", err=True)


def _pages(service: Any, wish: dict[str, Any], limit: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    before: int | None = None
    while len(found) < limit:
        more = {"limit": min(limit - len(found), 500)} | ({} if before is None else {"before": before})
        page = service.ask("GET", "/v1/requests", params=wish | more)
        found += page["requests"]
        before = page["next"]
        if before is None:
            break
    return found
