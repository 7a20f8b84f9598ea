"""The service's settings: one dataclass a component, made once at the edge of a process.

Owns the environment variables that the service reads, all of them, and what their values may be. A flag of the
command line is stronger than a variable, a variable stronger than the default here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from cluster.config import DeploymentSpec
from polytrace.errors import UserError

T = TypeVar("T")

DEFAULT_BUDGET_TOKENS = 8192
DEFAULT_RESULT_TTL_S = 7 * 24 * 3600.0
DEFAULT_QUOTA_BYTES = 16 << 30  # of one owner's constants, kept values and states
MAX_REPLICAS = 64  # of one deployment: all their loops share the controller's process

# variable -> what it sets. Those of RAY_AUTH are Ray's own: where the user's environment says nothing, the service sets
# the mode to "token", and for a cluster that it starts itself makes the token too.
VARIABLES: Mapping[str, str] = {
    "POLYTRACE_KEY": "key that every call must bring as `Authorization: Bearer KEY`; empty: no key is asked for",
    "POLYTRACE_STORE": "folder for requests and results",
    "POLYTRACE_DATABASE": "postgresql://... in the place of a SQLite file in the store's folder",
    "POLYTRACE_OBJECTS": "s3://BUCKET/PREFIX, or another URL of fsspec's, for what is to outlive the store's folder",
    "POLYTRACE_CHECKERS": "processes that check requests before they are accepted",
    "POLYTRACE_MAX_WAIT_S": "longest time that one call may wait for a result",
    "POLYTRACE_MAX_OPEN": "unfinished requests that one deployment takes before it answers 503",
    "POLYTRACE_MAX_TEXT_CHARS": "characters of one prompt on OpenAI's routes; default: 32 a token of the context",
    "POLYTRACE_QUOTA_BYTES": "bytes of constants, kept values and states that one owner may have on the service",
    "POLYTRACE_RESULT_TTL_S": "seconds that a result and its events are kept after the request has ended",
    "POLYTRACE_UPLOAD_IDLE_S": "silence after which an upload is given up",
    "POLYTRACE_BUDGET_TOKENS": "most rows in one merged pass",
    "RAY_AUTH_MODE": "`token` (what the service sets) or `disabled` (only for a test cluster on one machine)",
    "RAY_AUTH_TOKEN_PATH": "file with the Ray cluster's token; needed with --address, else the service makes one",
    "RAY_AUTH_TOKEN": "the Ray cluster's token itself",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewaySettings:
    """What the gateway needs beside its listening socket. The key travels apart from it: in the environment."""

    store: str
    checkers: int = 1
    max_wait_s: float = 60.0
    max_open: int = 4096
    upload_idle_s: float = 60.0
    quota_bytes: int = DEFAULT_QUOTA_BYTES
    result_ttl_s: float = DEFAULT_RESULT_TTL_S
    max_text_chars: int | None = None  # None: by the model's context
    shutdown_s: float = 5.0  # for answers under way when the gateway is told to stop


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeSettings:
    """One service: what `polytrace serve` was asked for."""

    spec: DeploymentSpec | None  # None: only what the store wants already
    host: str = "127.0.0.1"
    port: int = 8765
    address: str | None = None  # of a Ray cluster to join; None: an own one
    store: str | None = None  # None: a fresh folder that goes when the service ends
    database: str | None = None  # a URL; None: SQLite in that folder
    objects: str | None = None  # a URL; None: that folder
    key: str | None = None
    budget_tokens: int = DEFAULT_BUDGET_TOKENS


def from_environment(name: str, kind: Callable[[str], T], default: T, *, at_least: Any = None) -> T:
    """One variable's value. Raises UserError with its name and value when it is not one."""
    if name not in VARIABLES:
        raise KeyError(name)
    text = os.environ.get(name)
    if text is None or text == "":
        return default
    try:
        value = kind(text)
    except ValueError:
        raise UserError(f"{name} is {text!r}, which is not {_KINDS.get(kind, 'a value of it')}") from None
    if at_least is not None and not value >= at_least:
        raise UserError(f"{name} is {text!r}; at least {at_least} is needed")
    return value


