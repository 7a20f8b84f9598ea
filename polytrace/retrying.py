"""When a call that failed is tried again: after longer and longer pauses, as long as somebody may come back.

Pauses are drawn between 0 and their bound ("full jitter", AWS Architecture Blog, 2015), so that clients of a service
that was away do not all come back at once. Whoever waits long enough to wonder is told why, in one line of the log
`polytrace`, which Python writes to standard error where nobody has said otherwise.
"""

from __future__ import annotations

import logging
import random
import re
import time

PATIENCE_S = 30.0  # a service that is away this long is gone
_FIRST_S = 0.2
_LONGEST_S = 5.0
_SILENT_S = 2.0  # what is over sooner is not told

_log = logging.getLogger("polytrace")
_told: dict[str, float] = {}  # what was told lately, and when: hundreds of traces may wait for the same thing


class Pauses:
    """Between tries of one call."""

    def __init__(self, patience_s: float = PATIENCE_S) -> None:
        self._patience_s = patience_s
        self._since: float | None = None  # the first failure
        self._bound = _FIRST_S

    def again(self, least_s: float | None = None, *, why: str = "") -> bool:
        """Waits, and says whether to try again; `least_s`: the service said when to come back. `why` is what people are
        told who wait for long.
        """
        now = time.monotonic()
        self._since = now if self._since is None else self._since
        pause = max(least_s or 0.0, random.uniform(0.0, self._bound))
        if now + pause - self._since > self._patience_s:
            return False
        if why and now + pause - self._since >= _SILENT_S:
            _tell(why, self._patience_s - (now - self._since))
        time.sleep(pause)
        self._bound = min(_LONGEST_S, 2 * self._bound)
        return True


def _tell(why: str, left_s: float) -> None:
    """Once in the time that one call is tried for, whatever the numbers in it are by then; those of names and addresses
    are no such numbers.
    """
    now, reason = time.monotonic(), re.sub(r"(?<![\w.:-])\d+(?:\.\d+)?(?![\w:-]|\.\w)", "", why)
    for old in [one for one, at in [*_told.items()] if now - at >= PATIENCE_S]:
        _told.pop(old, None)
    if _told.setdefault(reason, now) == now:
        _log.warning("%s; trying again for %.0f s", why, left_s)
