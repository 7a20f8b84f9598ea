"""What a tenant may have under way, use and store, and how often it may ask: each at its edge, and when to retry."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from gateways import Agreeable, GatewayService, description_of_nothing

from api.admission import SEARCH_S
from api.identity import Identity
from api.limits import Demand, TenantLimits, Terms, limits_from_text, text_of
from api.quotas import LATEST, MAX_RETRY_S, Rates
from api.status import RequestState
from api.store import Store
from api.usage import midnight_after
from api.worker import Verdict
from cluster.config import DeploymentSpec
from cluster.requests import Finished
from polytrace.errors import CapacityError, QuotaError, RunError, TooLargeError, UserError
from scheduling.plan import RequestId

ANN, BEN = Identity(tenant="lab", user="ann"), Identity(tenant="lab", user="ben")
ELSEWHERE = Identity(tenant="other", user="ann")
TTL_S = 1000.0


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "store")
    for name in ("m", "n"):
        store.want(DeploymentSpec(source="none", name=name))
    yield store
    store.close()


def add(
    store: Store,
    caller: Identity,
    limits: TenantLimits,
    demand: Demand | None = None,
    *,
    model: str = "m",
    most: int = 100,
    most_of_tenant: int = 100,
    deployments: TenantLimits | None = None,
) -> RequestId:
    request = store.new_id()
    store.request_path(request).write_bytes(b"request")
    store.add(
        request,
        model,
        b"[]",
        work=1,
        max_open=most,
        max_open_of_tenant=most_of_tenant,
        caller=caller,
        demand=demand or Demand(),
        terms=Terms(tenant=caller.tenant, model=model, tenants=limits, deployments=deployments or TenantLimits()),
        result_ttl_s=TTL_S,
    )
    return request


def end(store: Store, request: RequestId, error: Exception | None = None, **cost: float) -> None:
    """The request runs and ends, with a result of 100 bytes."""
    for model in ("m", "n"):
        store.claim(model, 100)
    if error is not None:
        store.finish([Finished(request=request, error=error, **cost)])  # type: ignore[arg-type]
        return
    place = store.place_result(request, 60, 40)
    assert place.start == 60
    store.finish([Finished(request=request, header=b" " * 60, size=100, **cost)])  # type: ignore[arg-type]


def test_a_tenant_has_so_many_requests_in_flight_on_all_deployments_together(store: Store) -> None:
    limits = TenantLimits(requests_in_flight=2)
    first = add(store, ANN, limits)
    add(store, BEN, limits, model="n")
    with pytest.raises(QuotaError, match="tenant lab has 2 requests in flight and may have 2 at once") as caught:
        add(store, ANN, limits)
    assert caught.value.retry_after_s is not None
    add(store, ELSEWHERE, limits)
    end(store, first)
    add(store, ANN, limits)
    with pytest.raises(QuotaError):
        add(store, BEN, limits)


def test_of_many_who_come_at_once_exactly_the_allowed_are_taken(store: Store) -> None:
    limits, taken, refused = TenantLimits(requests_in_flight=7), [], []

    def come() -> None:
        for _ in range(4):
            try:
                taken.append(add(store, ANN, limits))
            except QuotaError as error:
                refused.append(error)

    threads = [threading.Thread(target=come) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == 7 and len(refused) == 17


def test_a_tenant_uses_so_many_tokens_a_day_those_under_way_included(store: Store) -> None:
    limits = TenantLimits(tokens_a_day=100)
    first = add(store, ANN, limits, Demand(tokens=60))
    with pytest.raises(QuotaError, match="has 41 tokens; tenant lab has 40 of 100 left today") as caught:
        add(store, BEN, limits, Demand(tokens=41))
    until_midnight = midnight_after(time.time()) - time.time()
    assert abs((caught.value.retry_after_s or 0) - until_midnight) < 5
    add(store, BEN, limits, Demand(tokens=40))
    end(store, first, tokens=50, run_seconds=1.0)  # a generation that ended early
    with pytest.raises(QuotaError, match="10 of 100 left"):
        add(store, ANN, limits, Demand(tokens=11))
    add(store, ANN, limits, Demand(tokens=10))
    with pytest.raises(TooLargeError, match="has 101 tokens; tenant lab may use 100 a day"):
        add(store, ANN, limits, Demand(tokens=101))


def test_tokens_of_a_cancelled_request_that_never_ran_are_given_back(store: Store) -> None:
    limits = TenantLimits(tokens_a_day=100)
    first = add(store, ANN, limits, Demand(tokens=100))
    with pytest.raises(QuotaError):
        add(store, ANN, limits, Demand(tokens=1))
    store.cancel(first)
    second = add(store, ANN, limits, Demand(tokens=100))
    end(store, second, RunError("its own fault"), run_seconds=0.5, token_layers=9)
    with pytest.raises(QuotaError):  # it ran
        add(store, ANN, limits, Demand(tokens=1))


def test_results_contents_and_what_is_under_way_are_stored_bytes(store: Store) -> None:
    limits = TenantLimits(bytes_stored=1000)
    first = add(store, ANN, limits, Demand(result_bytes=500, kept_bytes=200))
    with pytest.raises(QuotaError, match="leaves 301 bytes on the service; tenant lab has 300 of 1,000 left"):
        add(store, BEN, limits, Demand(result_bytes=301))
    second = add(store, BEN, limits, Demand(result_bytes=300))
    store.cancel(second)
    end(store, first)  # its result came out as 100 bytes
    with store._db.transaction() as db:
        for owner, size in (("lab~ann", 300), ("lab~ben", 50), ("labs~ann", 5000), ("other~ann", 5000)):
            db.execute(
                "INSERT INTO contents (owner, digest, bytes, used, is_uploaded) VALUES (?, 'd', ?, 0, 1)", (owner, size)
            )
    with pytest.raises(QuotaError, match="has 550 of 1,000 left"):
        add(store, ANN, limits, Demand(result_bytes=551))
    add(store, ANN, limits, Demand(result_bytes=550))
    with pytest.raises(TooLargeError, match="1 KB"):
        add(store, ANN, limits, Demand(result_bytes=1001))


def test_who_waits_for_stored_bytes_is_told_when_enough_results_have_expired(store: Store) -> None:
    limits = TenantLimits(bytes_stored=1000)
    now = time.time()
    for age in (700, 500, 100):
        request = add(store, ANN, limits)
        end(store, request)
        with store._db.transaction() as db:
            db.execute("UPDATE requests SET finished = ? WHERE id = ?", (now - age, request))
    waits = []
    for wanted in (701, 801, 901):
        with pytest.raises(QuotaError) as caught:
            add(store, ANN, limits, Demand(result_bytes=wanted))
        waits.append(caught.value.retry_after_s)
    assert waits == [pytest.approx(TTL_S - age, abs=5) for age in (700, 500, 100)]
    with store._db.transaction() as db:
        db.execute("INSERT INTO contents (owner, digest, bytes, used, is_uploaded) VALUES ('lab~ann', 'd', 600, 0, 1)")
    with pytest.raises(QuotaError) as caught:  # results alone do not do it
        add(store, ANN, limits, Demand(result_bytes=500))
    assert caught.value.retry_after_s is None


def test_a_full_queue_is_503_for_all_and_a_tenants_part_of_it_for_the_tenant(store: Store) -> None:
    for _ in range(2):
        add(store, ANN, TenantLimits(), most=4, most_of_tenant=2)
    with pytest.raises(
        CapacityError, match="2 requests of tenant lab are waiting for m, the most it takes of one"
    ) as e:
        add(store, BEN, TenantLimits(), most=4, most_of_tenant=2)
    assert not isinstance(e.value, QuotaError) and e.value.retry_after_s
    for _ in range(2):
        add(store, ELSEWHERE, TenantLimits(), most=4, most_of_tenant=2)
    third = Identity(tenant="third", user="x")
    with pytest.raises(CapacityError, match="4 requests are waiting for m, the most it takes"):
        add(store, third, TenantLimits(), most=4, most_of_tenant=2)
    add(store, third, TenantLimits(), model="n", most=4, most_of_tenant=2)
    with pytest.raises(CapacityError, match="1 requests are waiting for n"):
        add(store, third, TenantLimits(), model="n", deployments=TenantLimits(requests_in_flight=1))


def test_who_finds_a_full_queue_is_told_how_long_it_takes_to_work_off(store: Store) -> None:
    ended = [add(store, ANN, TenantLimits()) for _ in range(10)]
    for request in ended:
        end(store, request)
    now = store.now()
    with store._db.transaction() as db:  # one each two seconds
        for age, request in enumerate(reversed(ended)):
            db.execute("UPDATE requests SET finished = ? WHERE id = ?", (now - 2 * (age + 1), request))
    for waiting, expected in ((1, 2.0), (4, 8.0), (9, MAX_RETRY_S)):
        while store.num_open("m") < waiting:
            add(store, ANN, TenantLimits())
        with pytest.raises(CapacityError) as full:
            add(store, BEN, TenantLimits(), most=waiting)
        assert full.value.retry_after_s == pytest.approx(expected, rel=0.1)
    with pytest.raises(CapacityError) as own:
        add(store, ANN, TenantLimits(), most=99, most_of_tenant=9)
    assert own.value.retry_after_s == MAX_RETRY_S
    plan = store._db.rows(f"EXPLAIN QUERY PLAN {LATEST}", ("m", now - 60, 64))
    assert any("requests_finished" in row[3] for row in plan), plan


def test_what_is_refused_leaves_nothing(store: Store) -> None:
    limits = TenantLimits(requests_in_flight=0)
    with pytest.raises(QuotaError):
        add(store, ANN, limits)
    assert store.open_requests() == {} and not store._db.rows("SELECT 1 FROM facts")


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_bucket_holds_a_minutes_requests_and_fills_evenly() -> None:
    clock, owner = Clock(), ("tenant", "lab")
    rates = Rates(clock)
    clock.now += 3600  # the gateway has run for long
    rates.begin(owner, 6, 0)
    for _ in range(6):
        assert rates.wait_s(owner, 6) == 0
        rates.take(owner, 6)
    assert rates.wait_s(owner, 6) == pytest.approx(10)
    clock.now += 9.9
    assert 0 < rates.wait_s(owner, 6) < 0.2
    clock.now += 0.1
    assert rates.wait_s(owner, 6) == 0
    clock.now += 1e6
    for _ in range(6):
        rates.take(owner, 6)
    assert rates.wait_s(owner, 6) > 0


@pytest.mark.parametrize("taken", [0, 3, 6, 9])
def test_after_a_restart_no_bucket_has_more_than_it_had(taken: int) -> None:
    """Whatever was left before: nobody gains a minute's requests by a restart."""
    clock, owner = Clock(), ("tenant", "lab")
    rates = Rates(clock)
    rates.begin(owner, 6, taken)
    had = 0
    while rates.wait_s(owner, 6) == 0:
        rates.take(owner, 6)
        had += 1
    assert had == (1 if taken < 6 else 0)  # at most what comes in any case
    clock.now += 60
    assert rates.wait_s(owner, 6) == 0


