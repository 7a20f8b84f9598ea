"""A gateway that is killed at any moment under load: every request that was accepted is accounted for afterwards."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
from gateways import ROOM, body, description_of_nothing, receipt_of, wait_until

from api.patience import patient
from api.server import bind
from api.status import RequestState
from api.store import Store
from cluster.requests import DeploymentState, Finished, Published
from polytrace.codec import to_json
from polytrace.wire import result_header
from scheduling.plan import RequestId

PATH = "/v1/models/m/requests"
KILLS = 4
CLIENTS = 6

# A gateway as the supervisor starts it: the socket outlives it, so whoever calls while there is none waits.
GATEWAY = """
import socket, sys
from pathlib import Path
from gateways import Agreeable
from api.gateway import Gateway
from api.opening import open_store
from api.server import GatewayServer
from api.settings import GatewaySettings
settings = GatewaySettings(store=sys.argv[1], max_wait_s=20.0)
server = GatewayServer(Gateway(open_store(Path(sys.argv[1])), settings, Agreeable()), settings)
server.run(sockets=[socket.socket(fileno=int(sys.argv[2]))])
"""


class Gateways:
    """One after another."""

    def __init__(self, folder: Path, listener: socket.socket, environment: dict[str, str]) -> None:
        self._command = [sys.executable, "-c", GATEWAY, str(folder), str(listener.fileno())]
        self._listener = listener
        root = Path.cwd()
        paths = os.pathsep.join((str(root), str(root / "tests")))
        self._environment = os.environ | environment | {"PYTHONPATH": paths}
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(self._command, pass_fds=[self._listener.fileno()], env=self._environment)

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


class Client:
    """Sends requests with keys until each is answered, and asks once more for what it has had."""

    def __init__(self, url: str, number: int) -> None:
        self.answers: dict[str, tuple[str, bytes]] = {}  # key -> request and result
        self.strange: list[str] = []
        self.broken = 0  # calls that a kill cut off
        self.is_stopped = False
        self._url = url
        self._number = number
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def join(self) -> None:
        self._thread.join(timeout=60)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        count = 0
        while not self.is_stopped:
            key = f"{self._number}-{count}"
            count += 1
            request, result = self._answered(key)
            if count % 3 == 0 and self._answered(key) != (request, result):
                self.strange.append(f"{key} was answered twice and differently")
            self.answers[key] = (request, result)

    def _answered(self, key: str) -> tuple[str, bytes]:
        headers = {"Idempotency-Key": key, "Prefer": f"wait={random.choice((0, 5))}"}
        while True:
            try:
                answer = httpx.post(f"{self._url}{PATH}", content=body(self._number + 1), headers=headers, timeout=30)
            except httpx.TransportError:
                self.broken += 1
                continue
            if answer.status_code == 200:
                return answer.headers["x-request-id"], answer.content
            if answer.status_code not in (202, 503):
                self.strange.append(f"{answer.status_code}: {answer.text}")
            time.sleep(0.02)


@pytest.mark.parametrize("places", ["sqlite", "postgres and s3"])
def test_every_accepted_request_is_accounted_for(tmp_path: Path, places: str, request: pytest.FixtureRequest) -> None:
    database = objects = None
    environment: dict[str, str] = {}
    if places != "sqlite":
        database = request.getfixturevalue("postgres").database()
        objects = request.getfixturevalue("s3").place()
        environment = {"POLYTRACE_DATABASE": database, "POLYTRACE_OBJECTS": objects}
    store = Store(tmp_path / "store", database=database, objects=objects)
    about = json.dumps(to_json(description_of_nothing())).encode()
    published = Published(source="none", dtype="auto", description=about, tokenizer=None)
    store.set_state("m", DeploymentState.READY, "ready")
    store.publish("m", published)
    controller = Controller(store)
    listener = bind("127.0.0.1", 0)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    gateways = Gateways(store.folder, listener, environment)
    try:
        wait_until(lambda: httpx.get(f"{url}/readyz", timeout=30).status_code == 200, 30)
        clients = [Client(url, number) for number in range(CLIENTS)]
        num_kills = 0
        while num_kills < KILLS or not any(client.broken for client in clients):
            num_kills += 1
            before = len(controller.ran)
            wait_until(lambda before=before: len(controller.ran) > before, 30)  # type: ignore[misc]
            time.sleep(random.uniform(0.0, 0.4))
            gateways.kill()
            gateways.start()
        before = len(controller.ran)
        wait_until(lambda: len(controller.ran) > before + CLIENTS, 30)
        for client in clients:
            client.is_stopped = True
        for client in clients:
            client.join()
        wait_until(lambda: store.num_open("m") == 0, 30)
        controller.stop()
        _account(store, clients, controller.ran)
    finally:
        gateways.kill()
        listener.close()
        controller.stop()
        store.close()


def _account(store: Store, clients: list[Client], ran: list[RequestId]) -> None:
    assert not [told for client in clients for told in client.strange]
    assert sum(client.broken for client in clients) > 0, "kills did cut calls off"
    answered = {request: result for client in clients for request, result in client.answers.values()}
    assert len(answered) == sum(len(client.answers) for client in clients) > KILLS, "each key is a request of its own"
    known = [RequestId(row[0]) for row in store.database.rows("SELECT id FROM requests")]
    statuses = store.statuses(known)
    assert answered.keys() <= set(known)
    assert all(status.state is RequestState.DONE or status.error is not None for status in statuses.values())
    assert {status.id for status in statuses.values() if status.state is RequestState.DONE} >= answered.keys()
    assert len(ran) == len(set(ran)), "none ran twice"
    keys = store.database.rows("SELECT count(*) FROM idempotency")[0][0]
    assert keys == len(known), "each was accepted by a key, and each key once"


class Controller:
    """Runs what comes, in this process: gateways come and go, it stays. Every run has another result."""

    def __init__(self, store: Store) -> None:
        self.ran: list[RequestId] = []
        self._store = patient(store)
        self._is_stopped = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._is_stopped = True
        self._store.interrupt()
        self._thread.join(timeout=30)

    def _run(self) -> None:
        while not self._is_stopped:
            for claimed in self._store.claim("m", 4):
                self.ran.append(claimed.request)
                place = self._store.place_result(claimed.request, ROOM, 0)
                receipt = receipt_of(RequestId(f"{claimed.request}, run {len(self.ran)}"), ())
                self._store.finish([Finished(request=claimed.request, header=result_header([], receipt, place.start))])
            self._store.wait_for_requests(0.05)
