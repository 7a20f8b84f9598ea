"""The metrics of a real gateway, as Prometheus' own parser reads them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from gateways import Agreeable, GatewayService, body, description_of_nothing
from prometheus_client.parser import text_string_to_metric_families

from api import figures
from api.identity import LOCAL
from api.metrics import MAX_TENANTS, Metrics
from api.store import Store
from api.tally import Tally
from cluster.requests import Finished, PassFigures
from polytrace.errors import GraphError, ServiceError
from scheduling.plan import RequestId

KEY = "pt_operators-own"
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayService]:
    service = GatewayService(tmp_path_factory.mktemp("metrics") / "s", Agreeable(), description_of_nothing(), key=KEY)
    yield service
    service.close()


def parsed(text: str) -> Samples:
    found: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = sample.name, tuple(sorted(sample.labels.items()))
            assert key not in found, key
            found[key] = sample.value
    return found


def scraped(service: GatewayService) -> Samples:
    answer = service.http.get("/metrics")
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    return parsed(answer.text)


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples.get((name, tuple(sorted(labels.items()))), 0.0)


def test_metrics_are_for_operators(service: GatewayService) -> None:
    _, secret = service.store.keys.make("default", "ada", LOCAL)
    with httpx.Client(base_url=service.url) as client:
        assert client.get("/metrics").status_code == 401
        assert client.get("/metrics", headers={"Authorization": f"Bearer {secret}"}).status_code == 403


def test_whoever_reaches_a_service_without_keys_may_scrape_it(tmp_path: Path) -> None:
    service = GatewayService(tmp_path / "s", Agreeable(), description_of_nothing())
    assert value(scraped(service), "polytrace_database_up") == 1
    service.close()


def test_requests_are_counted_from_acceptance_to_their_end(service: GatewayService) -> None:
    before = scraped(service)
    waits = {"X-Polytrace-Class": "interactive"}
    ids = [service.http.post("/v1/models/m/requests", content=body(), headers=waits).json()["id"] for _ in range(4)]
    time.sleep(2.1)  # what stands in the database is looked up every two seconds
    waiting = scraped(service)
    assert value(waiting, "polytrace_requests", model="m", state="queued", **{"class": "interactive"}) == 4
    assert value(waiting, "polytrace_queue_oldest_seconds", model="m") >= 2.0

    assert len(service.store.claim("m", 3)) == 3
    service.finish(RequestId(ids[0]))
    service.finish(RequestId(ids[1]), error=GraphError("it reads layer 96"))
    service.store.finish(
        [
            Finished(
                request=RequestId(ids[2]),
                error=ServiceError("a shard is gone"),
                token_layers=7,
                moved_bytes=64,
                run_seconds=1.0,
            )
        ]
    )
    service.http.delete(f"/v1/requests/{ids[3]}")
    after = scraped(service)

    def more(name: str, **labels: str) -> float:
        return value(after, name, **labels) - value(before, name, **labels)

    kind = {"class": "interactive"}
    assert more("polytrace_requests_accepted_total", model="m", **kind) == 4
    for state, number in (("done", 1), ("failed", 2), ("cancelled", 1)):
        assert more("polytrace_requests_ended_total", model="m", state=state, **kind) == number
    for code, number in ((GraphError.code, 1), (ServiceError.code, 1), ("cancelled", 1)):
        assert more("polytrace_request_errors_total", model="m", code=code) == number
    assert more("polytrace_request_queue_seconds_count", model="m", **kind) == 3
    assert more("polytrace_request_run_seconds_count", model="m", **kind) == 3
    assert more("polytrace_request_queue_seconds_sum", model="m", **kind) >= 3 * 2.0
    assert more("polytrace_request_queue_seconds_bucket", model="m", le="1.0", **kind) == 0
    assert more("polytrace_token_layers_total", model="m") == 7
    assert more("polytrace_moved_bytes_total", model="m") == 64
    assert more("polytrace_check_seconds_count", model="m") == 4


def test_what_sharing_saved_and_results_weigh_is_counted(service: GatewayService) -> None:
    before = scraped(service)
    request = RequestId(service.http.post("/v1/models/m/requests", content=body()).json()["id"])
    assert request in [one.request for one in service.store.claim("m", 100)]
    place = service.store.place_result(request, 8192, 0)
    end = Finished(
        request=request, header=b" " * place.start, size=9000, token_layers=30, token_layers_alone=100, tokens=12
    )
    service.store.finish([end])
    service.store.finish([end])  # told twice, and counted once
    after = scraped(service)
    for name, more in (
        ("polytrace_token_layers_total", 30),
        ("polytrace_token_layers_alone_total", 100),
        ("polytrace_token_layers_saved_total", 70),
        ("polytrace_tokens_total", 12),
        ("polytrace_result_bytes_total", 9000),
    ):
        assert value(after, name, model="m") - value(before, name, model="m") == more, name


def test_calls_are_measured_by_route_and_refusals_counted_by_code(service: GatewayService) -> None:
    before = scraped(service)
    for number in range(3):
        assert service.http.get(f"/v1/requests/{number:032x}").status_code == 404
    assert service.http.get("/nowhere/to/be/found").status_code == 404
    assert service.http.request("PROPFIND", "/healthz").status_code == 405
    after = scraped(service)

    def more(name: str, **labels: str) -> float:
        return value(after, name, **labels) - value(before, name, **labels)

    one = {"method": "GET", "status": "404"}
    assert more("polytrace_http_seconds_count", route="/v1/requests/{request_id}", **one) == 3
    assert more("polytrace_http_seconds_count", route="none", **one) == 1
    assert more("polytrace_http_errors_total", code="not-found") == 4
    assert not any("PROPFIND" in str(key) or "nowhere" in str(key) for key in after)


def test_what_nobody_foresaw_is_counted_as_the_services_fault(
    service: GatewayService, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError

    before = scraped(service)
    monkeypatch.setattr(service.store, "new_id", broken)
    assert service.http.post("/v1/models/m/requests", content=b"1").status_code == 500
    with httpx.Client(
        base_url=service.http.base_url, headers=service.http.headers
    ) as other:  # the first one was closed
        after = parsed(other.get("/metrics").text)
    labels = {"method": "POST", "status": "500", "route": "/v1/models/{name}/requests"}
    assert value(after, "polytrace_http_seconds_count", **labels) == 1
    name = "polytrace_http_errors_total"
    assert value(after, name, code="service") - value(before, name, code="service") == 1


def test_the_controllers_counts_are_read_from_its_file(service: GatewayService) -> None:
    controllers = Store(service.store.folder, counts_as="controller")
    told = PassFigures(requests=(RequestId("a"),) * 3, rows=40, seconds=0.2, busy_seconds=(0.1, 0.05))
    controllers.note_pass("m", told)
    controllers.note_pass("m", told)
    controllers.close()
    samples = scraped(service)
    assert value(samples, "polytrace_passes_total", model="m") == 2
    assert value(samples, "polytrace_pass_rows_total", model="m") == 80
    assert value(samples, "polytrace_pass_users_sum", model="m") == 6
    assert value(samples, "polytrace_pass_users_bucket", model="m", le="2.0") == 0
    assert value(samples, "polytrace_pass_users_bucket", model="m", le="4.0") == 2
    assert value(samples, "polytrace_stage_busy_seconds_total", model="m", stage="1") == pytest.approx(0.1)


def test_deployments_are_told_by_state(service: GatewayService) -> None:
    samples = scraped(service)
    assert value(samples, "polytrace_deployment_state", model="m", state="ready") == 1
    assert value(samples, "polytrace_deployment_state", model="m", state="failed") == 0
    assert ("polytrace_deployment_state", (("model", "m"), ("state", "failed"))) in samples


def test_a_hundred_tenants_have_figures_of_their_own(tmp_path: Path) -> None:
    store = Store(tmp_path / "s")
    with store.database.transaction() as db:
        db.executemany(
            "INSERT INTO usage (tenant, user_name, model, day, token_layers) VALUES (?, 'u', 'm', '2026-01-01', ?)",
            [(f"t{number:03}", number) for number in range(MAX_TENANTS + 3)],
        )
    samples = parsed(Metrics(store).text().decode())
    of_tenants = {key: found for key, found in samples.items() if key[0] == "polytrace_tenant_token_layers_total"}
    assert len(of_tenants) == MAX_TENANTS + 1
    assert value(samples, "polytrace_tenant_token_layers_total", tenant="t042") == 42
    assert value(samples, "polytrace_tenant_token_layers_total", tenant="other") == 100 + 101 + 102
    store.close()


def test_counts_go_on_after_a_restart_and_a_spoilt_file_begins_again(tmp_path: Path) -> None:
    path = tmp_path / "gateway.counts"
    first = Tally(path)
    first.count(figures.PASSES, "m", by=2)
    first.observe(figures.PASS_USERS, "m", value=3)
    first.save()
    second = Tally(path)
    second.count(figures.PASSES, "m")
    assert second.counts(figures.PASSES) == {("m",): 3}
    assert second.spreads(figures.PASS_USERS)[("m",)][0] == 3
    second.save()
    path.write_text('{"counts": [["x"]]}')
    assert Tally(path).counts(figures.PASSES) == {}


def test_counts_are_written_without_being_closed(tmp_path: Path) -> None:
    path = tmp_path / "controller.counts"
    tally = Tally(path)
    tally.count(figures.PASSES, "m")
    deadline = time.monotonic() + 10
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert Tally(path).counts(figures.PASSES) == {("m",): 1}
