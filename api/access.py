"""Who may come in: a call's bearer is the service's own key, a key of the store, or a token of an identity provider.

Owns the memory of who was let in lately. Within KNOWN_S a bearer costs one hash and one look into a table; then the
store is asked again, so what is revoked, disabled or changed there by whomever is so everywhere within a second. What
this gateway changes itself is so at once (`forget`). Nothing here keeps a bearer: the memory has their hashes.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import time
from dataclasses import dataclass

from anyio import to_thread

from api.identity import LOCAL, Identity, Role
from api.keys import Keys
from api.oidc import Provider, Vouched
from api.tenants import Tenants
from polytrace.errors import KeyRefusedError

KNOWN_S = 0.75
MAX_KNOWN = 10_000
MAX_BEARER = 16 << 10  # characters: tokens with many claims are long
NOTE_S = 10.0  # between two writings of when keys were used

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Known:
    identity: Identity
    until: float  # monotonic


class Access:
    """Belongs to one event loop."""

    def __init__(
        self, keys: Keys, tenants: Tenants, *, own_key: str | None, asks: bool, provider: Provider | None = None
    ) -> None:
        """`own_key`: an operator's of the tenant default; but one of the store's is what the store says.

        Unless it `asks`, or there is such a key or a provider, all may come in without a key, as LOCAL.
        """
        self._keys = keys
        self._tenants = tenants
        is_own = own_key is not None and not keys.has(own_key)
        self._own = hashlib.sha256(own_key.encode()).digest() if own_key is not None and is_own else None
        self._provider = provider
        self._is_open = not asks and own_key is None and provider is None
        self._known: dict[bytes, _Known] = {}
        self._used: dict[str, float] = {}

    async def identify(self, authorization: str) -> Identity:
        """Who calls, by the header's text. Raises KeyRefusedError, CapacityError when the provider is away."""
        if self._is_open:
            return LOCAL
        scheme, _, bearer = authorization.partition(" ")
        bearer = bearer.strip()
        if scheme.lower() != "bearer" or not bearer:
            raise KeyRefusedError(
                "this service needs a key: `Authorization: Bearer KEY`, or POLYTRACE_KEY in the client's environment "
                "(a Ray job's: `env_vars` of its runtime environment)"
            )
        if len(bearer) > MAX_BEARER:
            raise KeyRefusedError(
                f"the key has {len(bearer)} characters; no key and no token has more than {MAX_BEARER}"
            )
        digest = hashlib.sha256(bearer.encode(errors="surrogateescape")).digest()
        if self._own is not None and hmac.compare_digest(digest, self._own):
            return LOCAL
        known = self._known.get(digest)
        if known is None or known.until < time.monotonic():
            memory = self._known  # another one, if something changes meanwhile: then this is not remembered
            known = await self._look_up(bearer)
            if len(memory) >= MAX_KNOWN:
                memory.clear()
            memory[digest] = known
        if known.identity.key is not None:
            self._used[known.identity.key] = self._keys.now()
        return known.identity

    def forget(self) -> None:
        """Something has changed: everybody is looked up again."""
        self._known = {}

    async def note_forever(self) -> None:
        """Writes down when keys were used, every few seconds."""
        while True:
            await asyncio.sleep(NOTE_S)
            used, self._used = self._used, {}
            try:
                if used:
                    await to_thread.run_sync(self._keys.note_used, used)
            except Exception:  # noqa: BLE001  the edge of the task: a database that is away now may be back later
                _log.exception("when keys were used could not be written down")

    # --- inside

    async def _look_up(self, bearer: str) -> _Known:
        began, now = time.monotonic(), self._keys.now()
        if self._provider is not None and bearer.count(".") == 2:
            vouched = await self._provider.vouch(bearer)
            identity = await to_thread.run_sync(self._taken_in, vouched)
            ends: float | None = vouched.expires
        else:
            holder = await to_thread.run_sync(self._keys.find, bearer)
            identity, ends = holder.identity, holder.expires
        lives_s = KNOWN_S if ends is None else min(KNOWN_S, ends - now)
        return _Known(identity, began + lives_s)

    def _taken_in(self, vouched: Vouched) -> Identity:
        """Who somebody of the provider's is here. The tenant must be known; a user need not be."""
        tenant, user = self._tenants.standing(vouched.tenant, vouched.user)
        if tenant is None:
            raise KeyRefusedError(f"this service has no tenant {vouched.tenant}: ask its operators to add it")
        if tenant.is_disabled or (user is not None and user.is_disabled):
            who = tenant.name if tenant.is_disabled else f"{vouched.tenant}/{vouched.user}"
            raise KeyRefusedError(f"{who} is disabled on this service: ask your operators")
        role = Role.USER if user is None else user.role
        return Identity(
            tenant=vouched.tenant,
            user=vouched.user,
            role=Role.OPERATOR if vouched.is_operator else role,
            models=None if tenant.models is None else frozenset(tenant.models),
        )
