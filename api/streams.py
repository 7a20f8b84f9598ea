"""Server-sent events: the events of requests followed as they come, and sent to who listens, until he leaves.

Knows the files (`api.events`) and how requests end (`api.waiting`), and no routes. One ring wakes all that follow; each
then reads on where it stands in its own file.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, Protocol

from anyio import to_thread
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from api.away import AwayError
from api.events import Event
from api.identity import Identity
from api.status import RequestState, RequestStatus
from api.store import Store
from api.waiting import Waiting
from scheduling.plan import RequestId

IDLE_S = 15.0  # of silence, before something is said to keep the connection
MEDIA_TYPE = "text/event-stream"
COMMENT = ": still here\n\n"
WAITING = "waiting"  # the kind of an event that is not in the file: why the request does not run yet


class Reasons(Protocol):
    """Why requests do not run yet: `api.served.Deployments`."""

    def waits_for(self, name: str) -> str | None: ...


class Streams:
    """Belongs to one event loop; `ring` is called on it."""

    def __init__(self, store: Store, waiting: Waiting) -> None:
        self._store = store
        self._waiting = waiting
        self._rung: asyncio.Future[None] | None = None
        self.followed: Counter[RequestId] = Counter()  # how many follow a request now

    def ring(self) -> None:
        """Something may have been told."""
        rung, self._rung = self._rung, None
        if rung is not None:
            rung.set_result(None)

    async def follow(
        self, request: RequestId, caller: Identity, after: int = 0, reasons: Reasons | None = None
    ) -> AsyncIterator[list[Event] | RequestStatus]:
        """Events behind the one with this id, as they come; after IDLE_S of silence an empty list; at last how the
        request has ended. That is missing when the gateway stops. Raises NotFoundError and UserError at once.

        With `reasons` there is an event WAITING for each reason why the request does not run yet. It has the id of the
        event before it, or 0: who comes back with that misses nothing.
        """
        model, told = "", None
        self.followed[request] += 1  # before looking for it: from here on its events stay
        ended = asyncio.ensure_future(self._waiting.until_final(request, math.inf, caller))
        try:
            while True:
                rung = self._next_ring()  # before looking, so that none falls between
                is_over = ended.done()
                # a step's lines have just been written: they come from memory, sooner than from another thread
                while events := self._store.events.read(request, after):
                    after = events[-1].id
                    yield events
                if reasons is not None and not is_over and (not model or reasons.waits_for(model) != told):
                    model = await self._queued_at(request)
                    told = reasons.waits_for(model) if model else None
                    reasons = reasons if model else None  # what has begun to run needs none any more
                    if told is not None:
                        yield [Event(after, WAITING, json.dumps({"waits_for": told}))]
                if is_over:
                    status = ended.result()
                    if status.state.is_final:
                        yield status
                    return
                either: set[asyncio.Future[Any]] = {rung, ended}
                done, _ = await asyncio.wait(either, timeout=IDLE_S, return_when=asyncio.FIRST_COMPLETED)
                if not done:
                    yield []
        finally:
            ended.cancel()
            self.followed[request] -= 1
            if not self.followed[request]:
                del self.followed[request]

    async def _queued_at(self, request: RequestId) -> str:
        """The deployment that a request waits for; empty when it does not wait."""
        try:
            status = await to_thread.run_sync(self._store.status, request)
        except AwayError:
            return ""
        return status.model if status is not None and status.state is RequestState.QUEUED else ""

    def _next_ring(self) -> asyncio.Future[None]:
        if self._rung is None:
            self._rung = asyncio.get_running_loop().create_future()
        return self._rung


class EventStream(StreamingResponse):
    """Sends texts as they come. `on_left` is called when the caller leaves before the last one."""

    def __init__(
        self, texts: AsyncIterator[str], *, on_left: Callable[[], None], headers: Mapping[str, str] | None = None
    ) -> None:
        own = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # proxies hold nothing back
        super().__init__(self._counted(texts), media_type=MEDIA_TYPE, headers={**own, **(headers or {})})
        self._on_left = on_left
        self._is_sent = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            if not self._is_sent:
                self._on_left()

    async def _counted(self, texts: AsyncIterator[str]) -> AsyncIterator[str]:
        async for text in texts:
            yield text
        self._is_sent = True
