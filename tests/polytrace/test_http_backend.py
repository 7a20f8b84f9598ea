"""The HTTP client against a server that does what the gateway does, one scripted answer after another."""

from __future__ import annotations

import json
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest
import torch

import polytrace
from api.service_calls import Service as ServiceCalls
from polytrace import retrying
from polytrace.certificate import Certificate, Token, ValueShape
from polytrace.codec import to_json
from polytrace.errors import CapacityError, GraphError, KeyRefusedError, NotFoundError, ServiceError, WireError
from polytrace.http_calls import persistently, told_url
from polytrace.retrying import Pauses
from polytrace.versions import version_headers
from polytrace.wire import decode_request, result_header


@dataclass(frozen=True)
class Facts:
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Slot:
    name: str
    facts: Facts
    offset: int


@dataclass
class Answer:
    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    after: Callable[[], None] = lambda: None


@dataclass
class Service:
    """What it answers by (method, path without query), the last answer for ever, and what it was asked."""

    url: str = ""
    answers: dict[tuple[str, str], list[Answer]] = field(default_factory=dict)
    asked: list[tuple[str, str, dict[str, str], bytes]] = field(default_factory=list)

    def on(self, method: str, path: str, *answers: Answer) -> None:
        self.answers[method, path] = list(answers)

    def calls(self) -> list[str]:
        return [f"{method} {path}" for method, path, _, _ in self.asked]


def answer_json(value: Any, status: int = 200, **headers: str) -> Answer:
    return Answer(status, json.dumps(value).encode(), {"Content-Type": "application/json", **headers})


def problem(status: int, code: str, detail: str, where: str | None = None) -> Answer:
    return answer_json({"status": status, "title": "t", "detail": detail, "code": code, "where": where}, status)


@pytest.fixture
def service(backend: Any) -> Iterator[Service]:
    state = Service()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            state.asked.append((self.command, self.path, dict(self.headers), body))
            known = state.answers.get((self.command, self.path.partition("?")[0]))
            answer = problem(404, "not-found", f"nothing is at {self.path}") if not known else known[0]
            if known and len(known) > 1:
                known.pop(0)
            answer.after()
            self.send_response(answer.status)
            for name, value in (answer.headers | {"Content-Length": str(len(answer.body))}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(answer.body)

        do_GET = do_POST = do_DELETE = handle_any

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_port}"
    state.on("GET", "/v1/models", answer_json({"models": [{"name": "tiny", "state": "ready"}]}))
    state.on("GET", "/v1/models/tiny", answer_json(to_json(backend.description), **version_headers()))
    state.on("GET", "/v1/models/tiny/tokenizer", Answer(body=backend.tokenizer_json()))
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def result_file(receipt_of_a_run: Any) -> Answer:
    header = result_header([Slot("0", Facts((2, 2), "bfloat16"), 0)], receipt_of_a_run, 2048)
    return Answer(body=header + torch.tensor([[1.0, 2], [3, 4]]).bfloat16().view(torch.uint8).numpy().tobytes())


def trace_once(service: Service, **more: Any) -> tuple[Any, Any]:
    model = polytrace.connect(service.url, "tiny", **more)
    try:
        with model.trace("the Eiffel") as tracer:
            value = (model.lm_head.output + torch.ones(32)).save()
        return value, tracer
    finally:
        model.close()


STATUS = {"id": "r1", "state": "running", "error": None}
ACCEPTED = answer_json(STATUS, 202, **{"Location": "/v1/requests/r1", "X-Request-Id": "r1"})


def test_a_trace_goes_there_and_back_in_one_call(service: Service, result_file: Answer) -> None:
    service.on("POST", "/v1/models/tiny/requests", result_file)
    value, tracer = trace_once(service)
    assert type(value) is torch.Tensor and value.dtype is torch.bfloat16 and value.tolist() == [[1, 2], [3, 4]]
    value += 1  # its memory is the user's own
    assert tracer.receipt.tokens == 3
    method, path, headers, body = service.asked[-1]
    assert (method, path) == ("POST", "/v1/models/tiny/requests")
    assert (
        headers["Prefer"].startswith("wait=") and "Transfer-Encoding" not in headers and "Authorization" not in headers
    )
    request = decode_request(body)
    assert request.invokes[0].sequences == ((0, 2, 3),)
    assert bytes(request.constants["c0"].data) == torch.ones(32).numpy().tobytes()