def test_a_rate_of_none_is_never() -> None:
    assert Rates(Clock()).wait_s(("tenant", "lab"), 0) == float("inf")


class Demanding(Agreeable):
    """Takes what a request costs from its bytes: so many tokens as it is long."""

    async def check(self, model: str, version: str, path: Path, *, contents: Path, certify: bool) -> Verdict:
        return Verdict(facts=b"[]", demand=Demand(tokens=path.stat().st_size, passes=1))

    async def nearest(
        self, model: str, version: str, path: Path, *, contents: Path, most: Mapping[str, int]
    ) -> str | None:
        return f"{most['tokens']} tokens would fit" if "tokens" in most else None


@pytest.fixture
def service(tmp_path: Path) -> Iterator[GatewayService]:
    service = GatewayService(tmp_path / "store", Demanding(), description_of_nothing())
    yield service
    service.close()


def limit(service: GatewayService, **limits: int) -> None:
    with service.store._db.transaction() as db:
        db.execute("DELETE FROM tenants")
        db.execute(
            "INSERT INTO tenants (name, created, limits) VALUES ('default', 0, ?)", (text_of(TenantLimits(**limits)),)
        )
    service.gateway._admission.forget()


def test_over_http_a_quota_is_429_with_the_seconds_to_wait(service: GatewayService) -> None:
    limit(service, tokens_a_day=10)
    post = lambda size: service.http.post("/v1/models/m/requests", content=b"x" * size)  # noqa: E731
    assert post(8).status_code == 202
    refused = post(5)
    assert refused.status_code == 429 and refused.json()["code"] == "quota"
    assert refused.json()["detail"].endswith("2 of 10 left today (UTC): 2 tokens would fit")
    left = midnight_after(time.time()) - time.time()
    assert left - 5 < int(refused.headers["Retry-After"]) <= left + 5
    assert post(2).status_code == 202
    limit(service, requests_in_flight=2)
    assert post(1).status_code == 429
    assert len(list((service.store.folder / "requests").glob("*"))) == 2


