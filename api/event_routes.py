"""The route of a request's events: tokens and saved steps as they come, to be gone on with where one left off.

A caller who says `cancel_on_disconnect` and leaves has GRACE_S to come back; then the request is cancelled, which frees
its memory at the next step.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from functools import partial
from typing import Annotated, Any

from anyio import to_thread
from fastapi import APIRouter, Header, Request, Response

from api.answers import plain
from api.callers import caller_of
from api.events import Event
from api.identity import Identity
from api.status import RequestStatus
from api.store import Store
from api.streams import COMMENT, MEDIA_TYPE, EventStream, Reasons, Streams
from api.waiting import Waiting
from polytrace.errors import UserError
from scheduling.plan import RequestId

GRACE_S = 30.0
END = "end"  # the id of the last event
_EVENTS_DOC: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "Events `token` (as `polytrace.certificate.Token`), `value` (a saved step: its name, dtype, "
        "shape, and its data in base64 or the range of its bytes in the result), `waiting` (why it does not run yet, "
        "as `waits_for`), and at last `end` with the status.",
        "content": {MEDIA_TYPE: {"schema": {"type": "string"}}},
    },
    204: {"description": "The caller has had the last event."},
}


class EventRoutes:
    """Belongs to one event loop."""

    def __init__(self, store: Store, waiting: Waiting, streams: Streams, reasons: Reasons | None = None) -> None:
        self._store = store
        self._waiting = waiting
        self._streams = streams
        self._reasons = reasons
        self._listeners: Counter[RequestId] = Counter()
        self._cancelling: set[asyncio.Task[None]] = set()

    def add_to(self, router: APIRouter) -> None:
        router.add_api_route(
            "/requests/{request_id}/events", self.events, response_class=Response, responses=_EVENTS_DOC
        )

    async def events(
        self,
        request_id: str,
        call: Request,
        last_event_id: Annotated[str | None, Header()] = None,
        cancel_on_disconnect: bool = False,
    ) -> Response:
        """Server-sent events of a request, from its first one or behind the `Last-Event-ID`, until it has ended."""
        request = RequestId(request_id)
        await self._waiting.until_final(request, 0.0, caller_of(call))  # NotFoundError
        if last_event_id == END:
            return Response(status_code=204)
        after = _place(last_event_id)
        await to_thread.run_sync(self._store.bring_events, request)
        self._store.events.read(request, after)  # UserError
        self._listeners[request] += 1
        on_left = partial(self._on_left, request, is_cancelling=cancel_on_disconnect)
        return EventStream(
            self._texts(request, caller_of(call), after), on_left=on_left, headers={"X-Request-Id": request}
        )

    async def _texts(self, request: RequestId, caller: Identity, after: int) -> AsyncIterator[str]:
        async for told in self._streams.follow(request, caller, after, self._reasons):
            if isinstance(told, RequestStatus):
                yield _text(END, END, json.dumps(plain(told)))
            else:
                yield "".join(map(_event, told)) or COMMENT
        self._leave(request)

    def _leave(self, request: RequestId) -> None:
        self._listeners[request] -= 1
        if self._listeners[request] <= 0:
            del self._listeners[request]

    def _on_left(self, request: RequestId, *, is_cancelling: bool) -> None:
        self._leave(request)
        if is_cancelling:
            asyncio.get_running_loop().call_later(GRACE_S, self._give_up, request)

    def _give_up(self, request: RequestId) -> None:
        if request not in self._listeners:
            cancel_soon(self._store, request, self._cancelling)


def cancel_soon(store: Store, request: RequestId, tasks: set[asyncio.Task[None]]) -> None:
    """Cancels a request that nobody waits for; one that has ended stays. `tasks` keeps the task while it runs."""

    async def cancel() -> None:
        await to_thread.run_sync(store.cancel, request)

    task = asyncio.get_running_loop().create_task(cancel())
    tasks.add(task)
    task.add_done_callback(tasks.discard)


def _place(last_event_id: str | None) -> int:
    if last_event_id is None or last_event_id == "":
        return 0
    if not (last_event_id.isascii() and last_event_id.isdecimal() and len(last_event_id) <= 18):
        raise UserError(f"no event has the id {last_event_id[:100]!r}")
    return int(last_event_id)


def _event(event: Event) -> str:
    return _text(str(event.id), event.kind, event.data)


def _text(number: str, kind: str, data: str) -> str:
    return f"id: {number}\nevent: {kind}\ndata: {data}\n\n"