def test_a_long_run_is_polled_until_it_is_done(service: Service, result_file: Answer) -> None:
    service.on("POST", "/v1/models/tiny/requests", ACCEPTED)
    done = answer_json(STATUS | {"state": "done"})
    service.on("GET", "/v1/requests/r1", answer_json(STATUS | {"state": "queued"}), answer_json(STATUS), done)
    service.on("GET", "/v1/requests/r1/result", result_file)
    value, _ = trace_once(service)
    assert value.shape == (2, 2)
    polls = [call for call in service.calls() if call.startswith("GET /v1/requests/r1?wait=")]
    assert len(polls) == 3


def test_a_service_that_is_away_for_a_moment_loses_nothing(service: Service, result_file: Answer) -> None:
    def vanish() -> None:
        raise ConnectionAbortedError  # the connection ends without an answer

    gone = Answer(after=vanish)
    service.on("POST", "/v1/models/tiny/requests", ACCEPTED)
    service.on("GET", "/v1/requests/r1", gone, answer_json(STATUS | {"state": "done"}))
    service.on("GET", "/v1/requests/r1/result", result_file)
    assert trace_once(service)[0].shape == (2, 2)


def stream_of(*events: tuple[str, str, Any]) -> Answer:
    text = "".join(f"id: {number}\nevent: {kind}\ndata: {json.dumps(data)}\n\n" for number, kind, data in events)
    return Answer(body=f": still here\n\n{text}".encode(), headers={"Content-Type": "text/event-stream"})


def run_listening(service: Service, **listeners: Any) -> Any:
    model = polytrace.connect(service.url, "tiny")
    try:
        with model.trace([1, 2], run=False) as tracer:
            model.lm_head.output.save()
        return model.backend.run(tracer.request, **listeners)
    finally:
        model.close()


def test_tokens_and_logs_are_heard_once_each_though_the_connection_is_lost(
    service: Service, result_file: Answer
) -> None:
    tokens = [Token(invoke=0, sequence=0, step=step, id=5 + step) for step in range(3)]
    told = [(str(10 * step + 10), "token", to_json(token)) for step, token in enumerate(tokens)]
    log = ("25", "value", {"name": "log0", "dtype": "float32", "shape": [1], "data": "AACAPw=="})
    large = ("26", "value", {"name": "h@1", "dtype": "float32", "shape": [9], "range": [0, 36]})
    cut = stream_of(*told[:1])
    cut.body += b"id: 20\nevent: token\ndata: {"  # the gateway ended here
    service.on("POST", "/v1/models/tiny/requests", ACCEPTED)
    rest = stream_of(told[1], log, large, told[2], ("end", "end", STATUS | {"state": "done"}))
    service.on("GET", "/v1/requests/r1/events", cut, rest)
    service.on("GET", "/v1/requests/r1/result", result_file)
    heard: list[Token] = []
    logs: dict[str, Any] = {}
    result = run_listening(service, hear_tokens=heard.extend, hear=logs.update)
    assert heard == tokens and list(logs) == ["log0"] and logs["log0"].tolist() == [1.0]
    assert result.values["0"].shape == (2, 2)
    asked = [headers.get("Last-Event-ID") for _, path, headers, _ in service.asked if "/events" in path]
    assert asked == [None, "10"]


def test_a_listener_that_raises_cancels_the_request_and_a_failed_request_raises(service: Service) -> None:
    token = to_json(Token(invoke=0, sequence=0, step=0, id=5))
    service.on("POST", "/v1/models/tiny/requests", ACCEPTED)
    service.on("GET", "/v1/requests/r1/events", stream_of(("10", "token", token), ("end", "end", STATUS)))
    service.on("GET", "/v1/requests/r1/result", problem(422, "graph", "shapes differ", "a.py:7"))
    service.on("DELETE", "/v1/requests/r1", answer_json(STATUS))

    def listener(tokens: Any) -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        run_listening(service, hear_tokens=listener)
    assert service.calls()[-1] == "DELETE /v1/requests/r1"
    with pytest.raises(GraphError, match=r"shapes differ \(a.py:7\)"):
        run_listening(service, hear_tokens=lambda tokens: None)
    assert "DELETE" not in service.calls()[-1]


