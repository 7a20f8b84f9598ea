"""The service's settings: one dataclass a component, made once at the edge of a process.

Owns the environment variables that the service reads, all of them, and what their values may be. A flag of the
command line is stronger than a variable, a variable stronger than the default here.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from api.device_map_files import read_device_map
from api.identity import checked_name
from api.limits import UNLIMITED, TenantLimits, limits_from_text
from cluster.config import DeploymentSpec
from cluster.mapped_gpus import check_mapped
from polytrace.device_maps import checked_device_map
from polytrace.errors import UserError
from scheduling.policy import BUDGET_TOKENS

T = TypeVar("T")

DEFAULT_RESULT_TTL_S = 7 * 24 * 3600.0
DEFAULT_DRAIN_S = 30.0
DEFAULT_QUOTA_BYTES = 16 << 30  # of one owner's constants, kept values and states
MAX_REPLICAS = 64  # of one deployment: all their loops share the controller's process

# variable -> what it sets. Those of RAY_AUTH are Ray's own: where the user's environment says nothing, the service sets
# the mode to "token", and for a cluster that it starts itself makes the token too.
VARIABLES: Mapping[str, str] = {
    "POLYTRACE_KEY": "an operator's key of the tenant default, beside those of the store",
    "POLYTRACE_KEY_TTL_S": "longest life of keys that users make for themselves, in seconds; default: no end",
    "POLYTRACE_OIDC_ISSUER": "identity provider whose tokens are taken beside keys, as `iss` names it",
    "POLYTRACE_OIDC_AUDIENCE": "this service's name at the provider: what a token's `aud` has",
    "POLYTRACE_OIDC_JWKS_URL": "where the provider's keys are; default: where its discovery document says",
    "POLYTRACE_OIDC_USER_CLAIM": "claim that is the user's name; default: sub",
    "POLYTRACE_OIDC_TENANT_CLAIM": "claim that is the tenant's name; default: all are of POLYTRACE_OIDC_TENANT",
    "POLYTRACE_OIDC_TENANT": "tenant of all who come with a token; default: default",
    "POLYTRACE_OIDC_ROLE_CLAIM": "claim, a text or a list, that makes operators; default: none does",
    "POLYTRACE_OIDC_OPERATOR_ROLE": "what that claim has for an operator; default: polytrace-operator",
    "POLYTRACE_STORE": "folder for requests and results",
    "POLYTRACE_DATABASE": "postgresql://... in the place of a SQLite file in the store's folder",
    "POLYTRACE_OBJECTS": "s3://BUCKET/PREFIX, or another URL of fsspec's, for what is to outlive the store's folder",
    "POLYTRACE_CHECKERS": "processes that check requests before they are accepted",
    "POLYTRACE_MAX_WAIT_S": "longest time that one call may wait for a result",
    "POLYTRACE_MAX_OPEN": "unfinished requests that one deployment takes before it answers 503",
    "POLYTRACE_MAX_OPEN_OF_TENANT": "... and so many of one tenant, so that nobody fills a queue alone",
    "POLYTRACE_LIMITS": "limits of tenants that have none of their own, as JSON of api.limits.TenantLimits",
    "POLYTRACE_MAX_TEXT_CHARS": "characters of one prompt on OpenAI's routes; default: 32 a token of the context",
    "POLYTRACE_QUOTA_BYTES": "bytes of constants, kept values and states that one owner may have on the service",
    "POLYTRACE_RESULT_TTL_S": "seconds that a result and its events are kept after the request has ended",
    "POLYTRACE_DRAIN_SECONDS": "longest time that a service which is told to stop finishes what it has accepted",
    "POLYTRACE_UPLOAD_IDLE_S": "silence after which an upload is given up",
    "POLYTRACE_UPLOAD_BYTES": "bytes that requests may hold which arrive or are checked",
    "POLYTRACE_UPLOAD_BYTES_OF_TENANT": "... and those of one tenant",
    "POLYTRACE_MAX_CONNECTIONS": "connections that may be open at once; who waits longest makes room for the next",
    "POLYTRACE_WEIGHTS": "folder of a node for models that come from URLs; default: ~/.cache/polytrace/weights",
    "POLYTRACE_BUDGET_TOKENS": "most rows in one merged pass",
    "OTEL_EXPORTER_OTLP_ENDPOINT": "an OpenTelemetry collector that gets a trace of each request: http://HOST:4318",
    "POLYTRACE_LOG_FORMAT": "text or json: lines of the logs of the gateway and the controller",
    "POLYTRACE_LOG_LEVEL": "debug, info, warning or error; default: warning, of JSON info",
    "RAY_AUTH_MODE": "`token` (what the service sets) or `disabled` (only for a test cluster on one machine)",
    "RAY_AUTH_TOKEN_PATH": "file with the Ray cluster's token; needed with --address, else the service makes one",
    "RAY_AUTH_TOKEN": "the Ray cluster's token itself",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class OidcSettings:
    """An identity provider (`api.oidc`)."""

    issuer: str
    audience: str
    jwks_url: str | None = None
    user_claim: str = "sub"
    tenant_claim: str | None = None  # None: everybody is of `tenant`
    tenant: str = "default"
    role_claim: str | None = None
    operator_role: str = "polytrace-operator"
    cooldown_s: float = 10.0  # between two askings for the provider's keys


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewaySettings:
    """What the gateway needs beside its listening socket. The key travels apart from it: in the environment."""

    store: str
    checkers: int = 1
    max_wait_s: float = 60.0
    max_open: int = 4096
    max_open_of_tenant: int = 2048
    limits: TenantLimits = UNLIMITED  # of tenants that have none of their own
    upload_idle_s: float = 60.0
    upload_bytes: int = 16 << 30
    upload_bytes_of_tenant: int = 4 << 30
    max_connections: int = 4096
    head_s: float = 20.0  # until a request line and its headers are there
    read_idle_s: float = 60.0  # in which a caller takes some of what he asked for (`api.connections`)
    quota_bytes: int = DEFAULT_QUOTA_BYTES
    result_ttl_s: float = DEFAULT_RESULT_TTL_S
    max_text_chars: int | None = None  # None: by the model's context
    shutdown_s: float = 5.0  # for answers under way when the gateway is told to stop
    asks_key: bool = False  # also when no key was given to the gateway itself; the store has some
    key_ttl_s: float | None = None  # longest life of what users make; None: no end
    oidc: OidcSettings | None = None


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
    asks_key: bool = True  # False: whoever reaches it is an operator
    takes_jobs: bool = False  # its own Ray cluster has a job server
    drain_s: float = DEFAULT_DRAIN_S  # longest time to finish what was accepted, when it is told to stop
    budget_tokens: int = BUDGET_TOKENS


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


def gateway_settings(store: str, *, asks_key: bool = True) -> GatewaySettings:
    """The gateway's settings from the environment."""
    default = GatewaySettings(store=store)
    return GatewaySettings(
        store=store,
        checkers=from_environment("POLYTRACE_CHECKERS", int, default.checkers, at_least=1),
        max_wait_s=from_environment("POLYTRACE_MAX_WAIT_S", float, default.max_wait_s, at_least=0),
        max_open=from_environment("POLYTRACE_MAX_OPEN", int, default.max_open, at_least=1),
        max_open_of_tenant=from_environment(
            "POLYTRACE_MAX_OPEN_OF_TENANT", int, default.max_open_of_tenant, at_least=1
        ),
        limits=limits_from_text(from_environment("POLYTRACE_LIMITS", str, None), "POLYTRACE_LIMITS"),
        upload_idle_s=from_environment("POLYTRACE_UPLOAD_IDLE_S", float, default.upload_idle_s, at_least=1),
        upload_bytes=from_environment("POLYTRACE_UPLOAD_BYTES", int, default.upload_bytes, at_least=1),
        upload_bytes_of_tenant=from_environment(
            "POLYTRACE_UPLOAD_BYTES_OF_TENANT", int, default.upload_bytes_of_tenant, at_least=1
        ),
        max_connections=from_environment("POLYTRACE_MAX_CONNECTIONS", int, default.max_connections, at_least=16),
        quota_bytes=quota_bytes(),
        max_text_chars=from_environment("POLYTRACE_MAX_TEXT_CHARS", int, default.max_text_chars, at_least=1),
        result_ttl_s=from_environment("POLYTRACE_RESULT_TTL_S", float, default.result_ttl_s, at_least=60),
        shutdown_s=default.shutdown_s,
        asks_key=asks_key,
        key_ttl_s=from_environment("POLYTRACE_KEY_TTL_S", float, None, at_least=60),
        oidc=oidc_settings(),
    )


