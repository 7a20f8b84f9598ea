"""What careless and hostile callers send, against a gateway in a process of its own: everybody else is answered, memory
stays, and each of them is told why or ended in time.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from gateways import ROOM, body, description_of_nothing, receipt_of, wait_until

from api.connections import MAX_HEAD_BYTES
from api.identity import LOCAL, Role
from api.server import bind
from api.settings import GatewaySettings
from api.store import Store
from cluster.config import DeploymentSpec
from cluster.requests import DeploymentState, Finished, Published
from polytrace.codec import to_json
from polytrace.wire import result_header
from scheduling.plan import RequestId

MIB = 1 << 20
SETTLED: dict[str, Any] = {
    "head_s": 0.8,
    "upload_idle_s": 0.8,
    "read_idle_s": 1.0,
    "max_connections": 520,
    "upload_bytes_of_tenant": 5 * MIB // 2,
    "upload_bytes": 9 * MIB // 2,
    "quota_bytes": 16 * MIB,
    "asks_key": True,
}
GATEWAY = """
import json, socket, sys
from pathlib import Path
from gateways import Agreeable
from api.gateway import Gateway
from api.opening import open_store
from api.server import GatewayServer
from api.settings import GatewaySettings
from polytrace.codec import from_json
settings = from_json(GatewaySettings, json.loads(sys.argv[1]))
store = open_store(Path(settings.store), quota_bytes=settings.quota_bytes)
server = GatewayServer(Gateway(store, settings, Agreeable()), settings)
server.run(sockets=[socket.socket(fileno=int(sys.argv[2]))])
"""
JSON = {"Content-Type": "application/json"}


class OwnProcess:
    """The gateway, its store, and callers: an operator, and users of two tenants."""

    def __init__(self, folder: Path) -> None:
        self.store = Store(folder)
        about = json.dumps(to_json(description_of_nothing())).encode()
        self.store.want(DeploymentSpec(source="none", name="m"))
        self.store.set_state("m", DeploymentState.READY, "ready")
        self.store.publish("m", Published(source="none", dtype="auto", description=about, tokenizer=None))
        listener = bind("127.0.0.1", 0)
        self.address = listener.getsockname()
        url = f"http://127.0.0.1:{self.address[1]}"
        settings = json.dumps(to_json(GatewaySettings(store=str(folder), **SETTLED)))
        paths = os.pathsep.join((str(Path.cwd()), str(Path.cwd() / "tests")))
        self._process = subprocess.Popen(
            [sys.executable, "-c", GATEWAY, settings, str(listener.fileno())],
            pass_fds=[listener.fileno()],
            env=os.environ | {"PYTHONPATH": paths},
        )
        listener.close()
        self.keys = {}
        for tenant in ("vision", "audio"):
            self.store.tenants.add(tenant, LOCAL)
            self.keys[tenant] = self.store.keys.make(tenant, "ann", LOCAL)[1]
        self.keys["operator"] = self.store.keys.make("default", "ops", LOCAL, role=Role.OPERATOR)[1]
        self.http = {who: httpx.Client(base_url=url, headers=self.bearer(who), timeout=20) for who in self.keys}
        wait_until(lambda: self.http["operator"].get("/readyz").status_code == 200, 30)

    def bearer(self, who: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.keys[who]}"}

    def connect(self, sent: str | bytes = b"", *, who: str | None = "vision") -> socket.socket:
        """A connection on which this was sent; `KEY` in it is the header with the key of `who`."""
        text = sent if isinstance(sent, bytes) else sent.encode()
        key = b"Host: x\r\n" if who is None else f"Host: x\r\nAuthorization: Bearer {self.keys[who]}\r\n".encode()
        connection = socket.create_connection(self.address, timeout=20)
        connection.sendall(text.replace(b"KEY", key))
        return connection

    def memory_bytes(self) -> int:
        """What is resident."""
        return int(Path(f"/proc/{self._process.pid}/statm").read_text().split()[1]) * resource.getpagesize()

    def close(self) -> None:
        for client in self.http.values():
            client.close()
        self._process.terminate()
        self._process.wait(timeout=20)
        self.store.close()


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OwnProcess]:
    gateway = OwnProcess(tmp_path_factory.mktemp("bad") / "store")
    yield gateway
    gateway.close()


@pytest.fixture(autouse=True)
def nobody_else_notices(gateway: OwnProcess) -> Iterator[None]:
    yield
    assert gateway.http["audio"].get("/v1/models").status_code == 200


def is_over(connection: socket.socket) -> bool:
    """Whether the other side has ended a connection; of what it has sent before, a little is read."""
    poll = select.poll()
    poll.register(connection, select.POLLIN | select.POLLERR | select.POLLHUP | select.POLLRDHUP)
    events = [event for _, event in poll.poll(0)]
    return any(event & (select.POLLERR | select.POLLHUP | select.POLLRDHUP) for event in events)


def first_line(connection: socket.socket) -> str:
    return connection.makefile("rb").readline().decode().strip()


BODIES = [
    ("POST", "/v1/models/m/requests"),
    ("POST", "/v1/models/m/validate"),
    ("POST", "/v1/models/m/sites"),
    ("POST", "/v1/models/m/edits/one"),
    ("PUT", "/v1/constants/" + "0" * 64),
    ("POST", "/v1/constants/missing"),
    ("POST", "/v1/keys"),
    ("PUT", "/v1/tenants/new"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/nowhere"),
    ("POST", "/healthz"),
]


@pytest.mark.parametrize("is_announced", [True, False])
@pytest.mark.parametrize(("method", "path"), BODIES)
def test_a_gigabyte_of_zeros_is_refused_early(gateway: OwnProcess, method: str, path: str, is_announced: bool) -> None:
    before, sent = gateway.memory_bytes(), 0

    def zeros() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(1024):
            sent += MIB
            yield bytes(MIB)

    headers = JSON | ({"Content-Length": str(1 << 30)} if is_announced else {})
    answer = gateway.http["operator"].request(method, path, content=zeros(), headers=headers)
    expected = {"/v1/nowhere": 404, "/healthz": 405}.get(path, 413)
    if path.startswith("/v1/constants/0") and not is_announced:
        expected = 400  # it says how long it is
    assert answer.status_code == expected, answer.text
    assert sent < 64 * MIB, "the rest was not read"
    assert gateway.memory_bytes() - before < 64 * MIB


def test_a_compressed_body_is_refused(gateway: OwnProcess) -> None:
    answer = gateway.http["vision"].post("/v1/models/m/requests", content=body(), headers={"Content-Encoding": "gzip"})
    assert answer.status_code == 415 and "Content-Encoding is not taken" in answer.json()["detail"]
    as_it_is = {"Content-Encoding": "identity"}
    assert gateway.http["vision"].post("/v1/models/m/requests", content=body(), headers=as_it_is).status_code == 202


def json_routes(gateway: OwnProcess) -> Iterator[tuple[str, str]]:
    """Every call whose JSON the gateway parses itself, by the service's own document."""
    for path, methods in gateway.http["operator"].get("/openapi.json").json()["paths"].items():
        for method, about in methods.items():
            is_json = "application/json" in about.get("requestBody", {}).get("content", ())
            if is_json and not path.endswith("/sites"):
                yield method.upper(), path.replace("{name}", "m").replace("{tenant}", "vision").replace("{user}", "ann")