@pytest.fixture
def listening_to_ctrl_c() -> Iterator[None]:
    """A process that was started in the background ignores SIGINT, and `interrupt_main` does nothing then."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("listening_to_ctrl_c")
def test_ctrl_c_cancels_the_request(service: Service) -> None:
    import _thread

    def interrupt() -> None:
        _thread.interrupt_main()
        time.sleep(0.3)

    service.on("POST", "/v1/models/tiny/requests", ACCEPTED)
    service.on("GET", "/v1/requests/r1", Answer(**vars(answer_json(STATUS)) | {"after": interrupt}))
    service.on("DELETE", "/v1/requests/r1", answer_json(STATUS | {"state": "cancelled"}))
    with pytest.raises(KeyboardInterrupt):
        trace_once(service)
    assert service.calls()[-1] == "DELETE /v1/requests/r1"


@pytest.mark.usefixtures("listening_to_ctrl_c")
def test_ctrl_c_before_the_service_has_answered_takes_the_submit_back_by_its_key(service: Service) -> None:
    import _thread

    def interrupt() -> None:
        _thread.interrupt_main()
        time.sleep(0.3)

    path = "/v1/models/tiny/requests"
    service.on("POST", path, Answer(**vars(ACCEPTED) | {"after": interrupt}))
    service.on("DELETE", path, answer_json(STATUS | {"state": "cancelled"}))
    with pytest.raises(KeyboardInterrupt):
        trace_once(service)
    (sent,) = [headers["Idempotency-Key"] for method, _, headers, _ in service.asked if method == "POST"]
    assert service.calls()[-1] == f"DELETE {path}" and service.asked[-1][2]["Idempotency-Key"] == sent


def test_a_call_that_gets_further_has_patience_again_and_one_that_does_not_gives_up() -> None:
    steps = 0

    def further() -> str:
        nonlocal steps
        steps += 1
        time.sleep(0.1)
        if steps < 10:
            raise httpx.ReadError("broken")
        return "all"

    assert persistently("u", further, reached=lambda: steps, patience_s=0.5) == "all"
    steps = -1000
    with pytest.raises(ServiceError, match="no answer from u: broken"):
        persistently("u", further, patience_s=0.5)


def test_whoever_waits_for_a_drained_deployment_is_told_so_in_one_line(
    service: Service, result_file: Answer, caplog: pytest.LogCaptureFixture
) -> None:
    drained = problem(503, "capacity", "tiny is drained")
    drained.headers["Retry-After"] = "2"
    service.on("POST", "/v1/models/tiny/requests", drained, drained, result_file)
    assert trace_once(service)[0].shape == (2, 2)
    assert len(service.calls()) >= 3 and [one.name for one in caplog.records] == ["polytrace"]
    assert caplog.messages == ["tiny is drained; trying again for 30 s"]


def test_the_same_of_another_thing_is_told_and_of_the_same_thing_once(caplog: pytest.LogCaptureFixture) -> None:
    others = ["llama-8b is drained", "llama-70b is drained", "no answer from http://10.0.0.1:8765"]
    others += ["no answer from http://10.0.0.2:8765", "no answer from http://10.0.0.2:8766", "v1.5 is drained"]
    counts = [
        "the queue of m-2 has 2048 of 2048 requests, for 1.5 s.",
        "the queue of m-2 has 7 of 9 requests, for 30 s.",
    ]
    for why in [*others, *others, *counts]:
        retrying._tell(why, 30.0)
    told = [one.partition("; trying")[0] for one in caplog.messages]
    assert told == [*others, counts[0]]


def test_what_is_over_soon_is_not_told(caplog: pytest.LogCaptureFixture) -> None:
    pauses = Pauses(patience_s=1.0)
    while pauses.again(why="the queue is full"):
        pass
    assert caplog.messages == []


def test_a_trace_that_takes_too_long_is_cancelled(service: Service) -> None:
    service.on("POST", "/v1/models/tiny/requests", ACCEPTED)
    service.on("GET", "/v1/requests/r1", answer_json(STATUS))
    service.on("DELETE", "/v1/requests/r1", answer_json(STATUS))
    with pytest.raises(ServiceError, match="did not finish within 0 s, so it was cancelled"):
        trace_once(service, timeout=0.3)
    assert service.calls()[-1] == "DELETE /v1/requests/r1"


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (422, "graph", GraphError),
        (503, "capacity", CapacityError),
        (500, "service", ServiceError),
        (418, "tea", ServiceError),
    ],
)
def test_a_problem_is_the_error_that_it_was(service: Service, status: int, code: str, kind: Any) -> None:
    service.on("POST", "/v1/models/tiny/requests", problem(status, code, "12 is too many", "a.py:3"))
    with pytest.raises(kind, match=r"12 is too many \(a.py:3\)") as caught:
        trace_once(service)
    assert type(caught.value) is kind
    frames = {frame.filename for frame in traceback.extract_tb(caught.value.__traceback__)}
    assert frames == {__file__} and caught.value.__cause__ is None


def test_a_failure_while_polling_is_the_run_s_own(service: Service) -> None:
    service.on("POST", "/v1/models/tiny/requests", ACCEPTED)
    service.on("GET", "/v1/requests/r1", answer_json(STATUS | {"state": "failed"}))
    service.on("GET", "/v1/requests/r1/result", problem(422, "graph", "shapes differ", "a.py:7"))
    with pytest.raises(GraphError, match=r"shapes differ \(a.py:7\)"):
        trace_once(service)


def test_answers_that_are_no_problems_name_the_status(service: Service) -> None:
    service.on("POST", "/v1/models/tiny/requests", Answer(502, b"<html>bad gateway</html>"))
    with pytest.raises(ServiceError, match="answered 502"):
        trace_once(service)


def test_a_cut_off_result_is_no_result(service: Service, result_file: Answer) -> None:
    service.on("POST", "/v1/models/tiny/requests", Answer(body=result_file.body[:-1]))
    with pytest.raises(WireError, match="cut off"):
        trace_once(service)


def test_the_key_travels_as_a_bearer_token(
    service: Service, result_file: Answer, monkeypatch: pytest.MonkeyPatch
) -> None:
    service.on("POST", "/v1/models/tiny/requests", result_file)
    trace_once(service, key="secret")
    assert service.asked[-1][2]["Authorization"] == "Bearer secret"
    monkeypatch.setenv("POLYTRACE_KEY", "from-the-environment")
    trace_once(service)
    assert service.asked[-1][2]["Authorization"] == "Bearer from-the-environment"
    monkeypatch.setenv("POLYTRACE_KEY", "a\nb")
    with pytest.raises(ValueError, match=r"POLYTRACE_KEY is 'a\\nb'"):
        polytrace.models(service.url)


def test_connecting_says_what_is_wrong(service: Service) -> None:
    with pytest.raises(NotFoundError, match="nothing is at /v1/models/other"):
        polytrace.connect(service.url, "other")
    service.on("GET", "/v1/models/tiny", problem(401, "key-refused", "this service needs its key"))
    with pytest.raises(KeyRefusedError, match="needs its key"):
        polytrace.connect(service.url, "tiny")
    service.on("GET", "/v1/models/tiny", answer_json({"name": "tiny", "future": 1}, **version_headers()))
    with pytest.raises(WireError, match="they describe models otherwise"):
        polytrace.connect(service.url, "tiny")
    with pytest.raises(ServiceError, match=r"no answer from http://127\.0\.0\.1:9") as caught:
        polytrace.connect("http://127.0.0.1:9", "tiny")
    assert len(traceback.format_exception(caught.value)) < 12, "nothing of how httpx found out"
    with pytest.raises(ServiceError, match=f"that port speaks no TLS: try {service.url}$"):
        polytrace.connect(service.url.replace("http://", "https://"), "tiny")
    with pytest.raises(NotFoundError, match=f"the service's URL ends before /v1: {service.url}$"):
        polytrace.connect(f"{service.url}/v1/", "tiny")
    with pytest.raises(ValueError, match="begins with http://, https:// or ray://"):
        polytrace.connect("tiny")


def refused_of(call: Callable[[], object]) -> str:
    with pytest.raises((ServiceError, KeyRefusedError, NotFoundError, ValueError)) as refused:
        call()
    return str(refused.value)


def test_a_password_in_the_services_url_is_not_written_out(
    service: Service, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    url = service.url.replace("://", "://ada:hunter2@")
    service.on("GET", "/v1/models", problem(401, "key-refused", "unknown"))
    told = refused_of(lambda: polytrace.models(url, key="k"))
    assert told.endswith(f"at {service.url})")
    service.on("GET", "/v1/models", Answer(body=b"<html>", status=502))
    told += refused_of(lambda: polytrace.models(url))
    service.on("GET", "/v1/models", Answer(body=b"<html>"))
    told += refused_of(lambda: polytrace.models(url))
    service.on("GET", "/v1/models", answer_json({"models": []}))
    told += refused_of(lambda: polytrace.connect(url))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        away = f"http://ada:hunter2@127.0.0.1:{taken.getsockname()[1]}"
        told += refused_of(lambda: polytrace.connect(away, "m"))
        told += refused_of(lambda: ServiceCalls(away, None).deployments())
    told += refused_of(lambda: polytrace.connect("ftp://ada:hunter2@host", "m"))
    assert told.count("127.0.0.1") >= 6 and "hunter2" not in told and "ada" not in told
    assert "hunter2" not in caplog.text and told_url("http://h:1/a@b?c=d@e") == "http://h:1/a@b?c=d@e"


def test_a_refused_key_is_named_with_where_it_came_from_and_a_password_is_not(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    service.on("GET", "/v1/models", problem(401, "key-refused", "this service does not know the key"))
    secret = f"pt_0123456789ab_{'s' * 43}"

    def told(key: str | None) -> str:
        with pytest.raises(KeyRefusedError) as refused:
            polytrace.models(service.url, key=key)
        return str(refused.value)

    assert told(None) == f"this service does not know the key ({service.url})"
    known = f"this service does not know the key (the key pt_0123456789ab... as it was given, at {service.url})"
    assert told(secret) == known
    monkeypatch.setenv("POLYTRACE_KEY", secret)
    assert told(None) == known.replace("as it was given", "from POLYTRACE_KEY")
    monkeypatch.setenv("POLYTRACE_KEY", "sesame, open")
    assert told(None) == f"this service does not know the key (the key from POLYTRACE_KEY, at {service.url})"


def test_the_only_model_needs_no_name(service: Service) -> None:
    assert polytrace.connect(service.url).description.name == "tiny"
    assert polytrace.models(service.url) == [{"name": "tiny", "state": "ready"}]
    service.on("GET", "/v1/models", answer_json({"models": [{"name": "a"}, {"name": "b"}]}))
    with pytest.raises(NotFoundError, match="has the models a, b: name one of them"):
        polytrace.connect(service.url)


def test_a_model_without_a_tokenizer_takes_ids(service: Service, result_file: Answer) -> None:
    service.on("GET", "/v1/models/tiny/tokenizer", problem(404, "not-found", "no tokenizer"))
    service.on("POST", "/v1/models/tiny/requests", result_file)
    model = polytrace.connect(service.url)
    assert model.tokenizer is None
    with pytest.raises(GraphError, match="give token ids instead of text"):
        model.trace("the Eiffel")
    with model.trace([1, 2]) as tracer:
        model.lm_head.output.save()
    assert tracer.tokens == (("1", "2"),)


def test_validate_asks_for_a_certificate(service: Service) -> None:
    certificate = Certificate(
        nodes=(ValueShape(shape=(1, 2), dtype="float32"), None), saves={}, passes=1, tokens=2, token_layers=8,
        token_layers_alone=8,
        result_bytes=0, read_bytes=0, carried_bytes=0, live_bytes=0, notes=("n",),
    )  # fmt: skip
    service.on("POST", "/v1/models/tiny/validate", answer_json(to_json(certificate)))
    model = polytrace.connect(service.url)
    with model.trace([1, 2], run=False) as tracer:
        model.lm_head.output.save()
    assert model.validate(tracer) == certificate
