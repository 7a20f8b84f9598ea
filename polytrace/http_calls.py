"""Calls of a service: a client with its key, bodies sent and read in pieces, and the errors that answers tell of.

Knows no routes (`http_backend`, `http_keeper`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx

from polytrace import environment
from polytrace.errors import CapacityError, KeyRefusedError, PolytraceError, ServiceError, from_fields
from polytrace.retrying import PATIENCE_S, Pauses

T = TypeVar("T")

_SLACK_S = 30.0  # an answer may be this much later than it was asked for
_PART_BYTES = 4 << 20
_NO_TLS = ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "record layer failure")  # what OpenSSL says of plain HTTP


def told_url(url: str | httpx.URL) -> str:
    """For people and logs: without a user's name and password, which a proxy in front of the service may ask for."""
    return re.sub(r"^([a-z]+://)?[^/?#]*@", r"\1", str(url), flags=re.IGNORECASE)


def make_client(url: str, key: str | None) -> httpx.Client:
    """A client of one service. A proxy of the environment is not asked for this machine's own services."""
    host = urlsplit(url).hostname or ""
    is_here = host == "localhost" or host == "::1" or host.startswith("127.")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return httpx.Client(base_url=url, headers=headers, timeout=timeout(0), trust_env=not is_here)


def call(client: httpx.Client, url: str, method: str, path: str, **more: Any) -> httpx.Response:
    """The answer, read whole. Raises the service's own error, or ServiceError when nobody answers."""
    try:
        response = client.request(method, path, **more)
    except httpx.RequestError as error:
        raise unreachable(url, error) from None
    check(response)
    return response


def persistently(
    url: str, attempt: Callable[[], T], *, reached: Callable[[], int] = lambda: 0, patience_s: float = PATIENCE_S
) -> T:
    """What an attempt gives, tried again while nobody answers, or when the service says to come back. `reached`: how
    far attempts have come together; each that got further has patience of its own.

    For calls that may be made twice. Raises the last error when patience is over (`polytrace.retrying`), and at once
    the service's own of any other kind.
    """
    pauses, best = Pauses(patience_s), reached()
    while True:
        try:
            return attempt()
        except httpx.TransportError as error:
            if (now := reached()) > best:
                pauses, best = Pauses(patience_s), now
            away = unreachable(url, error)
            if not pauses.again(why=str(away)):
                raise away from None
        except CapacityError as error:
            if error.retry_after_s is None or not pauses.again(error.retry_after_s, why=str(error)):
                raise


def get_json(client: httpx.Client, url: str, path: str) -> Any:
    """The JSON at a path. Raises as `call` does."""
    return json_of(call(client, url, "GET", path))


def json_of(response: httpx.Response) -> Any:
    """The JSON of an answer. ServiceError when it is none."""
    try:
        return response.json()
    except ValueError as error:
        raise ServiceError(f"{told_url(response.request.url)} does not answer as a polytrace service does") from error


def timeout(wait_s: float) -> httpx.Timeout:
    """For an answer that the service may take so long to give."""
    return httpx.Timeout(_SLACK_S + wait_s, connect=10.0, write=60.0, pool=None)


def pieces(parts: Sequence[bytes | memoryview]) -> Iterator[bytes]:
    """The parts in pieces that a socket likes."""
    for part in parts:
        view = memoryview(part)
        for start in range(0, len(view), _PART_BYTES):
            yield bytes(view[start : start + _PART_BYTES])


def body(response: httpx.Response) -> memoryview:
    """The whole body in memory of its own, which the values then share."""
    size = int(response.headers.get("Content-Length", 0))
    body, end = bytearray(size), 0
    for piece in response.iter_raw():
        body[end : end + len(piece)] = piece
        end += len(piece)
    return memoryview(body)[:end]


def check(response: httpx.Response) -> None:
    """Raises the error that an answer tells of."""
    if response.status_code < 400:
        return
    response.read()
    raise _error(response)


def _error(response: httpx.Response) -> PolytraceError:
    try:
        problem = response.json()
    except ValueError:
        problem = None
    if not isinstance(problem, Mapping) or not isinstance(problem.get("code"), str):
        return ServiceError(
            f"{told_url(response.request.url)} answered {response.status_code} {response.reason_phrase}"
        )
    fields = {"code": problem["code"], "message": str(problem.get("detail") or problem.get("title") or "")}
    where, seconds = problem.get("where"), response.headers.get("Retry-After")
    fields |= {"retry_after_s": seconds} if seconds is not None else {}
    if problem["code"] == KeyRefusedError.code:
        fields["message"] += _about_key(response.request)
    elif response.status_code == 404 and "/v1/v1/" in response.request.url.path:
        fields["message"] += f"; the service's URL ends before /v1: {_base(response.request.url).removesuffix('/v1')}"
    return from_fields(fields | {"where": where} if isinstance(where, str) else fields)


def _about_key(request: httpx.Request) -> str:
    """Which key was refused, where it came from and whom it was shown. Of one that is no service's own nothing is said:
    it may be somebody's password.
    """
    secret = request.headers.get("Authorization", "").removeprefix("Bearer ")
    if not secret:
        return f" ({_base(request.url)})"
    named = f"{secret[:15]}... " if re.match(r"pt_[0-9a-f]{12}_", secret) else ""
    origin = f"from {environment.KEY}" if environment.is_key(secret) else "as it was given"
    return f" (the key {named}{origin}, at {_base(request.url)})"


def _base(url: httpx.URL) -> str:
    """Of a service, from the URL of one of its routes."""
    return told_url(url.copy_with(query=None)).partition("/v1/")[0]


def unreachable(url: str, error: Exception) -> ServiceError:
    """What is raised when nobody answers. To be raised `from None`: what httpx met on its way says nothing more."""
    url, told = told_url(url), str(error) or type(error).__name__
    hint = "is `polytrace serve` running there?"
    if url.startswith("https://") and any(sign in told for sign in _NO_TLS):
        hint = f"that port speaks no TLS: try http://{url.removeprefix('https://')}"
    return ServiceError(f"no answer from {url}: {told}; {hint}")
