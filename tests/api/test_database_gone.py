"""The database goes away under load and comes back: calls are refused meanwhile, and nothing accepted is lost."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from databases import Postgres
from gateways import ROOM, Agreeable, GatewayService, body, description_of_nothing, receipt_of, wait_until

import api.database
from api.away import AwayError
from api.claiming import all_to_each
from api.database import open_database
from api.patience import patient
from api.status import RequestState
from api.store import Store
from cluster.requests import ControllerStore, DeploymentState, Divide, Finished
from polytrace.wire import result_header
from scheduling.plan import RequestId

PATH = "/v1/models/m/requests"


@pytest.fixture
def server(mortal_postgres: Postgres) -> Postgres:
    return mortal_postgres


class Runner:
    """What a controller does with the store: claims, runs, finishes, and tells how far it is."""

    def __init__(self, store: ControllerStore) -> None:
        self._store = store
        self.ran: list[RequestId] = []
        self._is_stopped = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._is_stopped = True
        self._store.interrupt()
        self._thread.join(timeout=30)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        while not self._is_stopped:
            for claimed in self._store.claim("m", 3):
                assert claimed.path.read_bytes()
                self.ran.append(claimed.request)
                place = self._store.place_result(claimed.request, ROOM, 0)
                header = result_header([], receipt_of(claimed.request), place.start)
                self._store.finish([Finished(request=claimed.request, header=header)])
            self._store.set_state("m", DeploymentState.READY, "ready")
            self._store.wait_for_requests(0.02)


class Client:
    """Sends requests one after another, each with a key until it is accepted."""

    def __init__(self, service: GatewayService, number: int) -> None:
        self.accepted: dict[str, str] = {}  # key -> request
        self.refused = 0
        self.strange: list[Any] = []
        self._number = number
        self._service = service
        self._is_stopped = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._is_stopped = True
        self._thread.join(timeout=30)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        with httpx.Client(base_url=self._service.url, timeout=30) as http:
            count = 0
            while not self._is_stopped:
                count += 1
                key = f"{self._number}-{count}"
                while key not in self.accepted:
                    answer = http.post(PATH, content=body(self._number), headers={"Idempotency-Key": key})
                    if answer.status_code == 202:
                        self.accepted[key] = answer.json()["id"]
                    elif answer.status_code == 200:
                        self.accepted[key] = answer.headers["x-request-id"]
                    elif answer.status_code == 503 and "retry-after" in answer.headers:
                        self.refused += 1
                        time.sleep(0.1)
                    else:
                        self.strange.append((answer.status_code, answer.text))
                        return


@pytest.mark.parametrize(("how", "gone_s"), [("stop", 10.0), ("kill", 1.0)])
def test_nothing_is_lost_and_the_service_goes_on_by_itself(
    tmp_path: Path, server: Postgres, how: str, gone_s: float
) -> None:
    url = server.empty_database()
    service = GatewayService(tmp_path / "store", Agreeable(), description_of_nothing(), database=url)
    controllers = Store(service.store.folder, database=url)
    runner = Runner(patient(controllers))
    clients = [Client(service, number) for number in range(1, 4)]
    wait_until(lambda: len(runner.ran) > 5)
    getattr(server, how)()
    assert service.http.get("/healthz").status_code == 200, "the gateway itself is well"
    gone = service.http.post(PATH, content=body())
    assert gone.status_code == 503 and gone.headers["retry-after"]
    assert gone.json()["detail"] == "the service's database does not answer"
    time.sleep(gone_s)
    server.start()
    ran = len(runner.ran)
    wait_until(lambda: len(runner.ran) > ran + 10, 60)
    for client in clients:
        client.stop()
    wait_until(lambda: service.store.num_open("m") == 0, 30)
    runner.stop()
    controllers.close()
    assert not [client.strange for client in clients if client.strange]
    assert all(client.refused for client in clients)
    accepted = [request for client in clients for request in client.accepted.values()]
    assert len(accepted) == len(set(accepted)) > 20
    statuses = service.store.statuses([RequestId(request) for request in accepted])
    assert set(statuses) == set(accepted), "what was accepted is there"
    assert {status.state for status in statuses.values()} == {RequestState.DONE}
    for request in accepted:
        assert service.http.get(f"/v1/requests/{request}/result").status_code == 200
    with_keys = service.store._db.rows("SELECT count(*) FROM idempotency")[0][0]
    assert with_keys == len(accepted), "each key was accepted once"
    service.close()


def test_who_waits_for_a_result_waits_on_while_the_database_is_away(tmp_path: Path, server: Postgres) -> None:
    url = server.empty_database()
    service = GatewayService(tmp_path / "store", Agreeable(), description_of_nothing(), database=url)
    answers: list[httpx.Response] = []

    def wait() -> None:
        answers.append(service.http.post(PATH, content=body(), headers={"Prefer": "wait=20"}))

    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    request = service.claim()
    server.stop()
    service.store.gateway_bell.ring()
    time.sleep(1)
    assert not answers
    server.start()
    place = service.store.place_result(request, ROOM, 0)
    header = result_header([], receipt_of(request), place.start)
    patient(service.store).finish([Finished(request=request, header=header)])
    waiting.join(timeout=20)
    assert [answer.status_code for answer in answers] == [200]
    service.close()


def test_a_transaction_that_the_server_ended_changes_nothing_and_the_next_one_goes_on(server: Postgres) -> None:
    database = open_database(server.empty_database())
    add = "INSERT INTO facts (id, json) VALUES (?, ?)"
    with database.transaction() as db:
        db.execute(add, ("kept", b"1"))
    with pytest.raises(AwayError) as lost, database.transaction() as db:
        db.execute(add, ("lost", b"1"))
        server.stop()
        server.start()
        db.execute(add, ("lost too", b"1"))
    assert not lost.value.may_be_done
    assert database.rows("SELECT id FROM facts") == [("kept",)]
    with pytest.raises(AwayError) as lost, database.transaction() as db:
        db.execute(add, ("lost", b"1"))
        server.stop()
    assert lost.value.may_be_done, "nobody knows of a commit that was not answered"
    server.start()
    time.sleep(0.6)
    with database.transaction() as db:
        db.execute(add, ("next", b"1"))
    server.stop()
    server.start()
    assert database.rows("SELECT id FROM facts ORDER BY id") == [("kept",), ("next",)], "a lost connection is made anew"
    database.close()


def test_what_an_unheard_answer_claimed_is_claimed_again(tmp_path: Path, server: Postgres) -> None:
    """A claim is committed, and its answer is lost with the connection."""

    class Deaf(Store):
        is_deaf = False

        def claim(self, model: str, limit: int, divide: Divide = all_to_each) -> list[Any]:
            claims = super().claim(model, limit, divide)
            if self.is_deaf:
                self.is_deaf = False
                raise AwayError("the answer was lost")
            return claims

    store = Deaf(tmp_path / "store", database=server.empty_database())
    store.set_state("m", DeploymentState.READY, "ready")

    def accept() -> RequestId:
        request = store.new_id()
        store.request_path(request).write_bytes(b"request")
        store.add(request, "m", b"[]", work=1, max_open=10)
        return request

    controller = patient(store)
    first = accept()
    assert [claimed.request for claimed in controller.claim("m", 1)] == [first]
    second = accept()
    store.is_deaf = True
    (claimed,) = controller.claim("m", 10)
    assert claimed.request == second and not claimed.is_suspect, "and it is nobody's fault"
    status = store.status(first)
    assert status is not None and status.state is RequestState.RUNNING, "what is held stays so"
    store.close()


def test_the_room_of_an_upload_that_broke_off_meanwhile_is_given_back(tmp_path: Path, server: Postgres) -> None:
    store = Store(tmp_path / "store", database=server.empty_database())
    path = store.contents.begin_upload("lab~ada", "upload-1", 1000)
    path.write_bytes(b"half")
    server.stop()
    store.contents.give_up("upload-1")
    server.start()
    time.sleep(0.6)
    store.contents.purge()
    assert store.database.rows("SELECT part FROM room") == [] and not path.exists()
    store.close()


def test_a_database_serves_one_service(server: Postgres, monkeypatch: pytest.MonkeyPatch) -> None:
    url = server.empty_database()
    first, second = open_database(url), open_database(url)
    with monkeypatch.context() as patched:
        patched.setattr(api.database, "_HELD_S", 0.3)
        assert first.hold() and not second.hold()
        server.stop()
        server.start()
        assert first.rows("SELECT 1") == second.rows("SELECT 1") == [(1,)]
        assert not second.hold(), "it was taken again with the connection"
    first.close()
    assert second.hold()
    second.close()
