"""Whether the gateway could take a request now: its database and its place of objects answer.

Whoever balances load asks this often, and anybody may: what was found holds for a moment, and one look serves all who
ask meanwhile. A look that takes longer than PATIENCE_S has found that the service is not ready.
"""

from __future__ import annotations

import asyncio
import time

from anyio import to_thread

from api.away import AwayError
from api.store import Store

DATABASE_S, OBJECTS_S = 1.0, 4.0  # how long what was found holds
PATIENCE_S = 3.0


class Readiness:
    """Belongs to one event loop."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._look: asyncio.Task[str | None] | None = None
        self._found: str | None = None
        self._until = 0.0  # monotonic
        self._objects_until = 0.0

    async def lacking(self) -> str | None:
        """What does not answer, None when everything does."""
        if time.monotonic() < self._until:
            return self._found
        if self._look is None:
            self._look = asyncio.get_running_loop().create_task(to_thread.run_sync(self._reach))
            self._look.add_done_callback(self._on_end)
        done, _ = await asyncio.wait({self._look}, timeout=PATIENCE_S)
        return done.pop().result() if done else f"the store does not answer within {PATIENCE_S:g} s"

    def _reach(self) -> str | None:
        try:
            self._store.database.rows("SELECT 1")
        except AwayError as error:
            return error.message
        try:
            if self._store.objects is not None and time.monotonic() >= self._objects_until:
                self._store.objects.put("ready", b"")  # to list or read would not say that results can be kept
                self._objects_until = time.monotonic() + OBJECTS_S
        except AwayError as error:
            return error.message
        return None

    def _on_end(self, look: asyncio.Task[str | None]) -> None:
        self._look = None
        if not look.cancelled() and look.exception() is None:
            self._found = look.result()
            self._until = time.monotonic() + DATABASE_S
