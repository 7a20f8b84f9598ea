"""When a call that failed is tried again: after longer and longer pauses, as long as somebody may come back.

Pauses are drawn between 0 and their bound ("full jitter", AWS Architecture Blog, 2015), so that clients of a service
that was away do not all come back at once.
"""

from __future__ import annotations

import random
import time

PATIENCE_S = 30.0  # a service that is away this long is gone
_FIRST_S = 0.2
_LONGEST_S = 5.0


class Pauses:
    """Between tries of one call."""

    def __init__(self, patience_s: float = PATIENCE_S) -> None:
        self._patience_s = patience_s
        self._since: float | None = None  # the first failure
        self._bound = _FIRST_S

    def again(self, least_s: float | None = None) -> bool:
        """Waits, and says whether to try again; `least_s`: the service said when to come back."""
        now = time.monotonic()
        self._since = now if self._since is None else self._since
        pause = max(least_s or 0.0, random.uniform(0.0, self._bound))
        if now + pause - self._since > self._patience_s:
            return False
        time.sleep(pause)
        self._bound = min(_LONGEST_S, 2 * self._bound)
        return True
