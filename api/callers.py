"""Who calls, as the routes ask: what `api.gateway` found of the key, before anything of a call was read."""

from __future__ import annotations

from fastapi import Request

from api.identity import Identity


def caller_of(request: Request) -> Identity:
    """Who calls."""
    caller: Identity = request.state.caller
    return caller


def owner_of(request: Request) -> str:
    """Whose everything is that a call leaves; it can use nobody else's."""
    return caller_of(request).owner
