"""Submits that come again: the same key with the same bytes is the same request, however often it is sent.

A client that heard no answer cannot know whether its request was accepted. With `Idempotency-Key` it sends it again:
what was accepted is then answered for as if the first answer had come late. A key is its owner's, and is kept as long
as the state of its request.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from starlette.requests import Request

from api.database import Transaction
from api.uploads import Pace
from polytrace.errors import ConflictError, UserError
from scheduling.plan import RequestId

HEADER = "Idempotency-Key"
GRACE_S = 30.0  # for a caller whose connection broke to send its submit again
MAX_TAKEN_BACK = 1000
_READ_BYTES = 4 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Submit:
    """What makes a submit the same one: its key, and a digest of what it says."""

    key: str
    digest: str  # begins with the number of bytes


class AcceptedBeforeError(Exception):
    """This submit has been accepted already, as `request`. Between the store and the gateway alone."""

    def __init__(self, request: RequestId) -> None:
        super().__init__(request)
        self.request = request


def key_of(request: Request) -> str | None:
    """The call's key. Raises UserError for one that cannot be."""
    key = request.headers.get(HEADER)
    if key is not None and not re.fullmatch(r"[!-~]{1,128}", key):
        raise UserError(f"{HEADER} has 1 to 128 visible characters of ASCII; this one has {len(key)}, or others")
    return key


def submit_of_file(key: str, model: str, path: Path) -> Submit:
    """The submit that was received into a file."""
    digest = _begun(model)
    num_bytes = 0
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_READ_BYTES):
            num_bytes += len(chunk)
            digest.update(chunk)
    return Submit(key=key, digest=f"{num_bytes}-{digest.hexdigest()}")


def submit_of_body(key: str, route: str, body: bytes) -> Submit:
    """The submit that is the whole body of a call of a route."""
    digest = _begun(route)
    digest.update(body)
    return Submit(key=key, digest=f"{len(body)}-{digest.hexdigest()}")


def check_equal(known: Submit, again: Submit) -> None:
    """Raises ConflictError when a key came with something else than before."""
    if known.digest != again.digest:
        raise _other(again.key)


async def check_same(known: Submit, model: str, request: Request, *, idle_s: float) -> None:
    """Reads the call's body and keeps nothing of it. Raises ConflictError when it is not what was accepted."""
    expected = int(known.digest.partition("-")[0])
    digest = _begun(model)
    pace = Pace(idle_s)
    chunks = aiter(request.stream())
    while True:
        chunk = await pace.next(anext(chunks, None))
        num_bytes = pace.came(len(chunk or b""))
        if num_bytes > expected:
            raise _other(known.key)
        if chunk is None:
            break
        digest.update(chunk)
    if known.digest != f"{num_bytes}-{digest.hexdigest()}":
        raise _other(known.key)


def check_new(db: Transaction, owner: str, submit: Submit) -> None:
    """Inside the transaction that accepts it. Raises AcceptedBeforeError, or ConflictError for other bytes."""
    row = db.execute(
        "SELECT request, digest FROM idempotency WHERE owner = ? AND key = ?", (owner, submit.key)
    ).fetchone()
    if row is None:
        return
    if row[1] != submit.digest:
        raise _other(submit.key)
    raise AcceptedBeforeError(RequestId(row[0]))


def note(db: Transaction, owner: str, submit: Submit, request: RequestId) -> None:
    """The submit has been accepted as this request."""
    db.execute(
        "INSERT INTO idempotency (owner, key, request, digest) VALUES (?, ?, ?, ?)",
        (owner, submit.key, request, submit.digest),
    )


class Returning:
    """Callers who wait with a key: when the last one's connection breaks he has GRACE_S to come back, and only then is
    his request cancelled. Belongs to one event loop.
    """

    def __init__(self, cancel: Callable[[RequestId], None]) -> None:
        self._cancel = cancel
        self._waiting: Counter[RequestId] = Counter()
        self._leaving: dict[RequestId, asyncio.TimerHandle] = {}
        self._taken_back: set[tuple[str, str]] = set()

    def come(self, request: RequestId) -> None:
        """Somebody waits for it, again or for the first time."""
        self._waiting[request] += 1
        if (timer := self._leaving.pop(request, None)) is not None:
            timer.cancel()

    def go(self, request: RequestId, *, has_heard: bool) -> None:
        """He waits no more: he has had an answer, or nobody hears it."""
        self._waiting[request] -= 1
        if self._waiting[request]:
            return
        del self._waiting[request]
        if not has_heard:
            self._leaving[request] = asyncio.get_running_loop().call_later(GRACE_S, self._give_up, request)

    def take_back(self, owner: str, key: str) -> None:
        """Its sender is gone for good: what is accepted by it after this is to be cancelled."""
        if len(self._taken_back) >= MAX_TAKEN_BACK:
            self._taken_back.clear()
        self._taken_back.add((owner, key))

    def is_taken_back(self, owner: str, key: str) -> bool:
        return (owner, key) in self._taken_back

    def _give_up(self, request: RequestId) -> None:
        del self._leaving[request]
        self._cancel(request)


def _begun(model: str) -> hashlib._Hash:
    return hashlib.sha256(model.encode() + b"\0")


def _other(key: str) -> ConflictError:
    return ConflictError(f"{HEADER} {key!r} was sent with another request before: choose a new key for a new request")