@pytest.mark.parametrize(
    "nested",
    ["[" * 100_000, '{"a":' * 100_000, "[" * 900 + "]" * 900, '{"a":' * 300 + "1" + "}" * 300, "1" * 100_000],
    ids=["lists", "objects", "closed lists", "closed objects", "one number"],
)
def test_deep_nesting_is_the_callers_mistake_on_every_route(gateway: OwnProcess, nested: str) -> None:
    routes = list(json_routes(gateway))
    assert len(routes) >= 10
    for method, path in routes:
        for told in (nested, f'{{"model": "m", "polytrace": {nested}, "limits": {nested}, "prompt": {nested}}}'):
            answer = gateway.http["operator"].request(method, path, content=told, headers=JSON)
            assert 400 <= answer.status_code < 500, f"{method} {path}: {answer.status_code} {answer.text}"
            assert len(answer.content) < 10_000


@pytest.mark.parametrize(
    ("method", "path", "told"),
    [
        ("PUT", "/v1/tenants/odd", '{"weight": NaN}'),
        ("PUT", "/v1/tenants/odd", '{"weight": Infinity}'),
        ("PUT", "/v1/tenants/odd", '{"weight": 1e999}'),
        ("PUT", "/v1/tenants/odd", '{"limits": {"passes": NaN}}'),
        ("POST", "/v1/keys", '{"expires_in_s": NaN}'),
        ("POST", "/v1/keys", '{"expires_in_s": Infinity}'),
        ("POST", "/v1/keys", '{"label": "\\ud800"}'),
        ("POST", "/v1/keys", '{"\\ud800": 1}'),
        ("PUT", "/v1/models/odd", '{"source": "none", "cpus": Infinity}'),
        ("PUT", "/v1/models/odd", '{"source": "none", "cpus": NaN}'),
        ("PUT", "/v1/models/odd", '{"source": "none", "stages": 1e400}'),
        ("PUT", "/v1/models/odd", '{"source": "none", "stages": true}'),
        ("PUT", "/v1/models/odd", '{"source": "none", "ranks": "2"}'),
        ("PATCH", "/v1/models/m", '{"replicas": true}'),
        ("PATCH", "/v1/models/m", '{"replicas": "3"}'),
        ("PUT", "/v1/models/m/limits", '{"passes": true}'),
        ("PUT", "/v1/models/m/limits", '{"passes": "3"}'),
        ("PUT", "/v1/models/m/limits", '{"passes": 3.5}'),
        ("PUT", "/v1/models/m/limits", '{"passes": NaN}'),
        ("PUT", "/v1/models/m/limits", '{"passes": 99999999999999999999999999}'),
        ("POST", "/v1/completions", '{"model": "m", "prompt": "a", "temperature": NaN}'),
        ("GET", "/v1/requests/" + "0" * 32 + "?wait=nan", ""),
        ("POST", "/v1/keys/nobody/rotate?grace_s=nan", ""),
        ("POST", "/v1/keys/nobody/rotate?grace_s=inf", ""),
    ],
)
def test_what_is_no_number_or_text_is_refused(gateway: OwnProcess, method: str, path: str, told: str) -> None:
    answer = gateway.http["operator"].request(method, path, content=told, headers=JSON if told else {})
    assert answer.status_code == 400, f"{answer.status_code} {answer.text}"
    assert gateway.store.deployment("odd") is None
    assert gateway.store.allowances.limit_texts("default", "m")[1] in (None, "{}")


