"""What a pass is at on a shard, and for how long."""

from __future__ import annotations

import time

from scheduling.plan import Phase


class Stopwatch:
    """What a pass is at, and for how long, by the clock that all processes of the machine have."""

    def __init__(self) -> None:
        self.began = self._last = time.monotonic()
        self.phases: list[tuple[Phase, float]] = []

    def lap(self, phase: Phase) -> None:
        """Since the last lap it was that."""
        now = time.monotonic()
        self.phases.append((phase, now - self._last))
        self._last = now

    @property
    def seconds(self) -> float:
        """From the begin to the last lap."""
        return self._last - self.began

    def seconds_of(self, phase: Phase) -> float:
        return sum(seconds for other, seconds in self.phases if other is phase)
