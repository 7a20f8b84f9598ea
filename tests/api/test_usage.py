"""What tenants used is measured, kept by day, and given out by month to those whose it is and to operators."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from gateways import Agreeable, GatewayService, Knowing, description_of_nothing

from api.identity import Identity, Role
from api.limits import Demand
from api.store import Store
from api.usage import as_csv, day_of, midnight_after, usage_of
from cluster.config import DeploymentSpec
from cluster.requests import Finished
from polytrace.errors import CancelledError, PolytraceError, RunError, ServiceError, UserError
from scheduling.plan import RequestId

ANN, BEN = Identity(tenant="lab", user="ann"), Identity(tenant="lab", user="ben")
ELSEWHERE = Identity(tenant="other", user="ann")
OPERATOR = Identity(tenant="lab", user="root", role=Role.OPERATOR)
MONTH = day_of(time.time())[:7]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "store")
    store.want(DeploymentSpec(source="none", name="m"))
    yield store
    store.close()


def run(store: Store, caller: Identity, error: PolytraceError | None = None, **cost: Any) -> RequestId:
    request = store.new_id()
    store.request_path(request).write_bytes(b"request")
    store.add(request, "m", b"[]", work=1, max_open=9, caller=caller, demand=Demand(tokens=10, result_bytes=77))
    store.claim("m", 9)
    if error is None:
        store.place_result(request, 60, 40)
    header = b" " * 60 if error is None else None
    size = 100 if error is None else None
    store.finish([Finished(request=request, header=header, size=size, error=error, **cost)])
    return request


def test_what_requests_cost_adds_up_by_tenant_user_and_deployment(store: Store) -> None:
    run(store, ANN, tokens=10, token_layers=40, moved_bytes=1000, run_seconds=0.5)
    run(store, ANN, tokens=8, token_layers=30, moved_bytes=500, run_seconds=0.25)
    run(store, BEN, tokens=1, token_layers=4, moved_bytes=5, run_seconds=1.0)
    run(store, ELSEWHERE, tokens=2, token_layers=8, moved_bytes=6, run_seconds=2.0)
    entries = usage_of(store._db, MONTH)
    assert [(one.tenant, one.user, one.requests) for one in entries] == [
        ("lab", "ann", 2),
        ("lab", "ben", 1),
        ("other", "ann", 1),
    ]
    ann = entries[0]
    assert (ann.tokens, ann.token_layers, ann.moved_bytes, ann.result_bytes, ann.run_seconds) == (
        18,
        70,
        1500,
        200,
        0.75,
    )
    assert ann.model == "m" and ann.failed == 0
    assert [one.user for one in usage_of(store._db, MONTH, "lab")] == ["ann", "ben"]
    assert [one.tenant for one in usage_of(store._db, MONTH, user="ann")] == ["lab", "other"]
    assert usage_of(store._db, "1999-12") == []
    with pytest.raises(UserError, match="no month"):
        usage_of(store._db, "1999-13")


@pytest.mark.parametrize(
    ("error", "is_charged"),
    [(RunError("a bad op"), True), (CancelledError("by its owner"), True), (ServiceError("a shard died"), False)],
)
def test_a_failed_request_costs_what_it_ran_unless_the_service_was_to_blame(
    store: Store, error: PolytraceError, is_charged: bool
) -> None:
    run(store, ANN, error, token_layers=12, run_seconds=0.5)
    (ann,) = usage_of(store._db, MONTH)
    assert (ann.requests, ann.failed, ann.result_bytes) == (1, 1, 0)
    assert (ann.token_layers, ann.tokens, ann.run_seconds) == ((12, 10, 0.5) if is_charged else (0, 0, 0.0))


def test_one_that_ended_before_it_ran_costs_nothing(store: Store) -> None:
    run(store, ANN, CancelledError("at once"))
    (ann,) = usage_of(store._db, MONTH)
    assert (ann.requests, ann.tokens, ann.token_layers) == (1, 0, 0)


def test_a_request_that_ends_twice_counts_once(store: Store) -> None:
    request = run(store, ANN, tokens=10, token_layers=40)
    store.finish([Finished(request=request, error=RunError("again"), token_layers=40, run_seconds=1)])
    (ann,) = usage_of(store._db, MONTH)
    assert (ann.requests, ann.failed, ann.token_layers) == (1, 0, 40)
    row = store._db.rows("SELECT token_layers, moved_bytes, result_bytes FROM requests WHERE id = ?", (request,))
    assert tuple(row[0]) == (40, 0, 100)


def test_a_status_has_what_a_request_did_cost_once_it_has_ended(store: Store) -> None:
    done = run(store, ANN, token_layers=40, moved_bytes=1000)
    failed = run(store, ANN, RunError("its own fault"), token_layers=12, run_seconds=0.5)
    waiting = store.new_id()
    store.request_path(waiting).write_bytes(b"request")
    store.add(waiting, "m", b"[]", work=1, max_open=9, caller=ANN, demand=Demand(result_bytes=77))
    told = store.statuses([done, failed, waiting])
    costs = {name: (one.token_layers, one.moved_bytes, one.result_bytes) for name, one in told.items()}
    assert costs == {done: (40, 1000, 100), failed: (12, 0, 0), waiting: (0, 0, 0)}


def test_usage_outlives_the_requests(store: Store) -> None:
    run(store, ANN, tokens=10, token_layers=40)
    store.drop_ended(time.time() + 1)
    assert usage_of(store._db, MONTH)[0].token_layers == 40


def test_a_day_ends_at_midnight_utc() -> None:
    at = 1_700_000_000.0  # 2023-11-14 22:13:20 UTC
    assert day_of(at) == "2023-11-14" and midnight_after(at) == 1_700_006_400.0
    assert day_of(midnight_after(at)) == "2023-11-15" and day_of(midnight_after(at) - 0.001) == "2023-11-14"
    assert midnight_after(midnight_after(at)) == midnight_after(at) + 86_400


def test_a_csv_has_a_line_a_row_and_no_formulas(store: Store) -> None:
    run(store, ANN, tokens=10, token_layers=40, moved_bytes=7)
    store._db.rows("UPDATE usage SET user_name = '=cmd()' RETURNING user_name")
    text = as_csv(usage_of(store._db, MONTH))
    (row,) = csv.DictReader(io.StringIO(text))
    assert row["user"] == "'=cmd()" and row["tenant"] == "lab" and row["token_layers"] == "40"
    assert text.endswith("\r\n") and text.count("\r\n") == 2


@pytest.fixture
def service(tmp_path: Path) -> Iterator[GatewayService]:
    service = GatewayService(tmp_path / "store", Agreeable(), description_of_nothing())
    yield service
    service.close()


def test_only_operators_set_limits(service: GatewayService) -> None:
    for caller, status in ((ANN, 403), (OPERATOR, 200)):
        client = TestClient(Knowing(service, caller).app())
        assert client.put("/v1/models/m/limits", json={"passes": 3}).status_code == status
        assert client.get("/v1/models/m/limits").json()["deployments"]["passes"] == (3 if status == 200 else None)


def seen_by(service: GatewayService, caller: Identity, **asked: str) -> Any:
    """What `GET /v1/usage` answers a caller."""
    return TestClient(Knowing(service, caller).app()).get("/v1/usage", params=asked)


def test_users_see_their_own_and_operators_everybodys(service: GatewayService) -> None:
    for caller in (ANN, BEN, ELSEWHERE):
        run(service.store, caller, tokens=1, token_layers=4)
    own = seen_by(service, ANN).json()
    assert own["month"] == MONTH and [(one["tenant"], one["user"]) for one in own["usage"]] == [("lab", "ann")]
    assert seen_by(service, ANN, tenant="lab").json() == own
    assert seen_by(service, ANN, tenant="other").status_code == 404
    everybody = seen_by(service, OPERATOR).json()["usage"]
    assert len(everybody) == 3
    assert [one["user"] for one in seen_by(service, OPERATOR, tenant="lab").json()["usage"]] == ["ann", "ben"]
    answer = seen_by(service, OPERATOR, month=MONTH, format="csv")
    assert answer.headers["content-type"].startswith("text/csv") and len(answer.text.splitlines()) == 4
    assert seen_by(service, OPERATOR, month="soon").status_code == 400
    assert seen_by(service, OPERATOR, month="2001-01").json()["usage"] == []