@pytest.mark.parametrize(
    "path", ["/models/a%00", "/requests?model=a%00", "/kept/a%00", "/kept?left_by=%00", "/nowhere%00"]
)
def test_a_nul_is_in_no_name_whatever_the_database_would_say(gateway: OwnProcess, path: str) -> None:
    for method in ("GET", "DELETE"):
        answer = gateway.http["operator"].request(method, f"/v1{path}")
        assert answer.status_code == 400 and "NUL" in answer.json()["detail"]


def test_ten_thousand_mistakes_are_told_in_a_few_lines(gateway: OwnProcess) -> None:
    answer = gateway.http["vision"].post("/v1/constants/missing", json={"hashes": [1] * 9_999})
    assert answer.status_code == 400 and len(answer.content) < 2_000


def test_a_head_has_a_length(gateway: OwnProcess) -> None:
    for head in (
        f"GET /healthz HTTP/1.1\r\nX-Long: {'x' * MAX_HEAD_BYTES}\r\n\r\n",
        f"GET /{'x' * MAX_HEAD_BYTES} HTTP/1.1\r\n\r\n",
        "GET /healthz HTTP/1.1\r\n" + "X: y\r\n" * MAX_HEAD_BYTES,
        "GET /healthz HTTP/1.1\r\nX-Endless: " + "x" * (4 * MIB),
    ):
        with gateway.connect(head) as connection:
            assert first_line(connection) == "HTTP/1.1 431 Request Header Fields Too Large"
    with gateway.connect(f"GET /healthz HTTP/1.1\r\nX-Long: {'x' * 60_000}\r\n\r\n") as connection:
        assert first_line(connection) == "HTTP/1.1 200 OK"


