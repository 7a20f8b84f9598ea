"""Calls that wait for requests to end or to get further: one look into the store for all when the controller rings."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from typing import TypeAlias

from anyio import to_thread
from starlette.requests import Request

from api.away import AwayError
from api.callers import caller_of
from api.hops import hop
from api.identity import Identity
from api.status import RequestStatus
from api.store import Store
from polytrace.errors import NotFoundError
from scheduling.plan import RequestId

_ID = re.compile(r"[0-9a-f]{32}")
RECHECK_S = 5.0  # looks again without a ring, in case one was lost
AWAY_S = 0.5  # between two looks while the database is away


Expected: TypeAlias = "asyncio.Future[RequestStatus | None]"


class Waiting:
    """Belongs to one event loop; `ring` is called on it."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._futures: dict[RequestId, set[Expected]] = {}
        self._look: asyncio.Task[None] | None = None
        self._rung = False
        self._is_released = False

    async def until_final(
        self,
        request: RequestId,
        timeout_s: float,
        caller: Identity,
        *,
        passes_done: int | None = None,
        known: RequestStatus | None = None,
        expected: Expected | None = None,
    ) -> RequestStatus:
        """The request's status once it has ended, or when the time is over. Raises NotFoundError, also for another's.

        `expected`: since before it was accepted, as which it is `known`, so nothing has been missed. Whoever knows of
        `passes_done` also hears when more are. While the database is away it waits on, and tells what it knew last when
        the time is over; AwayError when it knew nothing.
        """
        if not _ID.fullmatch(request):
            raise no_request(request)
        deadline = asyncio.get_running_loop().time() + timeout_s
        while True:
            future = expected or self.expect(request)  # before looking, so that no ring falls between
            try:
                try:
                    status = known if expected is not None else await hop(self._store.status, request)
                    expected = None
                    if status is None or not may_see(caller, status):
                        raise no_request(request)
                except AwayError:
                    if known is None:
                        raise
                    status = known
                    await asyncio.sleep(AWAY_S)
                known = status
                left = deadline - asyncio.get_running_loop().time()
                if _is_news(status, passes_done) or left <= 0 or self._is_released:
                    return status
                await asyncio.wait([future], timeout=min(left, RECHECK_S))
                if future.done() and (told := future.result()) is not None and _is_news(told, passes_done):
                    return told
            finally:
                self.give_up(request, future)

    def expect(self, request: RequestId) -> Expected:
        """Word of a request that has not been accepted yet; `until_final` takes it, or else `give_up`."""
        future: Expected = asyncio.get_running_loop().create_future()
        self._futures.setdefault(request, set()).add(future)
        return future

    def give_up(self, request: RequestId, expected: Expected) -> None:
        """Nobody waits for this word any more. May be said twice."""
        expected.cancel()
        waiting = self._futures.get(request, set())
        waiting.discard(expected)
        if not waiting:
            self._futures.pop(request, None)

    async def for_caller(
        self,
        known: RequestStatus,
        caller: Request,
        timeout_s: float,
        *,
        is_cancelling: bool = True,
        expected: Expected | None = None,
    ) -> RequestStatus | None:
        """As `until_final`; None, and the request cancelled if that `is_cancelling`, when the caller left."""
        ended = asyncio.ensure_future(
            self.until_final(known.id, timeout_s, caller_of(caller), known=known, expected=expected)
        )
        left = asyncio.ensure_future(disconnected(caller))
        try:
            await asyncio.wait({ended, left}, return_when=asyncio.FIRST_COMPLETED)
            if ended.done():
                return ended.result()
            if is_cancelling:
                await to_thread.run_sync(self._store.cancel, known.id)
            return None
        finally:
            ended.cancel()
            left.cancel()

    def ring(self) -> None:
        """Something may have ended."""
        self._rung = True
        if self._look is None and self._futures:
            self._look = asyncio.get_running_loop().create_task(self._look_until_quiet())

    def release(self) -> None:
        """Ends every wait now, and later ones at once: the gateway stops."""
        self._is_released = True
        self._wake(dict.fromkeys(self._futures))

    async def _look_until_quiet(self) -> None:
        try:
            while self._rung:
                self._rung = False
                try:
                    statuses = await hop(self._store.news, list(self._futures))
                except AwayError:
                    await asyncio.sleep(AWAY_S)
                    self._rung = True
                    continue
                self._wake(statuses)
        finally:
            self._look = None

    def _wake(self, ended: Mapping[RequestId, RequestStatus | None]) -> None:
        for request, status in ended.items():
            for future in self._futures.get(request, ()):
                if not future.done():
                    future.set_result(status)


def may_see(caller: Identity, status: RequestStatus) -> bool:
    """Whether a request is the caller's own; operators see everyone's."""
    return caller.is_operator or (caller.tenant, caller.user) == (status.tenant, status.user)


def no_request(request: str) -> NotFoundError:
    """Nobody knows, or nobody knows any more."""
    return NotFoundError(f"there is no request {request[:100]}; results are kept for some time after their end")


def _is_news(status: RequestStatus, passes_done: int | None) -> bool:
    """Whether it has ended, or got further than its caller knows."""
    return status.state.is_final or (passes_done is not None and status.passes_done > passes_done)


async def disconnected(request: Request) -> None:
    """Returns when the caller has left; the body was read before."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