def oidc_settings() -> OidcSettings | None:
    """The identity provider of the environment, None when it names none. UserError when half of it is there."""

    def text(name: str) -> str | None:
        value: str | None = from_environment(f"POLYTRACE_OIDC_{name}", str, None)
        return value

    issuer, audience = text("ISSUER"), text("AUDIENCE")
    if issuer is None and audience is None:
        return None
    if issuer is None or audience is None:
        raise UserError("POLYTRACE_OIDC_ISSUER and POLYTRACE_OIDC_AUDIENCE are needed together")
    for url in (issuer, text("JWKS_URL") or issuer):
        parts = urlsplit(url)
        if parts.scheme != "https" and not (parts.scheme == "http" and is_loopback(parts.hostname or "")):
            raise UserError(f"{url} is not https: whoever sits on the way could let anybody in")
    default = OidcSettings(issuer=issuer, audience=audience)
    return OidcSettings(
        issuer=issuer,
        audience=audience,
        jwks_url=text("JWKS_URL"),
        user_claim=text("USER_CLAIM") or default.user_claim,
        tenant_claim=text("TENANT_CLAIM"),
        tenant=checked_name(text("TENANT") or default.tenant, "tenant"),
        role_claim=text("ROLE_CLAIM"),
        operator_role=text("OPERATOR_ROLE") or default.operator_role,
    )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def quota_bytes() -> int:
    """What one owner may have on the service."""
    return from_environment("POLYTRACE_QUOTA_BYTES", int, DEFAULT_QUOTA_BYTES, at_least=1)


