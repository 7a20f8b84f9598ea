"""`polytrace doctor` and `polytrace top` of a real gateway, and `/readyz` while its objects are away."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from gateways import Agreeable, GatewayService, body, description_of_nothing, wait_until
from typer.testing import CliRunner

from api import doctor, figures
from api.commands import app
from api.doctor import Finding, Grade, worst
from api.identity import LOCAL
from cluster.requests import DeploymentState, Finished, PassFigures
from scheduling.plan import RequestId

KEY = "pt_operators-own"


@pytest.fixture
def service(tmp_path: Path) -> Iterator[GatewayService]:
    service = GatewayService(
        tmp_path / "s", Agreeable(), description_of_nothing(), key=KEY, objects=f"file://{tmp_path}/objects"
    )
    yield service
    service.close()


def run(*arguments: str) -> tuple[int, list[dict[str, Any]]]:
    answer = CliRunner().invoke(app, [*arguments, "--json"])
    return answer.exit_code, [json.loads(line) for line in answer.stdout.splitlines()]


def grades(found: list[dict[str, Any]]) -> dict[str, str]:
    return {one["what"]: one["grade"] for one in found}


def test_a_good_service_is_well_and_a_failed_deployment_is_not(service: GatewayService) -> None:
    code, found = run("doctor", "--url", service.url, "--key", KEY)
    told = grades(found)
    of_service = {"gateway", "clocks", "key", "ready", "model m", "metrics"}
    assert of_service <= told.keys() and {told[what] for what in of_service} == {"ok"}
    assert {"python", "packages", "disk", "open files", "gpus"} <= told.keys()
    assert code == (1 if "fail" in told.values() else 0)

    service.store.set_state("m", DeploymentState.FAILED, "no room for 8 GPUs\nTraceback")
    wait_until(lambda: service.http.get("/readyz").status_code == 503)
    code, found = run("doctor", "--url", service.url, "--key", KEY)
    bad = next(one for one in found if one["what"] == "model m")
    assert code == 1 and bad["grade"] == "fail" and bad["told"] == "failed: no room for 8 GPUs" and bad["next"]
    assert grades(found)["ready"] == "fail"


def test_a_deployment_that_takes_nothing_is_told_with_what_ends_that() -> None:
    drained = doctor._deployment("m", "drained", "draining", "it takes no requests")
    assert drained.grade is Grade.WARN and "polytrace resume m" in drained.next_step
    waiting = doctor._deployment("m", "waiting", "draining", "drained; no room")
    assert waiting.told == "is draining, waiting: drained; no room" and "polytrace resume m" in waiting.next_step
    for mode in ("removing", "dropping"):
        told = doctor._deployment("m", "draining", mode, "is removed")
        assert told.grade is Grade.WARN and "resume" not in told.next_step and "deploy" not in told.next_step
    assert doctor._deployment("m", "failed", "draining", "drained; boom").grade is Grade.FAIL


def test_wrong_keys_and_closed_ports_are_told_with_the_next_step(service: GatewayService) -> None:
    code, found = run("doctor", "--url", service.url, "--key", "pt_no-such-key")
    assert code == 1 and grades(found)["key"] == "fail" and "metrics" not in grades(found)
    _, secret = service.store.keys.make("default", "ada", LOCAL)
    _, found = run("doctor", "--url", service.url, "--key", secret)
    assert grades(found)["key"] == "ok" and grades(found)["metrics"] == "warn"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        code, found = run("doctor", "--url", f"http://127.0.0.1:{taken.getsockname()[1]}")
    assert code == 1 and found[-1]["what"] == "gateway" and "polytrace serve" in found[-1]["next"]


def test_what_a_machine_lacks_is_graded(tmp_path: Path) -> None:
    assert doctor._open_files(256).grade is Grade.WARN and doctor._open_files(1 << 20).grade is Grade.OK
    assert doctor._shared_memory(tmp_path / "none").grade is Grade.WARN
    assert doctor._disk(tmp_path / "not" / "there" / "yet").told.endswith(f"at {tmp_path.resolve()}")
    assert doctor._clock("Thu, 01 Jan 2026 00:00:00 GMT").grade is Grade.WARN
    assert worst([Finding(Grade.WARN, "a", ""), Finding(Grade.OK, "b", "")]) is Grade.WARN


def test_ready_is_who_can_store_what_comes(service: GatewayService, tmp_path: Path) -> None:
    assert service.http.get("/readyz").status_code == 200
    objects = tmp_path / "objects"
    away = tmp_path / "away"
    objects.rename(away)
    objects.write_text("in the way")  # writing below it fails, as with a place that is gone
    wait_until(lambda: service.http.get("/readyz").status_code == 503, 60)
    assert httpx.get(f"{service.url}/healthz").status_code == 200
    objects.unlink()
    away.rename(objects)
    wait_until(lambda: service.http.get("/readyz").status_code == 200)


def test_top_tells_what_went_on_meanwhile(service: GatewayService) -> None:
    ids = [RequestId(service.http.post("/v1/models/m/requests", content=body()).json()["id"]) for _ in range(5)]
    assert len(service.store.claim("m", 4)) == 4

    def scrapes() -> float:
        told = service.store.tally.spreads(figures.HTTP).items()
        return sum(below[-1] for labels, (_, below) in told if labels[0] == "/metrics")

    def work() -> None:
        wait_until(lambda: scrapes() > before, 60)  # it has looked once
        service.store.note_pass(
            "m", PassFigures(requests=(RequestId("a"),) * 4, rows=12, seconds=0.1, busy_seconds=(0.1,))
        )
        for request in ids[:4]:
            place = service.store.place_result(request, 8192, 0)
            service.store.finish(
                [
                    Finished(
                        request=request,
                        header=b" " * place.start,
                        size=8192,
                        token_layers=25,
                        token_layers_alone=100,
                        run_seconds=1.0,
                    )
                ]
            )

    before = scrapes()
    worker = threading.Thread(target=work)
    worker.start()
    code, (told,) = run("top", "--once", "--every", "4", "--url", service.url, "--key", KEY)
    worker.join()
    assert code == 0
    (row,) = told["models"]
    seconds = told["seconds"]
    assert (row["model"], row["state"], row["queued"], row["running"]) == ("m", "ready", 1, 0)
    assert row["users_per_pass"] == 4 and row["saved"] == pytest.approx(0.75)
    assert row["ended"] * seconds == pytest.approx(4) and row["token_layers"] * seconds == pytest.approx(100)
    (tenant,) = told["tenants"]
    assert tenant["tenant"] == "default" and tenant["token_layers"] * seconds == pytest.approx(100)
    shown = CliRunner().invoke(app, ["top", "--once", "--every", "0.2", "--url", service.url, "--key", KEY])
    assert shown.exit_code == 0 and "token-layers/s" in shown.stdout and "ready" in shown.stdout
