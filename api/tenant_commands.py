"""`polytrace tenants` and `polytrace audit`: who may use a service, how much of it, and who changed that."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from api.asking import HERE, AsJson, InStore, Key, Url, asked, quoted, show, when
from api.console import errors

tenants = typer.Typer(no_args_is_help=True, help="Add, change, list and remove tenants and their users.")

Tenant = Annotated[str, typer.Argument(help="Name of the tenant.")]
Weight = Annotated[float | None, typer.Option(help="Its share beside others', 1 by default.")]
Models = Annotated[list[str] | None, typer.Option("--model", help="A deployment that it may use; may come again.")]
Limits = Annotated[
    list[str] | None,
    typer.Option("--limit", metavar="NAME=NUMBER", help="Such as tokens_a_day=1000000; NAME= for the service's own."),
]


@tenants.command()
def add(
    tenant: Tenant,
    weight: Weight = None,
    model: Models = None,
    limit: Limits = None,
    url: Url = HERE,
    key: Key = None,
    store: InStore = None,
) -> None:
    """Add a tenant. Without --model it may use every deployment."""
    with errors():
        asked(url, key, store).ask("PUT", f"/v1/tenants/{quoted(tenant)}", json=_terms(weight, model, limit))


@tenants.command("set")
def set_(
    tenant: Tenant,
    weight: Weight = None,
    model: Models = None,
    all_models: Annotated[bool, typer.Option("--all-models", help="It may use every deployment.")] = False,
    limit: Limits = None,
    disable: Annotated[bool | None, typer.Option("--disable/--enable", help="Whether its keys are refused.")] = None,
    url: Url = HERE,
    key: Key = None,
    store: InStore = None,
) -> None:
    """Change what is named; the rest stays."""
    with errors():
        terms = _terms(weight, model, limit)
        if all_models:
            terms["models"] = None
        if disable is not None:
            terms["is_disabled"] = disable
        asked(url, key, store).ask("PATCH", f"/v1/tenants/{quoted(tenant)}", json=terms)


@tenants.command("list")
def list_(as_json: AsJson = False, url: Url = HERE, key: Key = None, store: InStore = None) -> None:
    """List the tenants."""
    with errors():
        columns = {
            "tenant": lambda one: str(one["name"]) + (" (disabled)" if one["is_disabled"] else ""),
            "weight": lambda one: f"{one['weight']:g}",
            "models": lambda one: "all" if one["models"] is None else ", ".join(one["models"]) or "none",
            "limits": lambda one: ", ".join(f"{name}={value}" for name, value in one["limits"].items()),
        }
        show(asked(url, key, store).ask("GET", "/v1/tenants")["tenants"], columns, as_json)


@tenants.command()
def remove(tenant: Tenant, url: Url = HERE, key: Key = None, store: InStore = None) -> None:
    """Forget a tenant, its users and keys, once nothing of its is stored."""
    with errors():
        asked(url, key, store).ask("DELETE", f"/v1/tenants/{quoted(tenant)}")


@tenants.command()
def users(tenant: Tenant, as_json: AsJson = False, url: Url = HERE, key: Key = None, store: InStore = None) -> None:
    """List a tenant's users."""
    with errors():
        columns = {
            "user": lambda one: str(one["name"]) + (" (disabled)" if one["is_disabled"] else ""),
            "role": lambda one: str(one["role"]),
            "since": lambda one: when(one["created"]),
        }
        show(asked(url, key, store).ask("GET", f"/v1/tenants/{quoted(tenant)}/users")["users"], columns, as_json)


@tenants.command()
def user(
    tenant: Tenant,
    name: Annotated[str, typer.Argument(help="Name of the user.")],
    role: Annotated[str | None, typer.Option(help="user, monitor or operator.")] = None,
    disable: Annotated[bool | None, typer.Option("--disable/--enable", help="Whether the keys are refused.")] = None,
    url: Url = HERE,
    key: Key = None,
    store: InStore = None,
) -> None:
    """Make a user, or change what is named of one."""
    with errors():
        wish = {"role": role, "is_disabled": disable}
        asked(url, key, store).ask("PUT", f"/v1/tenants/{quoted(tenant)}/users/{quoted(name)}", json=wish)


def audit(
    limit: Annotated[int, typer.Option(min=1, max=1000, help="How many, the newest.")] = 100,
    before: Annotated[int | None, typer.Option(help="Those in front of this number.")] = None,
    as_json: AsJson = False,
    url: Url = HERE,
    key: Key = None,
    store: InStore = None,
) -> None:
    """Show what operators did, and users with their keys."""
    with errors():
        params = {"limit": limit} if before is None else {"limit": limit, "before": before}
        columns = {
            "number": lambda one: str(one["seq"]),
            "at": lambda one: when(one["at"]),
            "who": lambda one: str(one["actor"]),
            "act": lambda one: str(one["act"]),
            "on": lambda one: str(one["subject"]),
            "details": lambda one: json.dumps(one["details"]),
        }
        show(asked(url, key, store).ask("GET", "/v1/audit", params=params)["entries"], columns, as_json)


def _terms(weight: float | None, models: list[str] | None, limits: list[str] | None) -> dict[str, Any]:
    """What the flags name."""
    from polytrace.errors import UserError

    terms: dict[str, Any] = {}
    if weight is not None:
        terms["weight"] = weight
    if models:
        terms["models"] = models
    for limit in limits or ():
        name, is_there, value = limit.partition("=")
        if not is_there or not (value == "" or value.isdecimal()):
            raise UserError(f"--limit {limit!r} is not NAME=NUMBER")
        terms.setdefault("limits", {})[name] = int(value) if value else None
    return terms
