"""The hours in which a deployment is kept loaded, as operators write them.

    mon-fri 08:00-20:00
    mon-thu 07:30-19:00; fri 07:30-16:00 Europe/Berlin
    daily 22:00-06:00

Windows are parted by `;`. Each has days (`mon`, `mon-fri`, `sat,sun`, `daily`) and a time that begins on them; one that
ends at or before its beginning ends on the next day, and `24:00` is midnight. At the end may stand a time zone by its
IANA name; without one it is UTC. Where clocks change, a window has the hours that the wall shows.

Knows no clock: whoever asks says what time it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, time, timedelta
from functools import lru_cache
from zoneinfo import ZoneInfo

from polytrace.errors import UserError

DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
MAX_CHARS = 500
_FORM = "days and a time, such as 'mon-fri 08:00-20:00'"
_TIMES = re.compile(r"([01][0-9]|2[0-3]):([0-5][0-9])-(([01][0-9]|2[0-3]):([0-5][0-9])|24:00)")
_ZONE = re.compile(r"[A-Za-z][A-Za-z0-9_+-]*(/[A-Za-z0-9_+-]+)*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """A time of day on some days of the week."""

    days: frozenset[int]  # that it begins on, 0 is Monday
    begins: int  # minutes since midnight
    minutes: int  # that it lasts, at most a day


@dataclass(frozen=True, slots=True, kw_only=True)
class Hours:
    """Windows of the week in one time zone."""

    windows: tuple[Window, ...]
    zone: ZoneInfo

    def until(self, at: float) -> float | None:
        """When the hours end in which `at` lies, windows that meet taken together; None outside of them.

        Both are seconds since the epoch.
        """
        end: float | None = None
        for begins, ends in sorted(self._around(at)):
            reached = at if end is None else end
            if begins <= reached < ends:
                end = ends
        return end

    def _around(self, at: float) -> Iterator[tuple[float, float]]:
        """Beginnings and ends from the day before to a week later."""
        today = datetime.fromtimestamp(at, self.zone).date()
        for day in (today + timedelta(days=shift) for shift in range(-2, 9)):
            for window in self.windows:
                if day.weekday() in window.days:
                    begins = datetime.combine(day, time(), tzinfo=None) + timedelta(minutes=window.begins)
                    ends = begins + timedelta(minutes=window.minutes)
                    yield self._epoch(begins), self._epoch(ends)

    def _epoch(self, wall: datetime) -> float:
        return wall.replace(tzinfo=self.zone).timestamp()


@lru_cache(maxsize=256)  # the controller asks at every look
def hours_of(text: str) -> Hours:
    """Reads hours. Raises UserError with the part that is none, and what one looks like."""
    if len(text) > MAX_CHARS:
        raise UserError(f"a schedule of {len(text)} characters is too long: {MAX_CHARS} are taken")
    words = text.split()
    zone = "UTC"
    if len(words) > 1 and _ZONE.fullmatch(words[-1]) and ":" not in words[-1]:
        zone = words.pop()
    parts = " ".join(words).split(";")
    return Hours(windows=tuple([_window(part.strip(), text) for part in parts]), zone=_zone(zone))


def _window(part: str, text: str) -> Window:
    words = part.lower().split()
    if len(words) != 2:
        raise UserError(f"{part!r} in the schedule {text!r} is no window: {_FORM}; windows are parted by ';'")
    found = _TIMES.fullmatch(words[1])
    if found is None:
        raise UserError(f"{words[1]!r} in the schedule {text!r} is no time: HH:MM-HH:MM, from 00:00 to 24:00")
    begins = 60 * int(found[1]) + int(found[2])
    ends = 24 * 60 if found[3] == "24:00" else 60 * int(found[4]) + int(found[5])
    minutes = ends - begins if ends > begins else ends - begins + 24 * 60
    return Window(days=frozenset(_days(words[0], text)), begins=begins, minutes=minutes)


def _days(word: str, text: str) -> Iterator[int]:
    for part in word.split(","):
        first, is_range, last = part.partition("-")
        if part == "daily":
            yield from range(7)
        elif first in DAYS and (last in DAYS or not is_range):
            start = DAYS.index(first)
            yield from (day % 7 for day in range(start, start + 1 + (DAYS.index(last or first) - start) % 7))
        else:
            raise UserError(f"{part!r} in the schedule {text!r} is no day: {', '.join(DAYS)}, mon-fri or daily")


def _zone(name: str) -> ZoneInfo:
    try:
        return ZoneInfo(name)
    except (OSError, ValueError, KeyError):
        raise UserError(f"{name!r} is no time zone that is known here: UTC, or a name such as Europe/Berlin") from None
