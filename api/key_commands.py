"""`polytrace keys`: make, list, revoke and rotate keys, of a running service or of a store (`--store`)."""

from __future__ import annotations

import re
from typing import Annotated, Any

import typer

from api.asking import HERE, AsJson, InStore, Key, Url, asked, quoted, show, when
from api.console import errors

keys = typer.Typer(no_args_is_help=True, help="Make, list, revoke and rotate keys.")

Prefix = Annotated[str, typer.Argument(metavar="KEY", help="Its first 15 characters: pt_...")]
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


@keys.command()
def make(
    tenant: Annotated[str | None, typer.Option(help="Whose; default: one's own.")] = None,
    user: Annotated[str | None, typer.Option(help="Whose; made when there is none of this name.")] = None,
    operator: Annotated[bool, typer.Option("--operator", help="Of a user who is an operator.")] = False,
    monitor: Annotated[bool, typer.Option("--monitor", help="Of one who reads figures, and nothing else.")] = False,
    label: Annotated[str, typer.Option(help="What it is for.")] = "",
    expires: Annotated[str | None, typer.Option(metavar="TIME", help="How long it is good: 90d, 12h.")] = None,
    url: Url = HERE,
    key: Key = None,
    store: InStore = None,
) -> None:
    """Make a key and print it, alone on standard output: it cannot be shown again."""
    with errors():
        wish: dict[str, Any] = {"tenant": tenant, "user": user, "label": label, "expires_in_s": _seconds(expires)}
        if operator or monitor:
            wish["role"] = "operator" if operator else "monitor"
        if store is not None:
            wish |= {"tenant": tenant or "default", "user": user or "default"}
        _tell(asked(url, key, store).ask("POST", "/v1/keys", json=wish))


@keys.command("list")
def list_(
    tenant: Annotated[str | None, typer.Option(help="Only of this one.")] = None,
    user: Annotated[str | None, typer.Option(help="Only of this one.")] = None,
    as_json: AsJson = False,
    url: Url = HERE,
    key: Key = None,
    store: InStore = None,
) -> None:
    """List one's keys; an operator's list has everyone's."""
    with errors():
        narrow = {name: value for name, value in (("tenant", tenant), ("user", user)) if value is not None}
        found = asked(url, key, store).ask("GET", "/v1/keys", params=narrow)["keys"]
        columns = {
            "key": lambda one: str(one["prefix"]),
            "of": lambda one: f"{one['tenant']}/{one['user']}",
            "role": lambda one: str(one["role"]),
            "for": lambda one: str(one["label"]),
            "made": lambda one: when(one["created"]),
            "expires": lambda one: "revoked" if one["revoked"] else when(one["expires"]),
            "last used": lambda one: when(one["last_used"]),
        }
        show(found, columns, as_json)


@keys.command()
def revoke(prefix: Prefix, url: Url = HERE, key: Key = None, store: InStore = None) -> None:
    """Refuse a key from now on."""
    with errors():
        asked(url, key, store).ask("DELETE", f"/v1/keys/{quoted(prefix)}")
        typer.echo(f"{prefix} is revoked", err=True)


@keys.command()
def rotate(
    prefix: Prefix,
    grace: Annotated[str, typer.Option(metavar="TIME", help="How long the old one goes on: 24h.")] = "0s",
    url: Url = HERE,
    key: Key = None,
    store: InStore = None,
) -> None:
    """Put a new key in the place of one and print it; the old one is refused from now on, or after --grace."""
    with errors():
        params = {"grace_s": _seconds(grace)}
        _tell(asked(url, key, store).ask("POST", f"/v1/keys/{quoted(prefix)}/rotate", params=params))


def _tell(made: dict[str, Any]) -> None:
    """The key for a script, the rest for people."""
    ends = f", until {when(made['expires'])}" if made["expires"] else ""
    whose = f"{made['tenant']}/{made['user']}, {made['role']}"
    typer.echo(f"{made['prefix']} of {whose}{ends}; it is shown only now:", err=True)
    typer.echo(made["secret"])


def _seconds(text: str | None) -> float | None:
    if text is None:
        return None
    from polytrace.errors import UserError

    found = re.fullmatch(r"(\d{1,9}(?:\.\d+)?)([smhd])", text)
    if not found:
        raise UserError(f"{text!r} is no time: a number and s, m, h or d, such as 90d")
    return float(found[1]) * _UNITS[found[2]]
