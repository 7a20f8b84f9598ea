"""Who is loaded and who rests: by pins, schedules, idleness and room. The store is real, and there are no shards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from api.status import RequestState
from api.store import Store
from cluster.config import DeploymentSpec, Heat
from cluster.demand import STUCK_S, Demand, Standing, choose
from cluster.requests import DeploymentState, Published
from scheduling.plan import RequestId

MONDAY_NOON = datetime(2026, 11, 23, 12, tzinfo=UTC).timestamp()
READY, WAITING, FAILED = DeploymentState.READY, DeploymentState.WAITING, DeploymentState.FAILED


class Desk:
    """Deployments in a store whose clock stands, and one who looks at them."""

    def __init__(self, folder: Path) -> None:
        self.at = MONDAY_NOON
        self.store = Store(folder, clock=lambda: self.at)
        self.free: dict[str, float] = {}
        self.demand = Demand(self.store, lambda: self.free)
        self.states: dict[str, DeploymentState] = {}
        self.used: dict[str, float] = {}
        self.busy: set[str] = set()

    def add(self, name: str, state: DeploymentState = READY, *, idle_s: float = 0.0, **keeping: Any) -> None:
        self.store.want(DeploymentSpec(name=name, source="none"))
        self.store.publish(name, Published(source="none", dtype="auto", description=b"{}", tokenizer=None))
        self.store.set_state(name, state, "no room" if state is WAITING else "as it is")
        self.store.keep(name, keeping)
        self.states[name], self.used[name] = state, self.at - idle_s

    def ask(self, name: str) -> RequestId:
        request = self.store.new_id()
        self.store.request_path(request).write_bytes(b"request")
        self.store.add(request, name, b"[]", work=1, max_open=10)
        return request

    def look(self) -> dict[str, str]:
        """Every deployment holds a CPU, or waits for one."""
        standings = []
        for wanted in self.store.wanted():
            name = wanted.spec.name
            one, waits = {"CPU": 1.0}, self.states[name] is WAITING
            is_there = self.states[name].is_serving
            standings.append(
                Standing(
                    wanted=wanted,
                    state=self.states[name],
                    progress="as it is",
                    is_busy=name in self.busy,
                    used=self.used[name],
                    holds=one if is_there else {},
                    lacks=one if waits else {},
                )
            )
        return self.demand.look(standings)

    def heats(self) -> dict[str, str]:
        return {wanted.spec.name: wanted.heat.value for wanted in self.store.wanted()}

    def why(self, name: str) -> str:
        return next(wanted.why for wanted in self.store.wanted() if wanted.spec.name == name)


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    desk = Desk(tmp_path / "store")
    yield desk
    desk.store.close()


def test_the_one_that_was_used_least_lately_makes_room_and_no_other(desk: Desk) -> None:
    desk.add("wished", WAITING, on_demand=True)
    for name, idle_s in (("a", 20.0), ("b", 300.0), ("c", 100.0)):
        desk.add(name, idle_s=idle_s, on_demand=True)
    desk.add("plain", idle_s=9000.0)
    desk.add("pinned", idle_s=8000.0, on_demand=True, is_pinned=True)
    desk.add("kept", idle_s=7000.0, on_demand=True, schedule="mon 11:00-13:00")
    desk.add("busy", idle_s=6000.0, on_demand=True)
    desk.busy.add("busy")
    assert desk.look() == {}
    assert desk.heats() == {name: "cold" if name == "b" else "hot" for name in desk.states}
    assert desk.why("b") == "made room for wished"
    assert desk.look() == {}, "its room is on the way"
    assert desk.heats()["c"] == "hot"


def test_where_nobody_can_make_room_it_is_said_who_stays_and_why(desk: Desk) -> None:
    desk.add("wished", WAITING, on_demand=True)
    desk.add("plain", idle_s=900.0)
    desk.add("pinned", idle_s=900.0, is_pinned=True)
    desk.add("kept", idle_s=900.0, schedule="daily 11:00-13:00")
    desk.add("busy", on_demand=True)
    desk.busy.add("busy")
    assert desk.look() == {
        "wished": "busy has requests; kept is kept by its schedule daily 11:00-13:00; pinned is pinned; "
        "plain is not on demand"
    }
    assert set(desk.heats().values()) == {"hot"}


def test_a_request_that_comes_just_then_keeps_its_deployment(desk: Desk) -> None:
    desk.add("wished", WAITING, on_demand=True)
    desk.add("a", idle_s=300.0, on_demand=True)
    desk.ask("a")  # the controller has not heard of it
    desk.look()
    assert desk.heats()["a"] == "hot"


def test_room_that_is_enough_in_sum_and_does_not_do_is_made_larger_after_a_while(desk: Desk) -> None:
    desk.add("wished", WAITING, on_demand=True)
    desk.add("a", idle_s=300.0, on_demand=True)
    desk.free = {"CPU": 1.0}  # half of it on either node
    desk.look()
    assert desk.heats()["a"] == "hot"
    desk.at += STUCK_S
    desk.look()
    assert desk.heats()["a"] == "cold"


def test_idle_ones_rest_where_they_are_said_to_after_their_minutes(desk: Desk) -> None:
    desk.add("warm", on_demand=True, idle_minutes=10, rests=Heat.WARM)
    desk.add("stays", on_demand=True)
    desk.at += 599
    desk.look()
    assert desk.heats() == {"warm": "hot", "stays": "hot"}
    desk.at += 1
    desk.look()
    assert desk.heats() == {"warm": "warm", "stays": "hot"}
    assert desk.why("warm") == "nobody asked for 10 minutes"


def test_a_schedule_loads_and_lets_rest_by_the_stores_clock(desk: Desk) -> None:
    desk.add("kept", schedule="mon-fri 08:00-20:00")
    desk.at += 8 * 3600  # Monday, 20:00
    desk.busy.add("kept")
    desk.look()
    assert desk.heats() == {"kept": "hot"}, "it finishes what it has"
    desk.busy.clear()
    desk.look()
    assert desk.heats() == {"kept": "cold"} and desk.why("kept") == "outside of mon-fri 08:00-20:00"
    desk.at += 12 * 3600 - 1
    desk.look()
    assert desk.heats() == {"kept": "cold"}
    desk.at += 1
    desk.look()
    assert desk.heats() == {"kept": "hot"}


def test_one_that_cannot_be_loaded_refuses_those_who_wait_with_the_reason(desk: Desk) -> None:
    desk.add("broken", FAILED, on_demand=True)
    request = desk.ask("broken")
    desk.look()
    status = desk.store.status(request)
    assert status is not None and status.state is RequestState.FAILED and status.error is not None
    assert status.error.message == "broken could not be loaded: as it is"
    assert desk.heats() == {"broken": "cold"} and desk.why("broken") == "failed: as it is"


def test_one_that_was_evicted_while_it_was_loaded_and_fails_refuses_those_who_wait(desk: Desk) -> None:
    desk.add("broken", DeploymentState.STARTING, on_demand=True)
    request = desk.ask("broken")
    desk.store.evict("broken", None, "evicted by an operator")
    desk.states["broken"] = FAILED
    desk.look()
    status = desk.store.status(request)
    assert status is not None and status.error is not None
    assert status.error.message == "broken could not be loaded: as it is"


@pytest.mark.parametrize(
    ("lacks", "free", "victims"),
    [
        ({"CPU": 1.0}, {"CPU": 1.0}, []),
        ({"CPU": 1.0}, {"CPU": 0.5}, ["a"]),
        ({"GPU": 2.0}, {"CPU": 8.0}, ["b", "c"]),  # a has no GPU, and stays
        ({"CPU": 2.0, "GPU": 1.0}, {}, ["a", "b"]),
        ({"GPU": 3.0}, {"CPU": 8.0}, None),
    ],
)
def test_as_few_as_do_are_chosen_and_nobody_where_all_would_not_do(
    desk: Desk, lacks: Mapping[str, float], free: Mapping[str, float], victims: list[str] | None
) -> None:
    for name in "abc":
        desk.add(name)
    standing = Standing(
        wanted=desk.store.wanted()[0], state=READY, progress="", is_busy=False, used=0.0, holds={}, lacks={}
    )
    known = {wanted.spec.name: wanted for wanted in desk.store.wanted()}
    holds = {"a": {"CPU": 1.0}, "b": {"CPU": 1.0, "GPU": 1.0}, "c": {"CPU": 1.0, "GPU": 1.0}}
    candidates = [
        replace(standing, wanted=known[name], used=float(place), holds=holds[name]) for place, name in enumerate("abc")
    ]
    chosen = choose(lacks, free, candidates)
    assert (None if chosen is None else [one.name for one in chosen]) == victims