def test_what_is_not_http_is_told_so(gateway: OwnProcess) -> None:
    for noise in (
        b"\0" * 1000,
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"GET / HTTP/9.9\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ):
        with gateway.connect(noise) as connection:
            assert first_line(connection) == "HTTP/1.1 400 Bad Request"


HALVES = [
    "",
    "GET /healthz HT",
    "GET /healthz HTTP/1.1\r\nKEYX-Half: ",
    "POST /v1/keys HTTP/1.1\r\nKEYContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{",
    "POST /v1/completions HTTP/1.1\r\nKEYContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{",
    "POST /v1/models/m/requests HTTP/1.1\r\nKEYContent-Length: 100\r\n\r\nhalf",
    "POST /v1/models/m/sites HTTP/1.1\r\nKEYTransfer-Encoding: chunked\r\n\r\n5\r\nha",
    "GET /healthz HTTP/1.1\r\nKEY\r\n\r\nGET /healthz HT",
]


def test_five_hundred_connections_that_are_left_harm_nobody_and_end(gateway: OwnProcess) -> None:
    before = gateway.memory_bytes()
    with contextlib.ExitStack() as stack:
        left = [stack.enter_context(gateway.connect(HALVES[number % len(HALVES)])) for number in range(500)]
        for who in ("audio", "vision"):
            assert gateway.http[who].post("/v1/models/m/requests", content=body()).status_code == 202
        assert gateway.memory_bytes() - before < 100 * MIB
        wait_until(lambda: all(map(is_over, left)), 20)
        late = left[3]
        assert first_line(late) == "HTTP/1.1 408 Request Timeout"


def test_who_waits_longest_makes_room_for_the_next(gateway: OwnProcess) -> None:
    with contextlib.ExitStack() as stack:
        working = stack.enter_context(gateway.connect("POST /v1/keys HTTP/1.1\r\nKEYContent-Length: 2\r\n\r\n{"))
        idle = [stack.enter_context(gateway.connect()) for _ in range(SETTLED["max_connections"] + 50)]
        assert httpx.get(f"http://127.0.0.1:{gateway.address[1]}/healthz").status_code == 200
        wait_until(lambda: is_over(idle[0]))
        assert not is_over(working)
        working.sendall(b"}")
        assert first_line(working).startswith("HTTP/1.1 4"), "it was heard to the end: it says nothing of its type"


def test_bodies_that_drip_are_ended(gateway: OwnProcess) -> None:
    with contextlib.ExitStack() as stack:
        dripping = []
        for path in ("/v1/keys", "/v1/completions", "/v1/models/m/requests", "/v1/models/m/sites"):
            head = f"POST {path} HTTP/1.1\r\nKEYContent-Type: application/json\r\nContent-Length: 9999\r\n\r\n"
            dripping.append(stack.enter_context(gateway.connect(head)))
        answered: list[str] = []
        while dripping:
            for connection in select.select(dripping, [], [], 0.05)[0]:
                dripping.remove(connection)
                answered.append(first_line(connection))
            for connection in dripping:
                with contextlib.suppress(ConnectionError):
                    connection.sendall(b" ")
    assert sorted(answered) == ["HTTP/1.1 400 Bad Request"] * 2 + ["HTTP/1.1 408 Request Timeout"] * 2


@dataclass
class Large:
    """A result of many bytes."""

    request: RequestId
    size: int


@pytest.fixture(scope="module")
def large(gateway: OwnProcess) -> Large:
    posted = gateway.http["vision"].post("/v1/models/m/requests", content=body()).json()["id"]
    request = RequestId(posted)
    while request not in [claimed.request for claimed in gateway.store.claim("m", 10)]:
        pass
    size = 64 * MIB
    place = gateway.store.place_result(request, ROOM, size)
    header = result_header([], receipt_of(request), place.start)
    gateway.store.finish([Finished(request=request, header=header)])
    return Large(request, size)


def test_slow_readers_of_a_large_result_take_no_memory_and_are_ended(gateway: OwnProcess, large: Large) -> None:
    before = gateway.memory_bytes()
    with contextlib.ExitStack() as stack:
        asked = f"GET /v1/requests/{large.request}/result HTTP/1.1\r\nKEY\r\n"
        readers = [stack.enter_context(gateway.connect(asked)) for _ in range(40)]
        most = 0

        def all_are_over() -> bool:
            nonlocal most
            for reader in readers[:20]:  # the others read nothing at all
                with contextlib.suppress(ConnectionError):
                    reader.recv(100)  # ten times a second
            time.sleep(0.1)
            most = max(most, gateway.memory_bytes() - before)
            assert gateway.http["audio"].get("/v1/models").status_code == 200
            return all(map(is_over, readers))

        wait_until(all_are_over, 30)
        assert most < 160 * MIB, "of 40 readers"


def test_who_reads_on_gets_all_of_it_however_long_it_takes(gateway: OwnProcess, large: Large) -> None:
    began, read = time.monotonic(), 0
    with gateway.http["vision"].stream("GET", f"/v1/requests/{large.request}/result") as answer:
        for piece in answer.iter_raw(MIB):
            read += len(piece)
            time.sleep(0.02)
    assert read == int(answer.headers["content-length"]) >= large.size
    assert time.monotonic() - began > SETTLED["read_idle_s"]


def test_nothing_is_read_for_who_has_left(gateway: OwnProcess, large: Large) -> None:
    """Else a few bytes of a call would make the service read a disk full."""
    io = Path(f"/proc/{gateway._process.pid}/io")

    def read_bytes() -> int:
        return int(io.read_text().split()[1])

    before = read_bytes()
    for _ in range(10):
        gateway.connect(f"GET /v1/requests/{large.request}/result HTTP/1.1\r\nKEY\r\n").close()
    assert gateway.http["audio"].get("/v1/models").status_code == 200
    time.sleep(0.5)
    assert read_bytes() - before < 3 * large.size


def test_uploads_under_way_hold_so_much_of_one_tenant_and_so_much_of_all(gateway: OwnProcess) -> None:
    head = f"POST /v1/models/m/requests HTTP/1.1\r\nKEYExpect: 100-continue\r\nContent-Length: {MIB}\r\n\r\n"

    def upload(who: str) -> socket.socket:
        """One that is under way; what it announces counts."""
        connection = stack.enter_context(gateway.connect(head, who=who))
        assert first_line(connection) == "HTTP/1.1 100 Continue"
        return connection

    def refusal(who: str, status: int) -> str:
        """What is said of one more of a MiB, while the others go on."""
        for connection in held:
            connection.sendall(b"x")
        answer = gateway.http[who].post("/v1/models/m/requests", content=bytes(MIB))
        assert (answer.status_code, answer.headers["retry-after"]) == (status, "2"), answer.text
        return str(answer.json()["detail"])

    with contextlib.ExitStack() as stack:
        held = [upload(who) for who in ("vision", "vision")]
        assert "uploads of tenant vision that are under way hold 2.1 MB" in refusal("vision", 429)
        held += [upload(who) for who in ("audio", "audio")]
        assert "uploads that are under way hold 4.19 MB" in refusal("operator", 503)
        assert gateway.http["operator"].post("/v1/models/m/requests", content=body()).status_code == 202, "a small one"
    for who in ("vision", "audio"):
        wait_until(lambda who=who: gateway.http[who].post("/v1/models/m/requests", content=body()).status_code == 202)  # type: ignore[misc]
