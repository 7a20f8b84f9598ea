"""Requests go to the least loaded replica, stay there, and go elsewhere when it cannot run them. No shards here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from api.handover import MAX_ATTEMPTS
from api.identity import Identity
from api.status import RequestState
from api.store import Store
from cluster.requests import Claimed, DeploymentState, Finished
from cluster.shares import Share, Shares
from polytrace.errors import RunError
from scheduling.plan import RequestId

Add = Callable[[int], RequestId]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "store")
    store.set_state("m", DeploymentState.READY, "ready")
    yield store
    store.close()


@pytest.fixture
def add(store: Store) -> Add:
    def add(work: int) -> RequestId:
        request = store.new_id()
        store.request_path(request).write_bytes(b"request")
        store.add(request, "m", b"[]", work=work, max_open=1000)
        return request

    return add


def shares_of(store: Store, replicas: int, *, max_active: int = 100) -> tuple[Shares, list[Share]]:
    shares = Shares(store, "m", max_active=max_active)
    own = [shares.open() for _ in range(replicas)]
    for share in own:
        share.begin_taking()
    return shares, own


def claimed(share: Share) -> list[RequestId]:
    return [one.request for one in share.claim("m", 100)]


def state(store: Store, request: RequestId) -> RequestState:
    status = store.status(request)
    assert status is not None
    return status.state


def end(share: Share, *requests: RequestId) -> None:
    share.finish([Finished(request=request, error=RunError("ended")) for request in requests])


def test_a_request_goes_to_the_replica_with_the_least_work_left(store: Store, add: Add) -> None:
    shares, (first, second) = shares_of(store, 2)
    large, *small = add(100), add(30), add(30), add(30), add(30)
    shares.give_out()
    assert (claimed(first), claimed(second)) == ([large], small)
    assert (first.work, second.work) == (100, 120)
    after = add(1)
    shares.give_out()
    assert claimed(first) == [after]
    end(second, *small)
    assert second.work == 0
    last = add(1)
    shares.give_out()
    assert claimed(second) == [last]


def test_a_full_replica_leaves_the_rest_to_others_and_then_to_the_store(store: Store, add: Add) -> None:
    shares, (first, second) = shares_of(store, 2, max_active=2)
    requests = [add(1) for _ in range(7)]
    shares.give_out()
    assert (first.num_requests, second.num_requests) == (2, 1), "one place stays free for another tenant"
    assert [state(store, request) for request in requests].count(RequestState.QUEUED) == 4
    done = claimed(first)
    end(first, *done)
    shares.give_out()
    assert first.num_requests + second.num_requests == 3


def test_requests_wait_in_the_store_while_no_replica_takes_any(store: Store, add: Add) -> None:
    shares = Shares(store, "m", max_active=100)
    share = shares.open()
    request = add(1)
    shares.give_out()
    assert state(store, request) is RequestState.QUEUED
    share.begin_taking()
    shares.give_out()
    assert claimed(share) == [request]


def test_what_a_replica_has_not_begun_goes_to_another_when_it_stops_taking(store: Store, add: Add) -> None:
    shares, (first, second) = shares_of(store, 2)
    requests = [add(1) for _ in range(4)]
    shares.give_out()
    begun = first.claim("m", 1)
    first.stop_taking()
    assert first.num_requests == 1 and first.work == 1
    shares.give_out()
    assert {*claimed(second), begun[0].request} == set(requests)
    assert not shares.has_others(second) and shares.has_others(first)


def test_all_requests_of_a_lost_replica_go_to_another_and_the_suspects_run_alone(store: Store, add: Add) -> None:
    shares, (first, second) = shares_of(store, 2)
    waiting, lost = add(1), add(1)
    second.is_taking = False
    shares.give_out()
    claimed(first)
    second.begin_taking()
    first.give_back([lost])
    shares.give_out()
    got = [second.claim("m", 100), second.claim("m", 100)]
    assert [[(one.request, one.is_suspect) for one in some] for some in got] == [[(waiting, False)], [(lost, True)]]
    assert first.num_requests == first.work == 0


def lose(share: Share, shares: Shares) -> list[Claimed]:
    """The share's replica loses its shards with everything that it has in a pass."""
    claims = share.claim("m", 100)
    share.give_back([one.request for one in claims])
    share.begin_taking()
    shares.give_out()
    return claims


def test_a_request_that_takes_replica_after_replica_down_is_refused_with_the_reason(store: Store, add: Add) -> None:
    shares, (first, second) = shares_of(store, 2)
    poison = add(1)
    shares.give_out()
    assert [one.is_suspect for one in lose(first, shares)] == [False]
    first.stop_taking()
    shares.give_out()
    assert [one.is_suspect for one in lose(second, shares)] == [True]
    assert [one.is_suspect for one in lose(second, shares)] == [True]
    status = store.status(poison)
    assert status is not None and status.state is RequestState.FAILED
    assert "broke down 3 times while it ran this request" in str(status.error)


def test_a_request_that_breaks_its_loop_again_and_again_is_refused(store: Store, add: Add) -> None:
    shares, (share,) = shares_of(store, 1)
    poison = add(1)
    for attempt in range(MAX_ATTEMPTS):
        shares.give_out()
        assert [one.is_suspect for one in share.claim("m", 100)] == [attempt > 0]
        share.break_down()
        share.begin_taking()
    assert state(store, poison) is RequestState.FAILED


def test_a_replica_hears_only_of_its_own_cancellations(store: Store, add: Add) -> None:
    shares, (first, second) = shares_of(store, 2)
    mine, others = add(1), add(1)
    shares.give_out()
    assert (claimed(first), claimed(second)) == ([mine], [others])
    store.cancel(mine)
    store.cancel(others)
    assert (first.cancellations("m"), second.cancellations("m")) == ([mine], [others])


def test_what_is_worked_out_next_is_another_tenants_when_one_has_many(store: Store, add: Add) -> None:
    shares, (share,) = shares_of(store, 1)
    many = [add(1) for _ in range(40)]
    shares.give_out()
    assert [one.request for one in share.claim("m", 4)] == many[:4]
    request = store.new_id()
    store.request_path(request).write_bytes(b"request")
    store.add(request, "m", b"[]", work=1, max_open=1000, caller=Identity(tenant="other", user="someone"))
    shares.give_out()
    assert [one.request for one in share.claim("m", 4)] == [request, *many[4:7]]
