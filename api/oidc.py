"""Tokens of an institution's identity provider (OpenID Connect): signed JWTs that say who somebody is.

A token is taken when the provider's published key verifies its signature, by an asymmetric algorithm, and issuer,
audience and times are right. Which claims are tenant, user and role are settings. The provider is asked for its keys
when there are none, when they are LIFE_S old, and when a token names one that is not among them, but at most every
`cooldown_s`, whatever tokens come and whether it answers or not. While it is away the keys that it gave hold for
MAX_AGE_S.

Signatures, times and formats are PyJWT's business (RFC 7515, 7517, 7519; OpenID Connect Discovery 1.0).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx
import jwt
from anyio import to_thread
from jwt import PyJWK, PyJWKClient

from api.identity import checked_name
from api.settings import OidcSettings, is_loopback
from polytrace.errors import CapacityError, KeyRefusedError, UserError

# never `none` and never HS...: with these, who has the provider's public key could sign
ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA")
LIFE_S = 3600.0  # of the provider's keys, before they are asked for again
MAX_AGE_S = 24 * 3600.0  # how long they hold when it does not answer
LEEWAY_S = 30.0  # that clocks may differ by
TIMEOUT_S = 5.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Vouched:
    """Whom the provider vouches for."""

    tenant: str
    user: str
    is_operator: bool
    expires: float  # seconds since the epoch


class Provider:
    """One identity provider. Belongs to one event loop; nothing is asked before the first token comes."""

    def __init__(self, settings: OidcSettings) -> None:
        self._settings = settings
        self._keys: dict[str, PyJWK] = {}  # by their ids
        self._fetched = self._tried = -float("inf")  # monotonic
        self._fetch: asyncio.Task[None] | None = None

    async def vouch(self, token: str) -> Vouched:
        """Whom a token is for. Raises KeyRefusedError, CapacityError when the provider's keys cannot be had."""
        try:
            header = jwt.get_unverified_header(token)
        except jwt.InvalidTokenError as error:
            raise _refused(f"it cannot be read: {error}") from error
        algorithm, key_id = header.get("alg"), header.get("kid")
        if algorithm not in ALGORITHMS:
            raise _refused(f"it is signed by {str(algorithm)[:20]!r}; {', '.join(ALGORITHMS)} are taken")
        if not isinstance(key_id, str):
            raise _refused("it does not say by which key it is signed (kid)")
        return self._vouched(self._claims(token, await self._key(key_id)))

    async def _key(self, key_id: str) -> PyJWK:
        age_s = time.monotonic() - self._fetched
        if key_id not in self._keys or age_s > MAX_AGE_S:
            await self._ask()
        elif age_s > LIFE_S:
            self._begin_to_ask()  # what is here holds meanwhile
        if time.monotonic() - self._fetched > MAX_AGE_S:
            raise CapacityError(
                f"the identity provider {self._settings.issuer} does not give its keys; try again later"
            )
        if key_id not in self._keys:
            raise _refused("its key is none of the provider's")
        return self._keys[key_id]

    def _claims(self, token: str, key: PyJWK) -> Mapping[str, Any]:
        own = self._settings
        try:
            return jwt.decode(
                token,
                key.key,  # not the JWK: where that names no algorithm PyJWT would think of one
                algorithms=ALGORITHMS,
                audience=own.audience,
                issuer=own.issuer,
                leeway=LEEWAY_S,
                options={"require": ["exp", "iss", "aud"]},
            )
        except jwt.ExpiredSignatureError as error:
            raise _refused("it has expired: sign in again") from error
        except jwt.InvalidAudienceError as error:
            raise _refused(f"it is not for this service, whose audience is {own.audience}") from error
        except jwt.InvalidIssuerError as error:
            raise _refused(f"it is not by {own.issuer}") from error
        except (jwt.PyJWTError, ValueError, TypeError) as error:
            raise _refused(str(error)) from error

    def _vouched(self, claims: Mapping[str, Any]) -> Vouched:
        own = self._settings
        tenant = own.tenant if own.tenant_claim is None else _name(claims, own.tenant_claim, "tenant")
        roles = [] if own.role_claim is None else claim_of(claims, own.role_claim)
        roles = roles if isinstance(roles, list) else [roles]
        return Vouched(
            tenant=tenant,
            user=_name(claims, own.user_claim, "user"),
            is_operator=own.operator_role in roles,
            expires=float(claims["exp"]) + LEEWAY_S,
        )

    # --- the provider's keys

    async def _ask(self) -> None:
        """Asks the provider, unless that was just done; everybody waits for one answer."""
        self._begin_to_ask()
        if self._fetch is not None:
            await asyncio.shield(self._fetch)

    def _begin_to_ask(self) -> None:
        if self._fetch is None and time.monotonic() - self._tried >= self._settings.cooldown_s:
            self._tried = time.monotonic()
            self._fetch = asyncio.get_running_loop().create_task(self._take_in())

    async def _take_in(self) -> None:
        try:
            self._keys = await to_thread.run_sync(_published_keys, self._settings)
            self._fetched = time.monotonic()
        except Exception as error:  # noqa: BLE001  whatever another one's server does: the keys that are here hold
            _log.warning("the identity provider %s did not give its keys: %s", self._settings.issuer, error)
        finally:
            self._fetch = None


def claim_of(claims: Mapping[str, Any], name: str) -> Any:
    """A claim by its name, or by a path with dots into claims that are objects; None when there is none."""
    if name in claims:
        return claims[name]
    found: Any = claims
    for part in name.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def _name(claims: Mapping[str, Any], claim: str, what: str) -> str:
    value = claim_of(claims, claim)
    if not isinstance(value, str):
        raise _refused(f"its claim {claim!r}, which is the {what} here, is missing or no text")
    try:
        return checked_name(value, what)
    except UserError as error:
        raise _refused(f"its claim {claim!r}: {error.message}") from error


def _published_keys(settings: OidcSettings) -> dict[str, PyJWK]:
    """Those that may sign, by their ids. Raises whatever the network and the provider do wrong."""
    url = settings.jwks_url or _discovered(settings.issuer)
    _check_url(url)
    found = PyJWKClient(url, cache_jwk_set=False, timeout=TIMEOUT_S).get_jwk_set()
    return {
        key.key_id: key
        for key in found.keys
        if key.key_id and key.public_key_use in ("sig", None) and key.algorithm_name in ALGORITHMS
    }


def _discovered(issuer: str) -> str:
    """Where the provider says that its keys are."""
    _check_url(issuer)
    url = f"{issuer.rstrip('/')}/.well-known/openid-configuration"
    about = httpx.get(url, timeout=TIMEOUT_S, follow_redirects=False).raise_for_status().json()
    if about["issuer"] != issuer:
        raise ValueError(f"it calls itself {about['issuer']!r}")
    return str(about["jwks_uri"])


def _check_url(url: str) -> None:
    """Keys that came unprotected over a network could be anybody's."""
    parts = urlsplit(url)
    if parts.scheme != "https" and not (parts.scheme == "http" and is_loopback(parts.hostname or "")):
        raise ValueError(f"{url} is not https")


def _refused(why: str) -> KeyRefusedError:
    return KeyRefusedError(f"the token is refused: {why}")
