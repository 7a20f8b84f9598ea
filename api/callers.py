"""Who calls, as the routes ask: what `api.access` found of the key, before anything of a call was read."""

from __future__ import annotations

from fastapi import Request

from api.identity import Identity, Role, checked_name, owner_name
from polytrace.errors import ForbiddenError, NotFoundError

_FIGURES = ("/metrics", "/v1/models", "/v1/usage", "/v1/whoami", "/v1/drain")  # what monitors may GET


def caller_of(request: Request) -> Identity:
    """Who calls."""
    caller: Identity = request.state.caller
    return caller


def owner_of(request: Request) -> str:
    """Whose everything is that a call leaves; it can use nobody else's.

    Operators may read and delete what is another's: `?owner=TENANT/USER`. Raises NotFoundError for others who try.
    """
    caller = caller_of(request)
    named = request.query_params.get("owner")
    if named is None or request.method not in ("GET", "HEAD", "DELETE"):
        return caller.owner
    tenant, _, user = named.partition("/")
    owner = owner_name(checked_name(tenant, "tenant"), checked_name(user, "user"))
    if owner != caller.owner and not caller.is_operator:
        raise NotFoundError(f"there is no {named[:100]!r} here whose things you could see")
    return owner


def check_role(caller: Identity, method: str, path: str) -> None:
    """Raises ForbiddenError when a monitor calls for anything but figures."""
    if caller.role is Role.MONITOR and (method != "GET" or path not in _FIGURES):
        raise ForbiddenError(f"{caller} is a monitor, which may read {', '.join(_FIGURES)} and do nothing else")


def figures_reader_of(request: Request) -> Identity:
    """Who calls, an operator or a monitor. Raises ForbiddenError for others."""
    caller = caller_of(request)
    if not caller.sees_figures:
        raise ForbiddenError(
            f"this is for operators and monitors; {caller} is a {caller.role.value}: ask your operators"
        )
    return caller


def operator_of(request: Request) -> Identity:
    """Who calls, an operator. Raises ForbiddenError for others."""
    caller = caller_of(request)
    if not caller.is_operator:
        raise ForbiddenError(f"this is for operators; {caller} is a {caller.role.value}: ask your operators")
    return caller
