"""What time it is for the store: a wall clock that does not jump.

Everything that the store stamps and everything that expires asks the one clock that the store was given. A machine's
own clock is set now and then, by a person or by its network, forwards or back, and by any amount; if expiry followed
it, a clock that is a week wrong for a minute would take everybody's results.
"""

from __future__ import annotations

import time
from collections.abc import Callable

SLEW = 0.01  # seconds of correction a second: far more than clocks drift, and nothing beside a jump


class SteadyClock:
    """Seconds since the epoch. Begins with the machine's wall clock, goes on with its steady one, and comes nearer to
    the wall clock by at most SLEW. Never goes back. Any thread.
    """

    def __init__(self, wall: Callable[[], float] = time.time, steady: Callable[[], float] | None = None) -> None:
        self._wall = wall
        self._steady = steady or _since_boot
        self._last = (self._steady(), wall())  # as one, for other threads

    def __call__(self) -> float:
        at = self._steady()
        before, last = self._last
        passed = max(0.0, at - before)
        ahead = self._wall() - (last + passed)
        now = last + passed + max(-SLEW * passed, min(SLEW * passed, ahead))
        self._last = (at, now)  # two threads may both write: either is right
        return now


def _since_boot() -> float:
    """Seconds that the machine has been up, asleep or not where the system counts that."""
    if hasattr(time, "CLOCK_BOOTTIME"):
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.monotonic()
