"""The gateway over real HTTP. Checking and running are small stand-ins here; the whole service is in test_serve.py."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import httpx
import pytest
from gateways import description_of_nothing, receipt_of, wait_until

from api.gateway import Gateway
from api.server import GatewayServer, bind
from api.settings import GatewaySettings
from api.status import RequestState
from api.store import Store
from api.worker import Verdict
from cluster.config import Mode
from cluster.requests import Claimed, DeploymentState, Finished, Published
from polytrace.codec import from_json, to_json
from polytrace.description import ModelDescription
from polytrace.errors import CancelledError, CapacityError, GraphError, NotFoundError, PolytraceError, RunError
from polytrace.graph import Constant, Graph, Invoke, NodeId, Options, Ref, Request, Save
from polytrace.tensors import RawTensor
from polytrace.wire import VERSION, decode_request, decode_result, encode_request, result_header
from scheduling.plan import RequestId, SaveSlot, ValueFacts

KEY = "sesame"
SUCCEED, FAIL, HOLD, REFUSE = range(4)  # what the stand-ins do with a request, by its seed
MAX_BYTES = 1 << 20


class StandInChecker:
    """Decodes the file as the real workers do and knows one refusal."""

    def start(self) -> None:
        pass

    async def warm(self, model: str, version: str) -> None:
        pass

    async def check(self, model: str, version: str, path: Path, *, contents: Path, certify: bool) -> Verdict:
        try:
            request = decode_request(path.read_bytes())
            if request.options.seed == REFUSE:
                raise GraphError("graph reads layer 96; this model has layers 0-95", where="experiment.py:12")
        except PolytraceError as error:
            return Verdict(error=error.to_fields())
        return Verdict(facts=b"[]", certificate=b'{"passes": 1}' if certify else None)

    async def nearest(
        self, model: str, version: str, path: Path, *, contents: Path, most: Mapping[str, int]
    ) -> str | None: ...

    def close(self) -> None:
        pass


class StandInController(threading.Thread):
    """Ends requests as their seed says, without a model."""

    def __init__(self, store: Store) -> None:
        super().__init__(daemon=True)
        self.store = store
        self.is_stopped = False
        self.held: set[RequestId] = set()

    def run(self) -> None:
        while not self.is_stopped:
            for claimed in self.store.claim("m", 100):
                self.end(claimed)
            for request in self.store.cancellations("m"):
                self.held.discard(request)
                self.store.finish([Finished(request=request, error=CancelledError("the request was cancelled"))])
            self.store.wait_for_requests(1.0)

    def end(self, claimed: Claimed) -> None:
        request = decode_request(claimed.path.read_bytes())
        if request.options.seed == HOLD:
            self.held.add(claimed.request)
        elif request.options.seed == FAIL:
            error = RunError("index 9 is out of range", where="experiment.py:3")
            self.store.finish([Finished(request=claimed.request, error=error)])
        else:
            data = bytes(request.constants["c"].data)
            facts = ValueFacts(shape=request.constants["c"].shape, dtype="float32", num_bytes=len(data))
            slots = [SaveSlot(name="out", node=NodeId(1), stage=0, facts=facts, offset=0)]
            place = self.store.place_result(claimed.request, 4096, len(data))
            with place.path.open("r+b") as file:
                file.seek(place.start)
                file.write(data)
            header = result_header(slots, receipt_of(claimed.request), place.start)
            self.store.finish([Finished(request=claimed.request, header=header)])

    def stop(self) -> None:
        self.is_stopped = True
        self.store.interrupt()
        self.join(timeout=10)


class Service:
    def __init__(self, folder: Path, key: str | None) -> None:
        self.store = Store(folder)
        self.controller = StandInController(self.store)
        self.controller.start()
        settings = GatewaySettings(store=str(folder), max_wait_s=600.0, upload_idle_s=1.0, max_open=50, shutdown_s=1.0)
        self.server = GatewayServer(Gateway(self.store, settings, StandInChecker(), key), settings)
        self.listener = bind("127.0.0.1", 0)
        self.port = self.listener.getsockname()[1]
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.listener]}, daemon=True)
        self.thread.start()
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", headers=headers, timeout=30)

    def publish(self) -> None:
        body = json.dumps(to_json(description_of_nothing())).encode()
        self.store.set_state("m", DeploymentState.STARTING, "loading shard 1 of 4")
        self.store.publish("m", Published(source="none", dtype="auto", description=body, tokenizer=b'{"t": 1}'))
        self.store.set_state("m", DeploymentState.READY, "ready")
        wait_until(lambda: self.http.get("/readyz").status_code == 200)

    def state(self, request: str) -> RequestState:
        status = self.store.status(RequestId(request))
        assert status is not None
        return status.state

    def close(self) -> None:
        self.http.close()
        self.server.should_exit = True
        self.thread.join(timeout=10)
        self.controller.stop()
        self.store.close()


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    service = Service(tmp_path_factory.mktemp("gateway") / "store", KEY)
    service.publish()
    yield service
    service.close()


def test_a_waiting_submit_is_answered_with_the_result(service: Service) -> None:
    answer = service.http.post("/v1/models/m/requests", content=body(SUCCEED), headers={"Prefer": "wait=10"})
    assert answer.status_code == 200, answer.text
    values, got = decode_result(answer.content)
    assert bytes(values["out"].data) == b"\1" * 16
    assert got.request == answer.headers["x-request-id"]
    assert int(answer.headers["content-length"]) == len(answer.content)
    again = service.http.get(f"/v1/requests/{got.request}/result")
    assert again.content == answer.content


def test_a_result_comes_by_the_ring_and_not_by_looking_again(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api.waiting.RECHECK_S", 3600.0)
    for _ in range(10):  # a ring that is lost ends in the client's time-out
        answer = service.http.post("/v1/models/m/requests", content=body(SUCCEED), headers={"Prefer": "wait=600"})
        assert answer.status_code == 200, answer.text


def test_a_submit_that_does_not_wait_is_polled_and_fetched(service: Service) -> None:
    accepted = service.http.post("/v1/models/m/requests", content=body(SUCCEED))
    assert accepted.status_code == 202
    place = accepted.headers["location"]
    status = service.http.get(place, params={"wait": 10}).json()
    assert status["state"] == "done"
    assert status["id"] == accepted.json()["id"]
    part = service.http.get(status["result"], headers={"Range": "bytes=0-7"})
    assert part.status_code == 206 and len(part.content) == 8
    head = service.http.head(status["result"])
    assert head.status_code == 200 and int(head.headers["content-length"]) > 4096
    assert head.headers["etag"] == part.headers["etag"]


def test_a_large_result_streams_whole(service: Service) -> None:
    answer = service.http.post(
        "/v1/models/m/requests", content=body(SUCCEED, num_floats=250_000), headers={"Prefer": "wait=10"}
    )
    values, _ = decode_result(answer.content)
    assert bytes(values["out"].data) == b"\1" * 1_000_000


def test_a_request_that_fails_while_it_runs_is_a_problem_that_names_the_line(service: Service) -> None:
    answer = service.http.post("/v1/models/m/requests", content=body(FAIL), headers={"Prefer": "wait=10"})
    problem = problem_of(answer, 422)
    assert problem["code"] == "run"
    assert problem["where"] == "experiment.py:3"
    request = answer.headers["x-request-id"]
    assert service.http.get(f"/v1/requests/{request}").json()["error"]["message"] == "index 9 is out of range"
    assert problem_of(service.http.get(f"/v1/requests/{request}/result"), 422) == problem


def test_a_refused_request_leaves_no_trace(service: Service) -> None:
    before = set((service.store.folder / "requests").iterdir())
    problem = problem_of(service.http.post("/v1/models/m/requests", content=body(REFUSE)), 422)
    assert problem["where"] == "experiment.py:12" and "0-95" in problem["detail"]
    assert set((service.store.folder / "requests").iterdir()) <= before


def test_bytes_that_are_no_request_are_refused(service: Service) -> None:
    good = body(SUCCEED)
    for bad in (b"", b"hello", good[:40], good[:-3], good.replace(b'\\"seed\\"', b'\\"sead\\"')):
        problem = problem_of(service.http.post("/v1/models/m/requests", content=bad), 400)
        assert problem["code"] == "wire"
    wrong_version = good.replace(b'"polytrace":"%s"' % VERSION.encode(), b'"polytrace":"999"')
    assert "version" in problem_of(service.http.post("/v1/models/m/requests", content=wrong_version), 400)["detail"]


def test_too_large_a_request_is_refused_with_the_numbers_before_it_is_sent(service: Service) -> None:
    problem = problem_of(service.http.post("/v1/models/m/requests", content=b"x" * (MAX_BYTES + 1)), 413)
    assert str(MAX_BYTES + 1) in problem["detail"] and f"{MAX_BYTES}" in problem["detail"]
    with socket.create_connection(("127.0.0.1", service.port)) as connection:
        connection.sendall(head(f"Content-Length: {1 << 40}"))
        assert b" 413 " in connection.recv(1000)


def test_too_large_a_request_of_unknown_length_is_refused_while_it_arrives(service: Service) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(100):
            yield b"x" * 65_536

    problem = problem_of(service.http.post("/v1/models/m/requests", content=endless()), 413)
    assert f"{MAX_BYTES}" in problem["detail"]


def test_a_client_that_leaves_while_it_waits_cancels_its_request_and_hurts_nobody(service: Service) -> None:
    held = set(service.controller.held)
    content = body(HOLD)
    with socket.create_connection(("127.0.0.1", service.port)) as connection:
        connection.sendall(head(f"Content-Length: {len(content)}", "Prefer: wait=20") + content)
        wait_until(lambda: bool(service.controller.held - held))
        (request,) = service.controller.held - held
    wait_until(lambda: service.state(request) is RequestState.CANCELLED)
    test_a_waiting_submit_is_answered_with_the_result(service)


def test_a_client_that_leaves_in_the_middle_of_an_upload_leaves_nothing(service: Service) -> None:
    folder = service.store.folder / "requests"
    before = set(folder.iterdir())
    with socket.create_connection(("127.0.0.1", service.port)) as connection:
        connection.sendall(head("Content-Length: 1000000") + b"x" * 500_000)
        time.sleep(0.1)
    time.sleep(0.1)
    assert not set(folder.iterdir()) - before


def test_an_upload_that_falls_silent_is_given_up(service: Service) -> None:
    with socket.create_connection(("127.0.0.1", service.port)) as connection:
        connection.sendall(head("Content-Length: 1000") + b"x" * 10)
        connection.settimeout(10)
        answer = connection.recv(2000)
    assert b" 400 " in answer


def test_a_running_request_is_cancelled(service: Service) -> None:
    request = service.http.post("/v1/models/m/requests", content=body(HOLD)).json()["id"]
    wait_until(lambda: request in service.controller.held)
    assert service.http.delete(f"/v1/requests/{request}").status_code == 200
    status = service.http.get(f"/v1/requests/{request}", params={"wait": 10}).json()
    assert status["state"] == "cancelled" and status["error"]["code"] == "cancelled"
    assert problem_of(service.http.get(f"/v1/requests/{request}/result"), 409)["code"] == "cancelled"


def test_a_result_that_is_not_there_yet_is_202(service: Service) -> None:
    request = service.http.post("/v1/models/m/requests", content=body(HOLD), headers={"Prefer": "wait=0.05"}).json()[
        "id"
    ]
    assert service.http.get(f"/v1/requests/{request}/result").status_code == 202
    service.http.delete(f"/v1/requests/{request}")


def test_validate_answers_with_a_certificate_and_keeps_nothing(service: Service) -> None:
    answer = service.http.post("/v1/models/m/validate", content=body(SUCCEED))
    assert answer.json() == {"passes": 1, "limits": [], "refusal": None, "retry_after_s": None}
    assert problem_of(service.http.post("/v1/models/m/validate", content=body(REFUSE)), 422)["code"] == "graph"


def test_models_and_their_descriptions(service: Service) -> None:
    (model,) = service.http.get("/v1/models").json()["models"]
    assert model["name"] == "m" and model["is_ready"] and model["class_name"] == "TinyForCausalLM"
    answer = service.http.get("/v1/models/m")
    assert answer.headers["content-encoding"] == "gzip"
    assert from_json(ModelDescription, answer.json()) == description_of_nothing()
    same = service.http.get("/v1/models/m", headers={"If-None-Match": answer.headers["etag"]})
    assert same.status_code == 304 and same.content == b""
    plain = service.http.get("/v1/models/m", headers={"Accept-Encoding": "identity"})
    assert "content-encoding" not in plain.headers and plain.json() == answer.json()
    assert service.http.get("/v1/models/m/tokenizer").json() == {"t": 1}


def test_the_interface_describes_itself(service: Service) -> None:
    described = service.http.get("/openapi.json").json()
    assert "/v1/models/{name}/requests" in described["paths"]
    responses = described["paths"]["/v1/requests/{request_id}"]["get"]["responses"]
    assert "application/problem+json" in responses["4XX"]["content"]


def test_what_is_not_there_is_a_problem_too(service: Service) -> None:
    assert "'nosuch'" in problem_of(service.http.get("/v1/models/nosuch"), 404)["detail"]
    problem_of(service.http.post("/v1/models/nosuch/requests", content=body(SUCCEED)), 404)
    problem_of(service.http.get("/v1/requests/0123"), 404)
    problem_of(service.http.delete("/v1/requests/0123"), 404)
    problem_of(service.http.get("/v1/requests/0123/result"), 404)
    problem_of(service.http.get("/nowhere"), 404)
    problem_of(service.http.put("/v1/models"), 405)
    problem_of(service.http.get("/v1/requests/0123", params={"wait": "soon"}), 400)


def test_a_call_without_the_key_is_refused_and_health_needs_none(service: Service) -> None:
    for headers in (
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": f"Basic {KEY}"},
        {"Authorization": "Bearer é"},
    ):
        encoded = {name: value.encode() for name, value in headers.items()}
        answer = httpx.get(f"{service.http.base_url}/v1/models", headers=encoded)
        assert problem_of(answer, 401)["code"] == "key-refused"
        assert answer.headers["www-authenticate"] == "Bearer"
    assert httpx.get(f"{service.http.base_url}/healthz").json() == {"status": "ok"}
    assert httpx.get(f"{service.http.base_url}/readyz").status_code == 200


def test_a_full_queue_answers_503_and_says_when_to_come_back(service: Service) -> None:
    held = [service.http.post("/v1/models/m/requests", content=body(HOLD)).json()["id"] for _ in range(50)]
    answer = service.http.post("/v1/models/m/requests", content=body(SUCCEED))
    assert problem_of(answer, 503)["code"] == "capacity"
    assert int(answer.headers["retry-after"]) > 0
    for request in held:
        service.http.delete(f"/v1/requests/{request}")
    for request in held:
        service.http.get(f"/v1/requests/{request}", params={"wait": 10})


def test_the_service_is_ready_only_when_its_deployment_is(tmp_path: Path) -> None:
    service = Service(tmp_path / "store", None)
    assert service.http.get("/healthz").status_code == 200
    assert "no deployment" in problem_of(service.http.get("/readyz"), 503)["detail"]
    service.store.set_state("m", DeploymentState.STARTING, "loading shard 1 of 4")
    wait_until(lambda: "loading shard 1 of 4" in service.http.get("/readyz").text)
    assert problem_of(service.http.post("/v1/models/m/requests", content=body(SUCCEED)), 503)["code"] == "capacity"
    service.publish()
    assert service.http.post("/v1/models/m/requests", content=body(SUCCEED)).status_code == 202
    service.store.set_state("m", DeploymentState.FAILED, "a shard was lost")
    wait_until(lambda: service.http.get("/readyz").status_code == 503)
    service.close()


def test_deployments_are_wanted_resized_drained_and_removed_by_name(tmp_path: Path) -> None:
    service = Service(tmp_path / "store", None)
    http, wish = service.http, {"source": "a/b", "stages": 2, "replicas": 2}
    told = http.put("/v1/models/m", json=wish)
    assert told.status_code == 202 and told.json()["spec"]["ranks"] == 1, told.text
    assert http.put("/v1/models/m", json=wish).status_code == 202, "the same once more is no conflict"
    other = problem_of(http.put("/v1/models/m", json=wish | {"stages": 4}), 409)
    assert "a/b on 2 x 1 shards" in str(other["detail"])
    assert http.patch("/v1/models/m", json={"replicas": 5}).json()["spec"]["replicas"] == 5
    (wanted,) = service.store.wanted()
    assert (wanted.spec.source, wanted.spec.replicas, wanted.mode) == ("a/b", 5, Mode.SERVING)
    for path, body_ in (
        ("/v1/models/m", {}),
        ("/v1/models/m", wish | {"stages": 0}),
        ("/v1/models/m", wish | {"colour": "red"}),
        ("/v1/models/.m", wish),
    ):
        problem_of(http.put(path, json=body_), 400)
    for answer in (
        http.patch("/v1/models/nosuch", json={"replicas": 1}),
        http.post("/v1/models/nosuch/drain"),
        http.delete("/v1/models/nosuch"),
    ):
        assert "'nosuch'" in str(problem_of(answer, 404)["detail"])
    assert http.delete("/v1/models/m").json()["mode"] == "removing"
    assert "is being removed" in str(problem_of(http.put("/v1/models/m", json=wish), 409)["detail"])
    problem_of(http.patch("/v1/models/m", json={"replicas": 1}), 409)
    problem_of(http.post("/v1/models/m/drain"), 409)
    service.store.forget("m")
    wait_until(lambda: http.get("/v1/models").json()["models"] == [])
    service.close()


def test_a_deployment_that_failed_before_it_served_is_corrected_under_its_name(tmp_path: Path) -> None:
    service = Service(tmp_path / "store", None)
    http = service.http
    assert http.put("/v1/models/new", json={"source": "org/model", "dtype": "float17"}).status_code == 202
    problem_of(http.put("/v1/models/new", json={"source": "org/model"}), 409)
    service.store.set_state("new", DeploymentState.FAILED, "dtype 'float17' is not one of auto, ...")
    told = http.put("/v1/models/new", json={"source": "org/model"})
    assert told.status_code == 202 and told.json()["spec"]["dtype"] == "auto"
    assert http.put("/v1/models/m", json={"source": "org/model"}).status_code == 202
    service.publish()  # it serves
    service.store.set_state("m", DeploymentState.FAILED, "its node is gone")
    problem_of(http.put("/v1/models/m", json={"source": "another"}), 409)
    service.close()


def test_a_drained_deployment_refuses_new_requests_with_the_reason_and_finishes_the_others(tmp_path: Path) -> None:
    service = Service(tmp_path / "store", None)
    service.publish()
    held = service.http.post("/v1/models/m/requests", content=body(HOLD)).json()
    assert service.http.post("/v1/models/m/drain").json()["mode"] == "draining"
    service.store.set_state("m", DeploymentState.DRAINING, "drained when 1 requests are finished")

    def refusal() -> Mapping[str, object]:
        return problem_of(service.http.post("/v1/models/m/requests", content=body(SUCCEED)), 503)

    wait_until(lambda: "it finishes what it has" in str(refusal()["detail"]))
    assert service.http.get("/v1/models/m").status_code == 200, "what it serves is still told"
    assert service.state(held["id"]) in (RequestState.QUEUED, RequestState.RUNNING)
    assert service.http.delete("/v1/models/m/drain").json()["mode"] == "serving"
    wait_until(lambda: service.http.post("/v1/models/m/requests", content=body(SUCCEED)).status_code == 202)
    acts = [one["act"] for one in service.http.get("/v1/audit").json()["entries"]]
    assert acts == ["models.resume", "models.drain"]
    assert service.http.delete("/v1/models/m").json()["mode"] == "removing"
    assert "is being removed" in str(problem_of(service.http.delete("/v1/models/m/drain"), 409)["detail"])
    problem_of(service.http.delete("/v1/models/nosuch/drain"), 404)
    service.close()


def test_a_request_does_not_slip_into_a_deployment_that_is_drained_while_it_is_checked(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    store.set_state("m", DeploymentState.READY, "ready")
    store.drain("m")
    with pytest.raises(CapacityError, match="m is drained"):
        store.add(store.new_id(), "m", b"[]", work=1, max_open=10)
    with pytest.raises(NotFoundError):
        store.add(store.new_id(), "gone", b"[]", work=1, max_open=10)
    store.close()


def test_requests_of_a_deployment_that_is_removed_at_once_are_refused_with_the_reason(tmp_path: Path) -> None:
    service = Service(tmp_path / "store", None)
    service.publish()
    held = service.http.post("/v1/models/m/requests", content=body(HOLD)).json()["id"]
    wait_until(lambda: service.state(held) is RequestState.RUNNING)
    service.http.delete("/v1/models/m", params={"now": True})
    service.store.refuse("m", CapacityError("m was removed"))
    assert problem_of(service.http.get(f"/v1/requests/{held}/result"), 503)["detail"] == "m was removed"
    assert not service.store.request_path(RequestId(held)).exists()
    assert service.store.num_open("m") == 0
    service.close()


def test_a_stopping_gateway_answers_those_who_wait_and_forgets_nothing(tmp_path: Path) -> None:
    service = Service(tmp_path / "store", None)
    service.publish()
    answers: list[httpx.Response] = []

    def submit() -> None:
        answers.append(service.http.post("/v1/models/m/requests", content=body(HOLD), headers={"Prefer": "wait=20"}))

    waiting = threading.Thread(target=submit)
    waiting.start()
    wait_until(lambda: bool(service.controller.held))
    (request,) = service.controller.held
    heard: list[str] = []

    def listen() -> None:
        with service.http.stream("GET", f"/v1/requests/{request}/events") as stream:
            heard.append("begun")
            heard.extend(stream.iter_lines())  # raises when it is cut off
        heard.append("ended")

    listening = threading.Thread(target=listen)
    listening.start()
    wait_until(lambda: bool(heard))
    service.server.should_exit = True
    waiting.join(timeout=10)
    listening.join(timeout=10)
    assert heard == ["begun", "ended"], "without an `end`: it is gone on with at the next start"
    assert answers[0].status_code == 202
    assert service.state(answers[0].json()["id"]) is RequestState.RUNNING
    service.close()


def body(seed: int, num_floats: int = 4) -> bytes:
    where = "experiment.py:1"
    request = Request(
        graph=Graph(nodes=(Constant(name="c", where=where), Save(name="out", value=Ref(NodeId(0)), where=where))),
        invokes=(Invoke(sequences=((1, 2, 3),)),),
        constants={"c": RawTensor(dtype="float32", shape=(num_floats,), data=memoryview(b"\1" * (4 * num_floats)))},
        options=Options(seed=seed),
    )
    return b"".join(encode_request(request))


def head(*lines: str) -> bytes:
    first = ("POST /v1/models/m/requests HTTP/1.1", "Host: here", f"Authorization: Bearer {KEY}")
    return "\r\n".join((*first, *lines, "", "")).encode()


def problem_of(answer: httpx.Response, status: int) -> Mapping[str, object]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    assert problem.keys() == {"type", "title", "status", "detail", "code", "where"}
    assert problem["status"] == status
    return dict(problem)


def test_a_submit_says_whether_somebody_waits_for_it(service: Service) -> None:
    def kept(headers: dict[str, str]) -> bool:
        posted = service.http.post("/v1/models/m/requests", content=body(HOLD), headers=headers)
        assert posted.status_code == 202, posted.text
        rows = service.store._db.rows("SELECT is_interactive FROM requests WHERE id = ?", (posted.json()["id"],))
        service.http.delete(f"/v1/requests/{posted.json()['id']}")
        return bool(rows[0][0])

    assert kept({}) is False
    assert kept({"Prefer": "wait=0.1"}) is True
    assert kept({"Prefer": "wait=0.1", "X-Polytrace-Class": "batch"}) is False
    assert kept({"X-Polytrace-Class": "interactive"}) is True
    refused = service.http.post("/v1/models/m/requests", content=body(HOLD), headers={"X-Polytrace-Class": "urgent"})
    assert refused.status_code == 400 and "interactive or batch" in refused.text
    told = service.http.post("/v1/models/m/requests", content=body(HOLD)).json()
    assert {"queue_position", "expected_start"} <= told.keys()
    service.http.delete(f"/v1/requests/{told['id']}")