def gateway_settings(store: str) -> GatewaySettings:
    """The gateway's settings from the environment."""
    default = GatewaySettings(store=store)
    return GatewaySettings(
        store=store,
        checkers=from_environment("POLYTRACE_CHECKERS", int, default.checkers, at_least=1),
        max_wait_s=from_environment("POLYTRACE_MAX_WAIT_S", float, default.max_wait_s, at_least=0),
        max_open=from_environment("POLYTRACE_MAX_OPEN", int, default.max_open, at_least=1),
        upload_idle_s=from_environment("POLYTRACE_UPLOAD_IDLE_S", float, default.upload_idle_s, at_least=1),
        quota_bytes=quota_bytes(),
        max_text_chars=from_environment("POLYTRACE_MAX_TEXT_CHARS", int, default.max_text_chars, at_least=1),
        result_ttl_s=from_environment("POLYTRACE_RESULT_TTL_S", float, default.result_ttl_s, at_least=60),
        shutdown_s=default.shutdown_s,
    )


def quota_bytes() -> int:
    """What one owner may have on the service."""
    return from_environment("POLYTRACE_QUOTA_BYTES", int, DEFAULT_QUOTA_BYTES, at_least=1)


def deployment_spec(*, source: str, name: str | None = None, **flags: Any) -> DeploymentSpec:
    """A deployment as a command line asks for it: a folder by its full path, a name of its own or the model's."""
    if Path(source).is_dir():
        source = str(Path(source).resolve())
        name = name or Path(source).name
    return checked_spec(DeploymentSpec(source=source, name=name or source.rpartition("/")[2], **flags))


def checked_spec(spec: DeploymentSpec) -> DeploymentSpec:
    """The same. Raises UserError when it can be no deployment on any cluster."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", spec.name):
        raise UserError(
            f"{spec.name!r} cannot be a deployment's name: letters, digits, '.', '_' and '-'; choose --name"
        )
    for what in ("stages", "ranks", "replicas"):
        if getattr(spec, what) < 1:
            raise UserError(f"{what} is {getattr(spec, what)}; it is at least 1")
    if spec.replicas > MAX_REPLICAS:
        raise UserError(f"replicas is {spec.replicas}; it is at most {MAX_REPLICAS}")
    if spec.device not in ("auto", "cpu", "cuda"):
        raise UserError(f"device is {spec.device!r}; it is auto, cpu or cuda")
    if spec.cpus is not None and not spec.cpus > 0:
        raise UserError(f"cpus is {spec.cpus}; it is more than 0")
    return spec


def serve_settings(*, spec: DeploymentSpec | None, key: str | None, **flags: Any) -> ServeSettings:
    """What `polytrace serve` was asked for, with the environment where a flag is silent."""
    address = flags.get("address")
    if address is not None and not re.fullmatch(r"auto|\S+:\d{1,5}", address):
        raise UserError(f"--address {address!r} is not that of a Ray cluster: HOST:PORT of its head, or auto")
    flags["store"] = flags.get("store") or from_environment("POLYTRACE_STORE", str, None)
    flags["database"] = flags.get("database") or from_environment("POLYTRACE_DATABASE", str, None)
    flags["objects"] = flags.get("objects") or from_environment("POLYTRACE_OBJECTS", str, None)
    if flags["store"] is None and (flags["database"] is None) != (flags["objects"] is None):
        lacking = "--objects" if flags["objects"] is None else "--database"
        raise UserError(f"a part of what is kept would go with the service's own folder: add {lacking}, or a --store")
    if spec is None and flags["store"] is None and flags["database"] is None:
        raise UserError("there is nothing to serve: name a MODEL, or a --store or --database that has deployments")
    budget = from_environment("POLYTRACE_BUDGET_TOKENS", int, DEFAULT_BUDGET_TOKENS, at_least=16)
    key = key or from_environment("POLYTRACE_KEY", str, None)
    return ServeSettings(spec=spec, key=key, budget_tokens=budget, **flags)


def ray_auth_mode() -> str:
    """How the service's Ray cluster knows its own: by token, unless the user's environment says otherwise."""
    mode = os.environ.get("RAY_AUTH_MODE") or "token"
    if mode not in ("token", "disabled"):
        raise UserError(f"RAY_AUTH_MODE is {mode!r}; it is token or disabled")
    return mode


def is_ray_token_given() -> bool:
    """Whether the user's environment names a token for Ray, which then holds for an own cluster too."""
    return any(os.environ.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))


_KINDS: dict[Any, str] = {int: "an integer", float: "a number"}
