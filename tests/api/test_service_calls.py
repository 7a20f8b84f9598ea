"""The commands ask a service by the client's own calls: its problems come whole, and a name is one part of a path."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from api.commands import app
from api.service_calls import Entry, Service
from polytrace.errors import CapacityError, ServiceError

REFUSAL = {"title": "Graph", "code": "graph", "detail": "layer 96 is not there", "where": "experiment.py:12"}


class Refusing:
    """A service that refuses everything and remembers what it was asked."""

    def __init__(self) -> None:
        self.problem: dict[str, str] = REFUSAL
        self.headers: dict[str, str] = {}
        self.status = 422
        self.asked: list[tuple[str, str]] = []
        self.deployments: list[Entry] = []  # "m", look by look; the last one stays so
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args: object) -> None:
                pass

            def answer(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                outer.asked.append((self.command, self.path))
                body = json.dumps(outer.problem).encode() if outer.problem else b"<html>"
                if outer.deployments:
                    looks = self.command == "GET"
                    now = outer.deployments.pop(0) if looks and len(outer.deployments) > 1 else outer.deployments[0]
                    body = json.dumps({"models": [now]} if looks else {}).encode()
                self.send_response(200 if outer.deployments else outer.status)
                told = {"Content-Type": "application/problem+json", "Content-Length": str(len(body))}
                for name, value in (told | outer.headers).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = answer

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def follows(self, *arguments: str, through: list[dict[str, Any]]) -> tuple[int, str]:
        """How a command ends, and what it says, that follows a deployment through these states."""
        plain = {"name": "m", "mode": "serving", "replicas": [], "queued": 0, "running": 0, "progress": "as it is"}
        self.deployments = [plain | one for one in through]
        answer = CliRunner().invoke(app, [*arguments, "--url", self.url])
        return answer.exit_code, answer.output

    def told(self, *arguments: str) -> str:
        """What a command says of its refusal."""
        answer = CliRunner().invoke(app, [*arguments, "--url", self.url])
        assert answer.exit_code == 1, answer.output
        return answer.stderr

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def service() -> Iterator[Refusing]:
    service = Refusing()
    yield service
    service.close()


@pytest.mark.parametrize("arguments", [("validate", "FILE", "--model", "m"), ("usage",), ("usage", "--csv")])
def test_a_refusal_names_the_users_own_line(service: Refusing, arguments: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "request").write_bytes(b"x")
    told = service.told(*(str(tmp_path / "request") if one == "FILE" else one for one in arguments))
    assert told == "polytrace: layer 96 is not there (experiment.py:12)\n"


@pytest.mark.parametrize("name", ["a/../b", "m?now=true", "a#b", "%2e%2e"])
@pytest.mark.parametrize(
    ("arguments", "asked"),
    [
        (("drain", "NAME", "--no-wait"), ("POST", "/v1/models/NAME/drain")),
        (("resume", "NAME", "--no-wait"), ("DELETE", "/v1/models/NAME/drain")),
        (("remove", "NAME", "--no-wait"), ("DELETE", "/v1/models/NAME?now=false")),
        (("resize", "NAME", "--replicas", "2", "--no-wait"), ("PATCH", "/v1/models/NAME")),
        (("models", "drain", "NAME", "--no-wait"), ("POST", "/v1/models/NAME/drain")),
        (("models", "load", "NAME", "--no-wait"), ("POST", "/v1/models/NAME/load")),
        (("validate", "FILE", "--model", "NAME"), ("POST", "/v1/models/NAME/validate")),
        (("limits", "NAME"), ("GET", "/v1/models/NAME/limits")),
        (("purge", "--tenant", "NAME", "--yes"), ("DELETE", "/v1/tenants/NAME/data?cancel=false&usage=false")),
    ],
)
def test_a_name_is_one_part_of_the_path(
    service: Refusing, arguments: tuple[str, ...], asked: tuple[str, str], name: str, tmp_path: Path
) -> None:
    (tmp_path / "request").write_bytes(b"x")
    service.told(*(one.replace("NAME", name).replace("FILE", str(tmp_path / "request")) for one in arguments))
    as_part = {"a/../b": "a%2F..%2Fb", "m?now=true": "m%3Fnow%3Dtrue", "a#b": "a%23b", "%2e%2e": "%252e%252e"}[name]
    assert service.asked == [(asked[0], asked[1].replace("NAME", as_part))]


@pytest.mark.parametrize("name", ["", ".", ".."])
def test_what_would_be_another_path_is_nobodys_name(service: Refusing, name: str) -> None:
    assert "is nobody's name" in service.told("drain", name, "--no-wait")
    assert "is nobody's name" in service.told("tenants", "remove", name)
    assert service.asked == [], "`/v1/models/../drain` is the whole service's"


def test_when_to_come_back_and_a_title_come_over(service: Refusing) -> None:
    service.problem, service.status = {"code": "capacity", "title": "The service is full"}, 503
    service.headers = {"Retry-After": "7"}
    with pytest.raises(CapacityError, match="The service is full") as caught:
        Service(service.url, None).ask("GET", "/v1/models")
    assert caught.value.retry_after_s == 7.0


def test_what_is_no_service_of_ours_is_one_line(service: Refusing) -> None:
    service.problem, service.status = {}, 200
    with pytest.raises(ServiceError, match="/v1/models does not answer as a polytrace service does"):
        Service(service.url, None).deployments()
    service.headers = {"Content-Encoding": "gzip"}
    with pytest.raises(ServiceError, match="no answer from"):
        Service(service.url, None).deployments()


def test_resume_follows_a_deployment_until_it_takes_requests(service: Refusing) -> None:
    drained = {"state": "drained", "mode": "draining"}
    code, told = service.follows("resume", "m", through=[drained, {"state": "starting"}, {"state": "ready"}])
    assert code == 0 and len(service.deployments) == 1 and "resuming m" in told and "takes requests" not in told
    waiting = {"state": "waiting", "progress": "waits for room for 8 shards of CPU 1, GPU 1 each"}
    code, told = service.follows("resume", "m", through=[drained, waiting, {"state": "failed", "progress": "boom"}])
    assert code == 1 and "`polytrace status` shows it" in told and "m is failed: boom" in told
    cold = {"state": "cold", "keeping": {"on_demand": True}}
    assert "models load" not in service.follows("resume", "m", through=[cold])[1]
    code, told = service.follows("resume", "m", through=[cold | {"keeping": {"on_demand": False}}])
    assert code == 0 and "m rests, and requests do not load it: `polytrace models load m`" in told


def test_drain_ends_when_nothing_is_left_also_of_one_that_cannot_run(service: Refusing) -> None:
    ready, told = {"state": "ready", "mode": "draining"}, {"state": "drained", "mode": "draining"}
    assert service.follows("drain", "m", through=[ready, told])[0] == 0
    assert len(service.deployments) == 1, "one that runs says that it is over"
    for state in ("starting", "waiting", "failed"):
        code, said = service.follows("drain", "m", through=[{"state": state, "mode": "draining", "progress": "boom"}])
        assert code == 0 and f"{state}: boom" in said
    code, said = service.follows("drain", "m", through=[{"state": "failed", "mode": "draining", "queued": 3}])
    assert code == 1 and "m is failed" in said, "these would wait for ever"


def test_what_is_drained_is_not_followed_until_it_is_loaded(service: Refusing) -> None:
    for arguments in (("models", "load", "m"), ("models", "pin", "m")):
        code, told = service.follows(*arguments, through=[{"state": "drained", "mode": "draining"}])
        assert code == 1 and "m is drained: `polytrace resume m`" in told
    assert service.follows("models", "load", "m", through=[{"state": "starting"}, {"state": "ready"}])[0] == 0


class Scripted(Service):
    """A service whose one deployment is first this, then that."""

    def __init__(self, *entries: Entry) -> None:
        super().__init__("http://127.0.0.1:9", None)
        self._entries = list(entries)

    def deployments(self) -> list[Entry]:
        if not self._entries:
            raise KeyboardInterrupt
        return [self._entries.pop(0)]


def entry(*replicas: str) -> Entry:
    progress = f"{replicas.count('ready')} of {len(replicas)} replicas are ready"
    each = [{"state": one, "progress": one} for one in replicas]
    return {"name": "m", "state": "ready", "progress": progress, "replicas": each}


def test_who_has_to_wait_for_room_or_leaves_is_told_that_the_service_goes_on(
    capsys: pytest.CaptureFixture[str],
) -> None:
    waiting, ready = entry("ready", "waiting"), entry("ready", "ready")
    Scripted(waiting, waiting, ready).follow("m", "m gets 2 replicas", lambda one: one == ready)
    told = capsys.readouterr().err
    assert (
        told.count("`polytrace status` shows it") == 1 and "`polytrace remove m` is done" in told and "2 of 2" in told
    )
    gpus = waiting | {"progress": "waits for room for 1 of 2 shards of CPU 1, GPU 1 each", "state": "waiting"}
    Scripted(gpus, ready).follow("m", "m gets 2 replicas", lambda one: one == ready)
    told = capsys.readouterr().err
    assert "`polytrace status` shows it" in told and "--cpus" not in told, "its CPUs are not what it lacks"
    Scripted(entry("starting"), ready).follow("m", "m gets 2 replicas", lambda one: one == ready)
    assert "status" not in capsys.readouterr().err
    with pytest.raises(KeyboardInterrupt):
        Scripted(entry("starting")).follow("m", "m gets 2 replicas", lambda one: one == ready)
    assert capsys.readouterr().err.rstrip().endswith("`polytrace status` shows it")