def test_who_is_refused_again_and_again_takes_little_of_the_workers_time(service: GatewayService) -> None:
    limit(service, tokens_a_day=10)
    rates = service.gateway._admission._rates
    rates.begin_full(("searches", "default"), SEARCH_S)
    rates.take(("searches", "default"), SEARCH_S, SEARCH_S)
    refused = service.http.post("/v1/models/m/requests", content=b"x" * 11)
    assert refused.status_code == 413 and "would fit" not in refused.json()["detail"]


def test_over_http_who_comes_as_late_as_retry_after_says_is_taken(service: GatewayService) -> None:
    limit(service, requests_a_minute=60)
    post = lambda: service.http.post("/v1/models/m/requests", content=b"x")  # noqa: E731
    answers = [post() for _ in range(12)]
    refused = answers[-1]
    assert answers[0].status_code == 202 and refused.status_code == 429
    assert "may send 60 requests a minute" in refused.json()["detail"]
    assert refused.headers["Retry-After"] == "1"
    time.sleep(1)
    assert post().status_code == 202
    codes = {service.http.post("/v1/completions", json={"model": "m", "prompt": "a"}).status_code for _ in range(4)}
    assert 429 in codes


def test_over_http_an_upload_beyond_the_bytes_stored_is_refused_before_it_comes(service: GatewayService) -> None:
    limit(service, bytes_stored=1000)
    put = service.http.put(f"/v1/constants/{'0' * 64}", content=b"x" * 1001)
    assert put.status_code == 413 and "tenant default may store 1 KB" in put.json()["detail"]
    with service.store._db.transaction() as db:
        db.execute(
            "INSERT INTO contents (owner, digest, bytes, used, is_uploaded) VALUES ('default~b', 'd', 600, 0, 1)"
        )
    put = service.http.put(f"/v1/constants/{'0' * 64}", content=b"x" * 401)
    assert put.status_code == 429 and "has 400 of 1,000 left" in put.json()["detail"]


def test_a_request_that_has_ended_makes_room_for_the_next(service: GatewayService) -> None:
    limit(service, requests_in_flight=1)
    first = service.http.post("/v1/models/m/requests", content=b"x").json()["id"]
    assert service.http.post("/v1/models/m/requests", content=b"x").status_code == 429
    assert service.claim() == first
    service.finish(RequestId(first))
    assert service.store.statuses([RequestId(first)])[RequestId(first)].state is RequestState.DONE
    assert service.http.post("/v1/models/m/requests", content=b"x").status_code == 202


def test_limits_as_text_are_checked() -> None:
    own = limits_from_text('{"tokens_a_day": 5}', "the limits of lab")
    both = own.over(TenantLimits(tokens_a_day=9, passes=3))
    assert (both.tokens_a_day, both.passes, both.token_layers) == (5, 3, None)
    assert limits_from_text(None, "x") == TenantLimits() and limits_from_text(text_of(both), "x") == both
    for wrong in ("[]", "{", '{"tokens": 5}', '{"passes": -1}', '{"passes": "many"}'):
        with pytest.raises(UserError, match="the limits of lab"):
            limits_from_text(wrong, "the limits of lab")
