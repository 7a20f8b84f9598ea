"""A machine's clock may be set forwards or back at any time: nothing goes before its time, times keep their order."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from api.clock import SLEW, SteadyClock
from api.expiry import Expiry
from api.identity import LOCAL
from api.limits import Demand, TenantLimits, Terms
from api.status import RequestState
from api.store import Store
from api.streams import Streams
from api.waiting import Waiting
from cluster.requests import DeploymentState, Finished, LeftBehind, Place
from polytrace.contents import digest_of
from polytrace.errors import KeyRefusedError
from polytrace.wire import content_header
from scheduling.plan import RequestId

DAY = 86_400.0
TTL_S = 7 * DAY


class Machine:
    """A wall clock that people set, and a steady one that they cannot."""

    def __init__(self) -> None:
        self.set_by = 0.0
        self.up = 0.0

    def wall(self) -> float:
        return 1_800_000_000.0 + self.up + self.set_by

    def clock(self) -> SteadyClock:
        return SteadyClock(self.wall, lambda: self.up)


@pytest.fixture
def machine() -> Machine:
    return Machine()


@pytest.fixture
def store(tmp_path: Path, machine: Machine) -> Iterator[Store]:
    store = Store(tmp_path / "store", clock=machine.clock())
    store.set_state("m", DeploymentState.READY, "ready")
    yield store
    store.close()


def accept(store: Store) -> RequestId:
    request = store.new_id()
    store.request_path(request).write_bytes(b"request")
    store.add(request, "m", b"[]", work=1, max_open=10)
    return request


def finish(store: Store, request: RequestId) -> None:
    store.claim("m", 10)
    store.place_result(request, 64, 0)
    store.finish([Finished(request=request, header=b"h" * 64)])


def expire(store: Store) -> None:
    waiting = Waiting(store)
    expiry = Expiry(store, Streams(store, waiting), TTL_S)

    async def rounds() -> None:
        await expiry.round()
        await expiry.round()

    asyncio.run(rounds())


@pytest.mark.parametrize("jump", [-30 * DAY, -3600.0, 3600.0, 30 * DAY])
@pytest.mark.parametrize("when", ["accepted", "finished"])
def test_a_result_stays_for_its_time_and_no_less_whenever_the_clock_is_set(
    store: Store, machine: Machine, jump: float, when: str
) -> None:
    request = accept(store)
    if when == "accepted":
        machine.set_by += jump
    machine.up += 5
    finish(store, request)
    if when == "finished":
        machine.set_by += jump
    status = store.status(request)
    assert status is not None and status.started is not None and status.finished is not None
    assert status.created <= status.started <= status.finished <= status.created + 6
    for _ in range(6):
        machine.up += DAY
        expire(store)
        assert store.result_path(request).exists(), "its time is not over"
    machine.up += 2 * DAY
    expire(store)
    assert store.status(request) is None and not store.result_path(request).exists()


def test_a_clock_that_was_wrong_for_a_while_takes_nothing_when_it_is_put_right(store: Store, machine: Machine) -> None:
    before = accept(store)
    finish(store, before)
    machine.set_by = -30 * DAY
    machine.up += 60
    during = accept(store)
    finish(store, during)
    machine.set_by = 0.0
    machine.up += 60
    expire(store)
    assert set(store.statuses([before, during])) == {before, during}


def test_a_service_that_starts_while_the_clock_is_behind_ends_what_came_later_than_now(
    tmp_path: Path, machine: Machine
) -> None:
    first = Store(tmp_path / "store", clock=machine.clock())
    first.set_state("m", DeploymentState.READY, "ready")
    request = accept(first)
    first.close()
    machine.set_by = -30 * DAY
    again = Store(tmp_path / "store", clock=machine.clock())
    finish(again, request)
    again.close()
    machine.set_by = 0.0
    third = Store(tmp_path / "store", clock=machine.clock())
    expire(third)
    status = third.status(request)
    assert status is not None and status.state is RequestState.DONE
    third.close()


@pytest.mark.parametrize("jump", [-30 * DAY, 30 * DAY])
def test_a_kept_value_expires_after_its_time_to_live(store: Store, machine: Machine, jump: float) -> None:
    request = accept(store)
    store.claim("m", 1)
    left = LeftBehind(name="mean", is_state=False, ttl_s=3600.0, dtype="uint8", shape=(4,))
    (place,) = store.place_left(request, [left])
    with place.path.open("r+b") as file:
        file.seek(place.start)
        file.write(b"abcd")
    store.place_result(request, 64, 0)
    places: tuple[Place, ...] = (place,)
    store.finish([Finished(request=request, header=b"h" * 64, left=places)])
    machine.set_by += jump
    machine.up += 3500
    store.contents.purge()
    owner = "default~default"
    assert store.contents.kept.entry(owner, "mean", is_state=False).digest == digest_of("uint8", (4,), b"abcd")
    assert store.contents.content_path(owner, digest_of("uint8", (4,), b"abcd")).read_bytes() == (
        content_header("uint8", (4,)) + b"abcd"
    )
    machine.up += 200
    assert store.contents.purge() == 1


def test_the_clock_follows_a_small_error_and_never_goes_back(machine: Machine) -> None:
    clock = machine.clock()
    machine.set_by = 2.0
    told = [clock()]
    for _ in range(1000):
        machine.up += 1
        told.append(clock())
    assert told == sorted(told) and abs(told[-1] - machine.wall()) < 1e-6
    machine.set_by = -1000.0
    machine.up += 1
    assert 0 < clock() - told[-1] <= 1 - SLEW + 1e-6


@pytest.mark.parametrize("jump", [-30 * DAY, 30 * DAY])
def test_a_key_lives_as_long_as_it_was_made_for_and_days_of_quotas_do_not_jump(
    store: Store, machine: Machine, jump: float
) -> None:
    key, secret = store.keys.make("default", "ada", LOCAL, expires=store.now() + 3600)
    limits = TenantLimits(tokens_a_day=100)
    terms = Terms(tenant="default", model="m", tenants=limits)
    store.add(store.new_id(), "m", b"[]", work=1, max_open=9, demand=Demand(tokens=60), terms=terms)
    machine.set_by += jump
    machine.up += 3000
    assert store.keys.find(secret).identity.user == "ada"
    (line,) = store.allowances.lines(terms, Demand(tokens=30))
    assert line.used == 60
    store.audit.record(LOCAL, "purge", "default")
    newest, made = store.audit.entries(limit=2)
    assert newest.at - made.at == pytest.approx(3000, abs=60) and made.at == pytest.approx(key.created)
    machine.up += 700
    with pytest.raises(KeyRefusedError, match="expired"):
        store.keys.find(secret)
