"""Schedules say what a wall clock in their zone says, and what is none is refused with the part that is none."""

from __future__ import annotations

from datetime import datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.hours import DAYS, hours_of
from polytrace.errors import UserError

UTC, BERLIN = ZoneInfo("UTC"), ZoneInfo("Europe/Berlin")


def at(text: str, zone: ZoneInfo = UTC) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=zone).timestamp()


def until(schedule: str, text: str, zone: ZoneInfo = UTC) -> str | None:
    end = hours_of(schedule).until(at(text, zone))
    return None if end is None else datetime.fromtimestamp(end, zone).strftime("%a %d %H:%M")


def test_working_days_have_their_hours_and_the_weekend_has_none() -> None:
    week = "mon-fri 08:00-20:00"  # the 23rd of November 2026 is a Monday
    assert until(week, "2026-11-23T07:59:59") is None
    assert until(week, "2026-11-23T08:00:00") == "Mon 23 20:00"
    assert until(week, "2026-11-23T19:59:59") == "Mon 23 20:00"
    assert until(week, "2026-11-23T20:00:00") is None
    assert until(week, "2026-11-28T12:00:00") is None


def test_nights_belong_to_the_day_on_which_they_begin_and_windows_that_meet_are_one() -> None:
    assert until("fri 22:00-06:00", "2026-11-28T05:00:00") == "Sat 28 06:00"
    assert until("fri 22:00-06:00", "2026-11-27T05:00:00") is None
    assert until("daily 00:00-24:00", "2026-11-28T05:00:00") == "Mon 07 00:00", "as far as it looks"
    assert until("fri 20:00-24:00; sat 00:00-02:00", "2026-11-27T21:00:00") == "Sat 28 02:00"
    assert until("sat-mon,wed 09:00-10:00", "2026-11-23T09:30:00") == "Mon 23 10:00"
    assert until("sat-mon,wed 09:00-10:00", "2026-11-24T09:30:00") is None


def test_a_zone_has_its_own_wall_clock_on_both_sides_of_a_change() -> None:
    week = "daily 08:00-20:00 Europe/Berlin"
    assert until(week, "2026-10-24T08:00:00", BERLIN) == "Sat 24 20:00"
    assert until(week, "2026-10-25T08:00:00", BERLIN) == "Sun 25 20:00", "the clocks went back at three"
    assert until(week, "2026-10-24T06:00:00") is not None and until(week, "2026-10-25T06:00:00") is None


@pytest.mark.parametrize(
    ("schedule", "told"),
    [
        ("", "'' in the schedule '' is no window"),
        ("mon-fri", "is no window: days and a time, such as 'mon-fri 08:00-20:00'"),
        ("mon-fri 8:00-20:00", "'8:00-20:00' in the schedule 'mon-fri 8:00-20:00' is no time"),
        ("mon-fri 08:00-25:00", "is no time"),
        ("mon-fri 24:00-25:00", "is no time"),
        ("mo-fr 08:00-20:00", "'mo-fr' in the schedule 'mo-fr 08:00-20:00' is no day"),
        ("mon, 08:00-20:00", "'' in the schedule 'mon, 08:00-20:00' is no day"),
        ("mon 08:00-20:00;", "is no window"),
        ("mon 08:00-20:00 Mars/Crater", "'Mars/Crater' is no time zone"),
        ("mon 08:00-20:00 ../../etc/passwd", "is no window"),
        ("mon 08:00-20:00; " * 60, "1020 characters is too long"),
    ],
)
def test_what_is_no_schedule_is_refused_by_the_part_that_is_none(schedule: str, told: str) -> None:
    with pytest.raises(UserError) as refused:
        hours_of(schedule)
    assert told in refused.value.message


@settings(max_examples=25)
@given(st.lists(st.tuples(st.sets(st.integers(0, 6), min_size=1), st.integers(0, 95), st.integers(1, 96)), min_size=1))
def test_any_week_agrees_with_a_table_of_its_minutes(windows: list[tuple[set[int], int, int]]) -> None:
    windows = windows[:8]
    is_open, parts = [False] * (7 * 96), []
    for days, begins, quarters in windows:
        for day in days:
            for quarter in range(quarters):
                is_open[(day * 96 + begins + quarter) % (7 * 96)] = True
        ends = (begins + quarters) % 96
        times = f"{begins // 4:02}:{begins % 4 * 15:02}-{ends // 4:02}:{ends % 4 * 15:02}"
        parts.append(f"{','.join(DAYS[day] for day in sorted(days))} {times}")
    hours = hours_of("; ".join(parts))
    monday = datetime(2026, 11, 23, tzinfo=UTC)
    for place in range(0, 7 * 96, 11):
        moment = monday + timedelta(minutes=15 * place + 7)
        assert (hours.until(moment.timestamp()) is not None) == is_open[place]
