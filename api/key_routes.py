"""The routes of keys: who am I, and one's own keys; operators have everyone's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

from anyio import to_thread
from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request

from api.callers import caller_of
from api.identity import Identity, Role
from api.keys import MAX_LABEL, Key, Keys, unknown_key
from polytrace.codec import to_json
from polytrace.errors import ForbiddenError

MAX_LIFE_S = 100 * 365 * 24 * 3600.0
Life = Annotated[float, Field(gt=0, le=MAX_LIFE_S)]


class KeyRoutes:
    """`changed` is called when keys were made or revoked; `ttl_s` is the longest life of what users make."""

    def __init__(self, keys: Keys, changed: Callable[[], None], ttl_s: float | None = None) -> None:
        self._keys = keys
        self._changed = changed
        self._ttl_s = ttl_s

    def add_to(self, router: APIRouter) -> None:
        router.add_api_route("/whoami", self.whoami)
        router.add_api_route("/keys", self.known)
        router.add_api_route("/keys", self.make, methods=["POST"], status_code=201)
        router.add_api_route("/keys/{prefix}", self.revoke, methods=["DELETE"])
        router.add_api_route("/keys/{prefix}/rotate", self.rotate, methods=["POST"], status_code=201)

    async def whoami(self, request: Request) -> dict[str, Any]:
        """Who the caller is here."""
        caller = caller_of(request)
        return {
            "tenant": caller.tenant,
            "user": caller.user,
            "role": caller.role.value,
            "key": caller.key,
            "models": None if caller.models is None or caller.sees_figures else sorted(caller.models),
        }

    async def known(self, request: Request, tenant: str | None = None, user: str | None = None) -> dict[str, Any]:
        """The caller's keys, without their secrets; of operators, all keys, or those of a tenant or user."""
        caller = caller_of(request)
        if not caller.is_operator:
            _check_own(caller, tenant, user)
            tenant, user = caller.tenant, caller.user
        keys = await to_thread.run_sync(partial(self._keys.known, tenant=tenant, user=user))
        return {"keys": [_plain(key) for key in keys]}

    async def make(self, wish: NewKey, request: Request) -> dict[str, Any]:
        """A new key, for the caller or, by an operator, for anybody. `secret` is told only here."""
        caller = caller_of(request)
        if not caller.is_operator:
            _check_own(caller, wish.tenant, wish.user)
            if wish.role not in (None, caller.role):
                raise ForbiddenError(f"only an operator makes keys of an {wish.role.value}: ask your operators")
        make = partial(
            self._keys.make,
            wish.tenant or caller.tenant,
            wish.user or caller.user,
            caller,
            label=wish.label,
            expires=self._end(caller, wish.expires_in_s),
            role=wish.role if caller.is_operator else None,
        )
        return await self._told(make)

    async def revoke(self, prefix: str, request: Request) -> dict[str, Any]:
        """Refuses a key from now on."""
        caller = caller_of(request)
        await self._find(prefix, caller)
        key = await to_thread.run_sync(self._keys.revoke, prefix, caller)
        self._changed()
        return _plain(key)

    async def rotate(
        self, prefix: str, request: Request, grace_s: Annotated[float, Query(ge=0, le=MAX_LIFE_S)] = 0.0
    ) -> dict[str, Any]:
        """A new key in the place of one, which is refused from now on or once the seconds are over."""
        caller = caller_of(request)
        await self._find(prefix, caller)
        return await self._told(partial(self._keys.rotate, prefix, caller, grace_s=grace_s))

    # --- inside

    async def _told(self, make: Callable[[], tuple[Key, str]]) -> dict[str, Any]:
        key, secret = await to_thread.run_sync(make)
        self._changed()
        return _plain(key) | {"secret": secret}

    async def _find(self, prefix: str, caller: Identity) -> None:
        """Raises NotFoundError, also for another's."""
        key = await to_thread.run_sync(self._keys.get, prefix)
        if not caller.is_operator and (key.tenant, key.user) != (caller.tenant, caller.user):
            raise unknown_key(prefix)

    def _end(self, caller: Identity, life_s: float | None) -> float | None:
        if self._ttl_s is not None and not caller.is_operator:
            life_s = self._ttl_s if life_s is None else min(life_s, self._ttl_s)
        return None if life_s is None else self._keys.now() + life_s


class NewKey(BaseModel):
    """Whose it is to be, by default the caller's, and how long."""

    model_config = ConfigDict(extra="forbid")

    tenant: str | None = None
    user: str | None = None
    role: Role | None = None  # of the user
    label: Annotated[str, Field(max_length=MAX_LABEL)] = ""
    expires_in_s: Annotated[Life, Field(strict=True)] | None = None


def _check_own(caller: Identity, tenant: str | None, user: str | None) -> None:
    if tenant not in (None, caller.tenant) or user not in (None, caller.user):
        raise ForbiddenError(f"{caller} has its own keys only; those of others are for operators")


def _plain(key: Key) -> dict[str, Any]:
    return dict(to_json(key))
