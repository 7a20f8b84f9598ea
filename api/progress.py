"""How far running requests are: told to the database now and then, and to whoever waits at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from api.database import Database
from api.events import EventLog
from api.logs import logs_as_json
from api.results import Results
from api.step_values import values_as_json
from scheduling.plan import RequestId
from scheduling.scheduler import Progress

NOTE_S = 0.5  # between two words in the database of how far a generation is: its tokens go into a file


class ProgressNotes:
    """One process notes what runs."""

    def __init__(
        self,
        db: Database,
        results: Results,
        events: EventLog,
        *,
        ring_gateway: Callable[[], None],
        ring_events: Callable[[], None],
    ) -> None:
        self._db = db
        self._results = results
        self._events = events
        self._ring_gateway = ring_gateway
        self._ring_events = ring_events
        self._noted: dict[RequestId, float] = {}  # generations -> when their state was last told to the database

    def note(self, progress: Sequence[Progress]) -> None:
        """How far running requests are; who waits for them hears of it."""
        generating = [told for told in progress if told.tokens or told.saves]
        for told in generating:
            values = values_as_json(told.request, told.saves, told.result_start, self._results)
            self._events.append(told.request, told.tokens, values)
        if generating:
            self._ring_events()
        rows = [
            (told.passes_done, told.passes, logs_as_json(told, self._results), told.request)
            for told in progress
            if self._is_due(told)
        ]
        if not rows:
            return
        with self._db.transaction(is_durable=False) as db:
            db.executemany(
                "UPDATE requests SET passes_done = ?, passes = ?, logs = ? WHERE id = ? AND state = 'running'", rows
            )
        self._ring_gateway()

    def forget(self, request: RequestId) -> None:
        """It has ended."""
        self._noted.pop(request, None)

    def _is_due(self, told: Progress) -> bool:
        """Whether the database is to hear of it: every time, but of a generation only now and then."""
        now = time.monotonic()
        if told.tokens and now - self._noted.get(told.request, -NOTE_S) < NOTE_S:
            return False
        if told.tokens:
            self._noted[told.request] = now
        return True
