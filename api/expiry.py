"""Results, events and states of requests go some time after their end, while the service runs.

Owns when. A request that has not ended stays, however old; so does one whose events somebody follows.

Invariants
- First the request goes, so that nobody finds it any more, and a round later its files: whoever found it just before
  has them still.
- What a crash leaves in between, files without a request, is swept at the next start (`Store.sweep`).
"""

from __future__ import annotations

import asyncio
import logging

from anyio import to_thread

from api.away import AwayError
from api.store import Store
from api.streams import Streams
from scheduling.plan import RequestId

PAUSE_S = 30.0  # between two rounds, at most

_log = logging.getLogger(__name__)


class Expiry:
    """`ttl_s`: seconds that what a request leaves is kept after its end. Belongs to one event loop."""

    def __init__(self, store: Store, streams: Streams, ttl_s: float) -> None:
        self._store = store
        self._streams = streams
        self._ttl_s = ttl_s
        self._dropped: list[RequestId] = []  # whose files are still there

    async def run_forever(self) -> None:
        """A round at once, and then one every few seconds."""
        while True:
            try:
                await self.round()
            except AwayError:
                pass  # another time
            except Exception:  # noqa: BLE001  the edge of the task: a disk that fails now may work later
                _log.exception("what has expired could not be removed")
            await asyncio.sleep(min(PAUSE_S, self._ttl_s / 2))

    async def round(self) -> None:
        """Drops whose time is over, and removes the files of those that the round before dropped."""
        followed = set(self._streams.followed)
        await to_thread.run_sync(self._store.remove_files, [one for one in self._dropped if one not in followed])
        self._dropped = [one for one in self._dropped if one in followed]
        self._dropped += await to_thread.run_sync(self._store.drop_ended, self._store.now() - self._ttl_s, followed)
