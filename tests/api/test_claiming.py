"""What the controller claims of whom: many of one tenant do not stand before few of another. On both databases."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from api.claiming import CANCELLED, REQUESTS_AHEAD, TENANTS, find_waiting, first_of
from api.database import Rows, Transaction
from api.identity import LOCAL, Identity, Role
from api.store import Store
from cluster.config import DeploymentSpec
from cluster.requests import Claimed, DeploymentState, Finished
from cluster.shares import Shares
from polytrace.errors import RunError
from scheduling.plan import RequestId

Add = Callable[..., RequestId]


class Clock:
    def __init__(self) -> None:
        self.now = 1e9

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path, database_url: str, clock: Clock) -> Iterator[Store]:
    store = Store(tmp_path / "store", database=database_url, clock=clock)
    store.set_state("m", DeploymentState.READY, "ready")
    yield store
    store.close()


@pytest.fixture
def add(store: Store) -> Add:
    def add(tenant: str, *, is_interactive: bool = True) -> RequestId:
        request = store.new_id()
        store.request_path(request).write_bytes(b"request")
        caller = Identity(tenant=tenant, user="someone", role=Role.USER, key=None)
        store.add(request, "m", b"[]", work=1, max_open=100_000, caller=caller, is_interactive=is_interactive)
        return request

    return add


def many(store: Store, tenant: str, count: int, *, is_interactive: int = 0) -> None:
    """Waiting requests, made in one go."""
    with store._db.transaction() as db:
        ids = [f"{tenant}{number:026d}" for number in range(count)]
        db.executemany(
            "INSERT INTO requests (id, model, owner, tenant, user_name, is_interactive, state, created, work) "
            "VALUES (?, 'm', ?, ?, 'someone', ?, 'queued', 0.0, 1)",
            [(one, f"{tenant}~someone", tenant, is_interactive) for one in ids],
        )
        db.executemany("INSERT INTO facts (id, json) VALUES (?, ?)", [(one, b"[]") for one in ids])


def tenants(claims: list[Claimed]) -> Counter[str]:
    return Counter(one.tenant for one in claims)


def test_ten_thousand_of_one_tenant_leave_room_for_another(store: Store, add: Add) -> None:
    many(store, "sweeps", 10_000)
    shares = Shares(store, "m", max_active=100)
    share = shares.open()
    share.begin_taking()
    shares.give_out()
    assert tenants(share.claim("m", 1000)) == {"sweeps": 51}
    single = add("single")
    shares.give_out()
    assert single in [one.request for one in share.claim("m", 1000)]


def test_many_tenants_get_about_the_same_and_all_room_is_used_in_the_end(store: Store) -> None:
    for number in range(9):
        many(store, f"t{number}", 200)
    shares = Shares(store, "m", max_active=100)
    share = shares.open()
    share.begin_taking()
    shares.give_out()
    found = tenants(share.claim("m", 1000))
    assert len(found) == 9 and max(found.values()) - min(found.values()) <= 1
    assert sum(found.values()) >= 85


def test_who_may_hold_no_more_is_asked_again_when_one_of_its_requests_ends(store: Store) -> None:
    many(store, "sweeps", 100)
    shares = Shares(store, "m", max_active=10)
    share = shares.open()
    share.begin_taking()
    shares.give_out()
    first = share.claim("m", 10)
    store.wait_for_requests(0.0)
    share.finish([Finished(request=first[0].request, error=RunError("ended"))])
    shares.give_out()
    assert len(share.claim("m", 10)) == 1
    assert shares.has_more


def test_whom_somebody_waits_for_goes_first_but_batch_not_last_for_ever(store: Store, add: Add) -> None:
    batch = add("one", is_interactive=False)
    interactive = [add("one") for _ in range(3)]
    assert [one.request for one in store.claim("m", 2)] == interactive[:2]
    many(store, "one", 2 * REQUESTS_AHEAD, is_interactive=1)
    claims = [one.request for one in store.claim("m", 2 * REQUESTS_AHEAD)]
    assert claims.index(batch) == REQUESTS_AHEAD - 2


def test_a_claim_with_ten_thousand_waiting_reads_what_it_takes(store: Store, database_url: str) -> None:
    for number in range(10):
        many(store, f"t{number}", 1000)
    begun = time.perf_counter()
    claims = store.claim("m", 10, lambda names, _: dict.fromkeys(names, 1))
    print(f"{(time.perf_counter() - begun) * 1e3:.2f} ms")
    assert tenants(claims) == {f"t{number}": 1 for number in range(10)}
    if database_url.startswith("postgres"):
        return  # it chooses by what it knows of the table, which is too small for it to need an index
    for query, values in ((TENANTS, ("m",)), (first_of(2), ("m", "t1", 3, "t2", 9))):
        plan = store._db.rows(f"EXPLAIN QUERY PLAN {query}", values)
        assert any("requests_of_tenants" in str(row) for row in plan), plan
        assert not any("SCAN requests" in str(row) or "SCAN facts" in str(row) for row in plan), plan
    plan = store._db.rows(f"EXPLAIN QUERY PLAN {CANCELLED}", ("m",))
    assert any("requests_open" in str(row) for row in plan), f"asked all the time, of those that run alone: {plan}"


def test_a_thousand_tenants_are_two_questions_to_the_database(store: Store, add: Add) -> None:
    with store._db.transaction() as db:
        ids = [(f"{kind}{number:030d}", f"t{number:04d}", kind) for number in range(1000) for kind in (0, 1)]
        db.executemany(
            "INSERT INTO requests (id, model, owner, tenant, user_name, is_interactive, state, created, work) "
            "VALUES (?, 'm', 'x~y', ?, 'y', ?, 'queued', 0.0, 1)",
            ids,
        )
        db.executemany("INSERT INTO facts (id, json) VALUES (?, ?)", [(one[0], b"[]") for one in ids])
    asked: list[str] = []

    class Counting:
        def __init__(self, db: Transaction) -> None:
            self._db = db

        def execute(self, query: str, values: Sequence[Any] = ()) -> Rows:
            asked.append(query)
            return self._db.execute(query, values)

        def executemany(self, query: str, values: Iterable[Sequence[Any]]) -> object:
            return self._db.executemany(query, values)

    with store._db.transaction() as db:
        found = find_waiting(Counting(db), "m", 2000, lambda names, _: dict.fromkeys(reversed(names), 1))
    assert len(asked) == 2
    assert [one.tenant for one in found] == [f"t{number:04d}" for number in reversed(range(1000))]
    assert all(one.is_interactive for one in found), "whom somebody waits for goes first"


def test_weights_are_those_of_the_tenants_table(store: Store) -> None:
    store.tenants.add("heavy", LOCAL, weight=3.0)
    store.tenants.add("plain", LOCAL)
    assert store.weights() == {"heavy": 3.0}
    shares = Shares(store, "m", max_active=10)
    shares.open().begin_taking()
    shares.give_out()
    assert (shares.fair.weight("heavy"), shares.fair.weight("plain")) == (3.0, 1.0)


def test_a_waiting_request_has_a_position_and_after_starts_a_time(store: Store, add: Add, clock: Clock) -> None:
    first, second, batch = add("one"), add("one"), add("one", is_interactive=False)
    third = add("one")
    add("other")
    positions = [store.queue_outlook(one) for one in (first, second, third, batch)]
    assert [one and one.queue_position for one in positions] == [0, 1, 2, 3]
    assert all(one is not None and one.expected_start is None for one in positions)
    assert [one.request for one in store.claim("m", 1)] == [first]
    clock.now += 10.0
    found = store.queue_outlook(second)
    assert found is not None
    assert (found.queue_position, found.expected_start) == (0, clock.now + 10.0)
    assert store.queue_outlook(first) is None, "it runs"


def test_counters_go_with_their_deployment_and_their_tenant(store: Store) -> None:
    store.want(DeploymentSpec(source="none", name="m"))
    store.tenants.add("old", LOCAL)
    store.save_counters("m", {"": 1.0, "lab": 2.0, "old": 7.0}, [])
    store.save_counters("m", {"lab": 3.0}, [])
    assert store.counters("m") == {"": 1.0, "lab": 3.0, "old": 7.0}
    store.tenants.remove("old", LOCAL)
    store.save_counters("m", {}, ["lab"])
    assert store.counters("m") == {"": 1.0}
    store.remove("m", now=True)
    store.forget("m")
    assert store.counters("m") == {}