def deployment_spec(
    *,
    source: str,
    name: str | None = None,
    device_map: str | None = None,
    kept: Mapping[str, Any] = {},
    **flags: Any,
) -> DeploymentSpec:
    """A deployment as a command line asks for it: a folder by its full path, a name of its own or the model's, a device
    map by its name or in a file. `kept` are fields that stay as they are, whatever else is said.
    """
    source, name = source_and_name(source, name)
    places = None if device_map is None else read_device_map(device_map)
    wish = DeploymentSpec(source=source, name=name, device_map=places, **flags)
    return checked_spec(replace(wish, **kept))


def source_and_name(source: str, name: str | None) -> tuple[str, str]:
    """What is to be served, a folder by its full path, and under which name, when none is said."""
    if os.path.isdir(source):  # no error where this user may not look
        source = str(Path(source).resolve())
        return source, name or Path(source).name
    return source, name or source.rpartition("/")[2]


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
    if spec.offload_bytes < 0:
        raise UserError(f"offload_bytes is {spec.offload_bytes}; it is at least 0")
    if spec.device_map is not None:
        if not spec.whole:
            raise UserError("a device map is of a model that is called as it is: leave it out, or --packed")
        spec = replace(spec, device_map=checked_device_map(spec.device_map))
    check_mapped(
        spec.device_map,
        device=spec.device,
        gpus=spec.gpus,
        stages=spec.stages,
        ranks=spec.ranks,
        offload_bytes=spec.offload_bytes,
    )
    return spec


def serve_settings(*, spec: DeploymentSpec | None, key: str | None, **flags: Any) -> ServeSettings:
    """What `polytrace serve` was asked for, with the environment where a flag is silent."""
    address = flags.get("address")
    if address is not None and not re.fullmatch(r"auto|\S+:\d{1,5}", address):
        raise UserError(f"--address {address!r} is not that of a Ray cluster: HOST:PORT of its head, or auto")
    if flags.get("takes_jobs"):
        if address is not None:
            raise UserError(f"--jobs is for a cluster of the service's own; {address} has its job server or has none")
        if find_spec("aiohttp_cors") is None or find_spec("opencensus") is None:
            raise UserError("--jobs needs Ray's job server, which ray alone lacks: pip install 'ray[default]'")
    flags["store"] = flags.get("store") or from_environment("POLYTRACE_STORE", str, None)
    flags["database"] = flags.get("database") or from_environment("POLYTRACE_DATABASE", str, None)
    flags["objects"] = flags.get("objects") or from_environment("POLYTRACE_OBJECTS", str, None)
    if flags["store"] is None and (flags["database"] is None) != (flags["objects"] is None):
        lacking = "--objects" if flags["objects"] is None else "--database"
        raise UserError(f"a part of what is kept would go with the service's own folder: add {lacking}, or a --store")
    if spec is None and flags["store"] is None and flags["database"] is None:
        raise UserError("there is nothing to serve: name a MODEL, or a --store or --database that has deployments")
    if flags.get("drain_s") is None:
        flags["drain_s"] = from_environment("POLYTRACE_DRAIN_SECONDS", float, DEFAULT_DRAIN_S, at_least=0)
    budget = from_environment("POLYTRACE_BUDGET_TOKENS", int, BUDGET_TOKENS, at_least=16)
    key = key or from_environment("POLYTRACE_KEY", str, None)
    if not flags.get("asks_key", True):
        if not is_loopback(flags.get("host", "127.0.0.1")):
            raise UserError(f"--without-keys lets in whoever reaches {flags['host']}: leave out the one or the other")
        key = None
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
