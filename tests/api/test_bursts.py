"""Requests that come at once are accepted in one transaction, and none of them is another one's. On both databases."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from api.away import AwayError
from api.bursts import MOST, Bursts
from api.idempotency import AcceptedBeforeError, Submit
from api.identity import LOCAL
from api.status import RequestStatus
from api.store import Store
from cluster.requests import DeploymentState
from polytrace.errors import CapacityError
from scheduling.plan import RequestId


@pytest.fixture
def store(tmp_path: Path, database_url: str) -> Iterator[Store]:
    store = Store(tmp_path / "store", database=database_url)
    store.set_state("m", DeploymentState.READY, "ready")
    store.controller_bell.listen()
    yield store
    store.close()


def call(store: Store, **how: Any) -> tuple[RequestId, Callable[[], RequestStatus]]:
    """A request, and what accepts it."""
    request = store.new_id()
    store.request_path(request).write_bytes(b"request")
    given: dict[str, Any] = {"facts": b"[]", "work": 1, "max_open": 1000, "is_durable": False} | how
    return request, partial(store.add, request, "m", **given)


def accept(store: Store, *adds: Callable[[], RequestStatus]) -> list[RequestStatus | BaseException]:
    """What comes of calls that are made at once."""

    async def all_at_once() -> list[RequestStatus | BaseException]:
        bursts = Bursts(store)
        return await asyncio.gather(*map(bursts.accept, adds), return_exceptions=True)

    return asyncio.run(all_at_once())


def num_rings(store: Store) -> int:
    try:
        return len(os.read(store.controller_bell.listen(), 65_536))
    except BlockingIOError:
        return 0


def test_what_comes_at_once_is_accepted_in_order_and_the_controller_is_woken_once(store: Store) -> None:
    requests, adds = zip(*(call(store) for _ in range(MOST)), strict=True)
    outcomes = accept(store, *adds)
    assert [one.id for one in outcomes if isinstance(one, RequestStatus)] == list(requests)
    assert num_rings(store) == 1
    assert [one.request for one in store.claim("m", 1000)] == list(requests)
    outcomes = accept(store, *(call(store)[1] for _ in range(MOST + 1)))
    assert num_rings(store) == 2, "others' transactions come in between"
    assert len(store.claim("m", 1000)) == len(outcomes)


def test_one_that_is_refused_or_fails_takes_no_other_along_and_leaves_nothing(store: Store) -> None:
    key = Submit(key="k", digest="7-abc")
    first, keyed = call(store), call(store, submit=key)
    broken = call(store, facts=object(), submit=Submit(key="broken", digest="7-abd"))
    twin, last, full = call(store, submit=key), call(store), call(store, max_open=3)
    outcomes = accept(store, *(add for _, add in (first, keyed, broken, twin, last, full)))
    assert [type(one) for one in outcomes[:2]] == [RequestStatus] * 2 and isinstance(outcomes[4], RequestStatus)
    assert isinstance(outcomes[2], Exception)
    assert isinstance(outcomes[3], AcceptedBeforeError) and outcomes[3].request == keyed[0]
    assert isinstance(outcomes[5], CapacityError)
    taken = [first[0], keyed[0], last[0]]
    every = [request for request, _ in (first, keyed, broken, twin, last, full)]
    assert store.statuses(every).keys() == set(taken)
    assert store.submitted(LOCAL.owner, "broken") is None
    assert [one.request for one in store.claim("m", 10)] == taken


def test_a_burst_that_the_database_ends_accepts_nobody(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    store.set_state("m", DeploymentState.READY, "ready")

    def end() -> RequestStatus:
        """What a full disk does."""
        with store.database.transaction(is_durable=False) as db:
            db.execute("ROLLBACK")
        raise AssertionError

    requests, adds = zip(call(store), call(store), strict=True)
    outcomes = accept(store, adds[0], end, adds[1])
    assert [type(one) for one in outcomes] == [AwayError] * 3
    assert not store.statuses(requests)
    assert [type(one) for one in accept(store, call(store)[1])] == [RequestStatus], "it goes on"
    store.close()


def test_what_nobody_waits_for_any_more_is_accepted_all_the_same(store: Store) -> None:
    request, add = call(store)

    async def leave() -> None:
        bursts = Bursts(store)
        left = asyncio.ensure_future(bursts.accept(add))
        await asyncio.sleep(0)
        left.cancel()
        other = await bursts.accept(call(store)[1])
        assert other.id != request

    asyncio.run(leave())
    assert store.status(request) is not None
