"""What callers tried that their role does not let them do, written into the audit log.

Gathered for a moment, so that whoever tries without end costs a few entries and not one a call. What a gateway that is
killed had not written yet is in nobody's log.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter

from anyio import to_thread

from api.audit import Audit
from api.identity import Identity

WRITE_S = 1.0  # between two writings
MAX_SUBJECTS = 5  # of one caller in one writing; the rest is counted as one
MAX_CALLERS = 1000  # in one writing

_log = logging.getLogger(__name__)


class Refusals:
    """Belongs to one event loop."""

    def __init__(self, audit: Audit) -> None:
        self._audit = audit
        self._noted: dict[Identity, Counter[str]] = {}

    def note(self, caller: Identity, what: str) -> None:
        """A caller was refused; `what`: the method and the path."""
        if caller not in self._noted and len(self._noted) >= MAX_CALLERS:
            return
        own = self._noted.setdefault(caller, Counter())
        own[what if what in own or len(own) < MAX_SUBJECTS else "others"] += 1

    async def write_forever(self) -> None:
        while True:
            await asyncio.sleep(WRITE_S)
            await to_thread.run_sync(self.write)

    def write(self) -> None:
        """Writes down what was noted."""
        noted, self._noted = self._noted, {}
        try:
            for caller, counts in noted.items():
                for what, times in counts.items():
                    self._audit.record(caller, "refused", what, role=caller.role.value, times=times)
        except Exception:  # noqa: BLE001  the edge of the task: a database that is away now may be back later
            _log.exception("refused calls could not be written down: %s", noted)
