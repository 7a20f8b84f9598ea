"""A submit that is sent again with its key is the same request: one run, one answer, whenever and however often."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from gateways import Agreeable, GatewayService, body, description_of_nothing, wait_until

import api.idempotency
from api.idempotency import Submit
from api.identity import LOCAL, Identity
from api.status import RequestState
from api.store import Store
from api.worker import Verdict
from cluster.requests import DeploymentState
from polytrace.errors import ConflictError, RunError
from scheduling.plan import RequestId

PATH = "/v1/models/m/requests"
KEY = {"Idempotency-Key": "a-key"}


class Slow(Agreeable):
    """Takes every request, after both of a pair have come."""

    def __init__(self) -> None:
        self.together: threading.Barrier | None = None

    async def check(self, model: str, version: str, path: Path, *, contents: Path, certify: bool) -> Verdict:
        if self.together is not None:
            import asyncio

            await asyncio.get_running_loop().run_in_executor(None, self.together.wait, 10)
        return await super().check(model, version, path, contents=contents, certify=certify)


@pytest.fixture
def checker() -> Slow:
    return Slow()


@pytest.fixture
def service(tmp_path: Path, checker: Slow) -> Iterator[GatewayService]:
    service = GatewayService(tmp_path / "store", checker, description_of_nothing())
    yield service
    service.close()


@pytest.fixture
def each_service(tmp_path: Path, checker: Slow, database_url: str) -> Iterator[GatewayService]:
    """On both databases."""
    service = GatewayService(tmp_path / "store", checker, description_of_nothing(), database=database_url)
    yield service
    service.close()


def post(service: GatewayService, number: int = 1, key: str | None = "a-key", **headers: str) -> httpx.Response:
    own = {} if key is None else {"Idempotency-Key": key}
    return service.http.post(PATH, content=body(number), headers=own | headers)


def num_requests(service: GatewayService) -> int:
    counts = service.store.open_requests().get("m", {})
    return sum(counts.values())


def test_a_submit_with_its_key_is_one_request_while_it_waits_runs_and_is_done(service: GatewayService) -> None:
    first = post(service)
    assert first.status_code == 202
    assert post(service).json()["id"] == first.json()["id"] and num_requests(service) == 1
    request = service.claim()
    assert post(service).json() | {"state": "running"} == post(service).json()
    service.finish(request)
    answers = [post(service), post(service)]
    assert [answer.status_code for answer in answers] == [200, 200]
    assert answers[0].content == answers[1].content == service.http.get(f"/v1/requests/{request}/result").content
    assert answers[0].headers["x-request-id"] == request
    assert post(service, key="another").json()["id"] != request, "another key is another request"
    assert post(service, key=None).json()["id"] != request
    names = {path.stem for path in (service.store.folder / "requests").iterdir()}
    assert len(names) == num_requests(service) == 2, "no file of a submit that came again stays"


def test_a_submit_that_failed_is_answered_for_with_its_failure(service: GatewayService) -> None:
    request = post(service).json()["id"]
    assert service.claim() == request
    service.finish(RequestId(request), error=RunError("index 9 is out of range"))
    again = post(service)
    assert again.status_code == 422 and again.json()["detail"] == "index 9 is out of range"


@pytest.mark.parametrize("number", [2, 200])
def test_a_key_of_other_bytes_is_refused(service: GatewayService, number: int) -> None:
    request = post(service).json()["id"]
    refused = post(service, number)
    assert refused.status_code == 409 and "'a-key' was sent with another request before" in refused.json()["detail"]
    longer = service.http.post(PATH, content=body() + b"\0" * (8 << 20), headers=KEY)
    assert longer.status_code == 409
    assert service.claim() == request and num_requests(service) == 1


@pytest.mark.parametrize("key", ["", "a key", "k" * 129, "schlüssel".encode()])
def test_what_can_be_no_key_is_refused(service: GatewayService, key: str | bytes) -> None:
    answer = service.http.post(PATH, content=body(), headers={"Idempotency-Key": key})
    assert answer.status_code == 400 and "1 to 128 visible characters" in answer.json()["detail"]
    assert num_requests(service) == 0


def test_two_submits_at_the_same_time_are_one_request(each_service: GatewayService, checker: Slow) -> None:
    service = each_service
    checker.together = threading.Barrier(2)  # both are checked before either is accepted
    with ThreadPoolExecutor(2) as callers:
        waiting = [callers.submit(post, service, Prefer="wait=20") for _ in range(2)]
        request = service.claim()
        assert not service.store.claim("m", 9), "there is one"
        service.finish(request)
        answers = [answer.result() for answer in waiting]
    assert [answer.status_code for answer in answers] == [200, 200]
    assert answers[0].content == answers[1].content
    assert {answer.headers["x-request-id"] for answer in answers} == {request}


def test_a_caller_whose_connection_broke_comes_back_to_his_request(
    service: GatewayService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api.idempotency, "GRACE_S", 1.0)
    with pytest.raises(httpx.ReadTimeout):
        service.http.post(PATH, content=body(), headers=KEY | {"Prefer": "wait=20"}, timeout=0.5)
    request = service.claim()
    with ThreadPoolExecutor(1) as caller:
        again = caller.submit(post, service, Prefer="wait=20")
        time.sleep(1.5)  # the grace would be over
        assert not service.store.cancellations("m")
        service.finish(request)
        assert again.result().status_code == 200


def test_a_caller_who_does_not_come_back_has_his_request_cancelled(
    service: GatewayService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api.idempotency, "GRACE_S", 0.2)
    with pytest.raises(httpx.ReadTimeout):
        service.http.post(PATH, content=body(), headers=KEY | {"Prefer": "wait=20"}, timeout=0.5)
    request = service.claim()
    wait_until(lambda: service.store.cancellations("m") == [request])


def test_what_is_taken_back_by_its_key_is_cancelled_at_once_also_when_it_is_not_accepted_yet(
    service: GatewayService, checker: Slow
) -> None:
    with pytest.raises(httpx.ReadTimeout):
        service.http.post(PATH, content=body(), headers=KEY | {"Prefer": "wait=20"}, timeout=0.5)
    request = service.claim()
    assert service.http.delete(PATH, headers=KEY).json()["id"] == request
    assert service.store.cancellations("m") == [request]
    checker.together = threading.Barrier(2)  # it is being checked
    with ThreadPoolExecutor(1) as caller:
        late = caller.submit(post, service, key="late", Prefer="wait=20")
        wait_until(lambda: checker.together is not None and checker.together.n_waiting == 1)
        assert service.http.delete(PATH, headers={"Idempotency-Key": "late"}).json() == {"id": None}
        checker.together.wait()
        assert late.result().status_code == 409 and late.result().json()["code"] == "cancelled"
    assert service.http.delete(PATH).status_code == 400


def test_a_submit_that_was_accepted_is_answered_for_when_the_deployment_takes_no_more(service: GatewayService) -> None:
    request = post(service).json()["id"]
    service.store.drain("m")
    wait_until(lambda: post(service, key="new").status_code == 503)
    assert post(service).json()["id"] == request


def test_a_key_is_its_owners_and_goes_with_its_request(tmp_path: Path, database_url: str) -> None:
    store = Store(tmp_path / "store", database=database_url)
    store.set_state("m", DeploymentState.READY, "ready")
    ada, submit = Identity(tenant="lab", user="ada"), Submit(key="k", digest="7-abc")

    def add(caller: Identity, what: Submit = submit) -> RequestId:
        request = store.new_id()
        store.request_path(request).write_bytes(b"request")
        return store.add(request, "m", b"[]", work=1, max_open=9, caller=caller, submit=what).id

    mine = add(ada)
    others = add(LOCAL)
    with pytest.raises(api.idempotency.AcceptedBeforeError, match=mine):
        add(ada)
    with pytest.raises(ConflictError):
        add(ada, Submit(key="k", digest="7-abd"))
    assert store.submitted(ada.owner, "k") == (mine, submit) and store.submitted(LOCAL.owner, "k") == (others, submit)
    store.cancel(mine)
    assert store.submitted(ada.owner, "k") is not None, "as long as its state"
    assert store.drop_ended(store.now() + 1) == [mine]
    assert store.submitted(ada.owner, "k") is None
    again = store.status(add(ada))
    assert again is not None and again.state is RequestState.QUEUED
    store.close()


def test_what_comes_again_is_held_to_the_pace_of_uploads_and_may_leave(service: GatewayService) -> None:
    content = body()
    submits = service.gateway._submits
    submits._settings = replace(submits._settings, upload_idle_s=0.2)
    assert post(service).status_code == 202
    head = f"POST {PATH} HTTP/1.1\r\nHost: here\r\nIdempotency-Key: a-key\r\nContent-Length: {len(content)}\r\n\r\n"
    address = ("127.0.0.1", service.http.base_url.port or 0)
    with socket.create_connection(address, timeout=30) as slow:
        slow.sendall(head.encode())
        answer = b""
        slow.settimeout(0.05)
        for byte in content:
            try:
                slow.sendall(bytes([byte]))
                answer = slow.recv(4096)
            except TimeoutError:
                continue
            except OSError:
                break
            if answer:
                break
        assert b"slower than" in answer
    with socket.create_connection(address, timeout=30) as gone:
        gone.sendall(head.encode() + content[:10])
    text = service.http.get("/metrics").text
    wait_until(lambda: 'status="499"' in service.http.get("/metrics").text)
    assert 'status="500"' not in text
