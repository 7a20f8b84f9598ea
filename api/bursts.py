"""Requests that come at once are accepted at once: in one transaction, by one thread, and the controller is woken once.

One by one each would wait for the others' commits, in a thread of its own. Only for those whose caller is told nothing
before the end: of the others each waits for the disk, and they wait for it together (`Store.add`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeAlias

from api.hops import hop
from api.status import RequestStatus
from api.store import Store

MOST = 64  # in one transaction: other processes' come in between

Add: TypeAlias = Callable[[], RequestStatus]


class Bursts:
    """Belongs to one event loop."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._waiting: list[tuple[Add, asyncio.Future[RequestStatus]]] = []
        self._accepting: asyncio.Task[None] | None = None

    async def accept(self, add: Add) -> RequestStatus:
        """What `add`, a call of `Store.add`, returns or raises; it goes on when nobody waits for it any more."""
        loop = asyncio.get_running_loop()
        told: asyncio.Future[RequestStatus] = loop.create_future()
        self._waiting.append((add, told))
        if self._accepting is None:
            self._accepting = loop.create_task(self._accept_all())
        return await told

    async def _accept_all(self) -> None:
        try:
            while self._waiting:
                some, self._waiting = self._waiting[:MOST], self._waiting[MOST:]
                try:
                    outcomes = await hop(self._add, [add for add, _ in some])
                except Exception as error:  # noqa: BLE001  their callers' to handle: none of them is accepted, or all
                    outcomes = [error] * len(some)
                for (_, told), outcome in zip(some, outcomes, strict=True):
                    if told.done():  # nobody waits for it any more
                        continue
                    if isinstance(outcome, Exception):
                        told.set_exception(outcome)
                    else:
                        told.set_result(outcome)
        finally:
            self._accepting = None

    def _add(self, adds: list[Add]) -> list[RequestStatus | Exception]:
        """One that is refused, or fails, takes no other along."""
        outcomes: list[RequestStatus | Exception] = []
        with self._store.controller_bell.held(), self._store.database.together():
            for add in adds:
                try:
                    outcomes.append(add())
                except Exception as error:  # noqa: BLE001  its own caller's to handle
                    outcomes.append(error)
        return outcomes
