"""A store that is drained: nothing new is accepted, and a stop waits for what is under way, a bounded time."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from api.status import RequestState
from api.stopping import finish_accepted, what_is_left
from api.store import Store
from cluster.requests import DeploymentState, Finished
from polytrace.errors import CapacityError, ConflictError, RunError
from scheduling.plan import RequestId


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "store")
    store.set_state("m", DeploymentState.READY, "ready")
    yield store
    store.close()


def accept(store: Store, model: str = "m") -> RequestId:
    request = store.new_id()
    store.request_path(request).write_bytes(b"x")
    store.add(request, model, b"[]", work=1, max_open=100)
    return request


def state(store: Store, request: RequestId) -> RequestState:
    status = store.status(request)
    assert status is not None
    return status.state


def test_a_drained_store_accepts_nothing_until_the_drain_ends(store: Store) -> None:
    store.draining.begin("lab/ada")
    with pytest.raises(CapacityError, match="drained") as refused:
        accept(store)
    assert refused.value.retry_after_s == 30
    assert store.open_requests() == {}
    assert store.draining.end() and not store.draining.end()
    accept(store)


def test_a_stop_is_no_drain_that_an_operator_can_end_and_the_next_start_forgets_it(store: Store) -> None:
    store.draining.begin("lab/ada")
    store.draining.begin("default/default", until=time.time() + 20)
    with pytest.raises(CapacityError, match="stopping") as refused:
        accept(store)
    assert refused.value.retry_after_s == pytest.approx(30, abs=2), "the rest of its time, and that of a start"
    with pytest.raises(ConflictError, match="stopping"):
        store.draining.end()
    store.draining.forget()
    accept(store)


def test_a_stop_ends_when_the_last_request_has_and_tells_how_many_are_left(store: Store) -> None:
    first, second = accept(store), accept(store)
    told: list[str] = []
    stopping = threading.Thread(target=lambda: finish_accepted(store, 60.0, told.append, goes_on=lambda: True))
    stopping.start()
    for number, request in enumerate((first, second)):
        deadline = time.monotonic() + 10
        while len(told) == number and time.monotonic() < deadline:
            time.sleep(0.01)
        assert stopping.is_alive() and f"{2 - number} wait" in told[-1]
        assert [one.request for one in store.claim("m", 1)] == [request]
        store.finish([Finished(request=request, error=RunError("none"))])
    stopping.join(timeout=10)
    assert not stopping.is_alive()


def test_what_a_stop_has_no_time_for_stays_in_the_store(store: Store) -> None:
    running, waiting = accept(store), accept(store)
    store.claim("m", 1)
    told: list[str] = []
    finish_accepted(store, 0.3, told.append, goes_on=lambda: True)
    assert "1 that run and 1 that wait stay" in told[-1]
    assert (state(store, running), state(store, waiting)) == (RequestState.RUNNING, RequestState.QUEUED)
    left = what_is_left(store, "/srv/store")
    assert left == "stopped; 2 requests that have not ended are left in /srv/store and run after its next start"
    assert what_is_left(store, None) == "stopped; 2 requests that have not ended go with its store"
    began = time.monotonic()
    finish_accepted(store, 60.0, told.append, goes_on=lambda: False)
    assert time.monotonic() - began < 30, "whoever is in a hurry does not wait"


def test_a_stop_does_not_wait_for_what_no_shard_can_run(store: Store) -> None:
    accept(store)
    store.set_state("m", DeploymentState.FAILED, "no such model")
    told: list[str] = []
    finish_accepted(store, 60.0, told.append, goes_on=lambda: True)
    assert told == []
