"""The store keeps what it acknowledged, through crashes of whoever uses it, and ends each request once."""

from __future__ import annotations

import base64
import os
import queue
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from api.handover import MAX_ATTEMPTS
from api.logs import MAX_LOGS_BYTES, logs_since
from api.status import RequestState
from api.store import Store
from cluster.config import DeploymentSpec, Mode
from cluster.requests import DeploymentState, Finished, Published
from polytrace.errors import CancelledError, CapacityError, RunError, ServiceError
from polytrace.graph import MAX_LOG_BYTES, NodeId
from scheduling.plan import RequestId, SaveSlot, ValueFacts
from scheduling.receipts import Logged
from scheduling.scheduler import Progress


@pytest.fixture
def store(tmp_path: Path, database_url: str) -> Iterator[Store]:
    store = Store(tmp_path / "store", database=database_url)
    yield store
    store.close()


def add(store: Store, model: str = "m", content: bytes = b"request", max_open: int = 100) -> RequestId:
    request = store.new_id()
    store.request_path(request).write_bytes(content)
    store.received.sync(request)
    if store.deployment(model) is None:
        store.set_state(model, DeploymentState.READY, "ready")
    store.add(request, model, b"[]", work=1, max_open=max_open)
    return request


def state(store: Store, request: RequestId) -> RequestState:
    status = store.status(request)
    assert status is not None
    return status.state


def test_requests_are_claimed_in_the_order_they_came_and_only_once(store: Store) -> None:
    first, second, other = add(store), add(store), add(store, "other")
    assert [claimed.request for claimed in store.claim("m", 1)] == [first]
    assert [claimed.request for claimed in store.claim("m", 10)] == [second]
    assert store.claim("m", 10) == []
    assert state(store, first) is RequestState.RUNNING
    assert state(store, other) is RequestState.QUEUED
    assert store.open_requests() == {"m": {RequestState.RUNNING: 2}, "other": {RequestState.QUEUED: 1}}


def test_a_result_is_there_in_full_when_its_state_says_done(store: Store) -> None:
    request = add(store)
    (claimed,) = store.claim("m", 1)
    assert claimed.path.read_bytes() == b"request"
    place = store.place_result(request, room=64, data_bytes=100)
    assert place.path.stat().st_size == 164
    with place.path.open("r+b") as file:  # a shard's part
        file.seek(place.start)
        file.write(b"x" * 100)
    store.finish([Finished(request=request, header=b"h" * 64, passes=3)])
    status = store.status(request)
    assert status is not None and status.state is RequestState.DONE
    assert (status.passes_done, status.passes) == (3, 3), "as many as it took"
    assert store.result_path(request).read_bytes() == b"h" * 64 + b"x" * 100
    assert not claimed.path.exists()


def test_a_failed_request_keeps_its_error_and_where_the_user_wrote_it(store: Store) -> None:
    request = add(store)
    store.claim("m", 1)
    place = store.place_result(request, room=64, data_bytes=8)
    store.finish([Finished(request=request, error=RunError("index 9 is out of range", where="a.py:3"))])
    status = store.status(request)
    assert status is not None and status.state is RequestState.FAILED and status.finished is not None
    assert isinstance(status.error, RunError)
    assert status.error.where == "a.py:3"
    assert not place.path.exists()


def test_a_result_that_cannot_be_kept_fails_its_own_request_only(store: Store) -> None:
    lost, kept = add(store), add(store)
    store.claim("m", 2)
    store.place_result(lost, room=64, data_bytes=0).path.unlink()
    store.place_result(kept, room=64, data_bytes=0)
    store.finish([Finished(request=lost, header=b"h" * 64), Finished(request=kept, header=b"h" * 64)])
    assert state(store, lost) is RequestState.FAILED
    assert state(store, kept) is RequestState.DONE


def test_a_waiting_request_is_cancelled_at_once_and_a_running_one_through_the_controller(store: Store) -> None:
    running, waiting = add(store), add(store)
    store.claim("m", 1)
    cancelled = store.cancel(waiting)
    assert cancelled is not None and cancelled.state is RequestState.CANCELLED
    assert store.claim("m", 10) == []
    asked = store.cancel(running)
    assert asked is not None and asked.state is RequestState.RUNNING
    assert store.cancellations("m") == [running]
    store.finish([Finished(request=running, error=CancelledError("cancelled"))])
    assert state(store, running) is RequestState.CANCELLED
    assert store.cancellations("m") == []
    assert store.cancel(RequestId("unknown")) is None


def test_a_finished_request_stays_as_it_ended(store: Store) -> None:
    request = add(store)
    store.claim("m", 1)
    store.place_result(request, room=64, data_bytes=0)
    store.finish([Finished(request=request, header=b"h" * 64)])
    store.finish([Finished(request=request, error=ServiceError("late"))])
    store.cancel(request)
    assert state(store, request) is RequestState.DONE
    assert store.result_path(request).exists()


def test_a_full_queue_refuses_with_the_number(store: Store) -> None:
    add(store, max_open=1)
    with pytest.raises(CapacityError, match="1 requests"):
        add(store, max_open=1)


def test_a_new_controller_gets_the_old_ones_requests_but_not_for_ever(store: Store) -> None:
    request = add(store)
    for _ in range(MAX_ATTEMPTS):
        assert [claimed.request for claimed in store.claim("m", 1)] == [request]
        store.requeue("m", is_clean=False)
    status = store.status(request)
    assert status is not None and status.state is RequestState.FAILED
    assert isinstance(status.error, ServiceError)
    assert store.claim("m", 1) == []


def test_a_controller_that_stops_cleanly_blames_nobody(store: Store) -> None:
    request = add(store)
    for _ in range(2 * MAX_ATTEMPTS):
        assert not store.claim("m", 1)[0].is_suspect
        assert store.requeue("m", is_clean=True) == 1
    assert state(store, request) is RequestState.QUEUED


def test_suspects_are_claimed_one_at_a_time(store: Store) -> None:
    first, second = add(store), add(store)
    store.claim("m", 2)
    store.requeue("m", is_clean=False)
    third = add(store)
    assert [(one.request, one.is_suspect) for one in store.claim("m", 9)] == [(first, True)]
    assert [(one.request, one.is_suspect) for one in store.claim("m", 9)] == [(second, True)]
    assert [(one.request, one.is_suspect) for one in store.claim("m", 9)] == [(third, False)]


def test_what_a_deployment_published_is_read_back(store: Store) -> None:
    store.set_state("m", DeploymentState.STARTING, "loading")
    assert store.published("m") is None
    published = Published(source="folder", dtype="auto", description=b"{}", tokenizer=None)
    store.publish("m", published)
    store.set_state("m", DeploymentState.READY, "ready")
    assert store.published("m") == published
    assert [(one.model, one.state, one.progress) for one in store.deployments()] == [
        ("m", DeploymentState.READY, "ready")
    ]


def test_a_drain_lasts_over_a_restart_of_the_service_that_names_the_model(store: Store) -> None:
    spec = DeploymentSpec(name="m", source="none", stages=2, device_map={"a": 0})
    assert store.want(spec).mode is Mode.SERVING
    store.drain("m")
    assert store.want(spec, replaces=True).mode is Mode.DRAINING, "`serve` says what there is, not that it is resumed"
    assert store.want(replace(spec, replicas=2), replaces=True).mode is Mode.DRAINING
    assert store.want(replace(spec, stages=1), replaces=True).mode is Mode.SERVING, "something else is deployed"
    store.drain("m")
    assert store.want(replace(spec, stages=1)).mode is Mode.SERVING, "so does a deploy"
    store.remove("m", now=False)
    assert store.want(replace(spec, stages=1), replaces=True).mode is Mode.SERVING


def test_every_ring_wakes_a_controller_that_waits(store: Store, database_url: str) -> None:
    store.wait_for_requests(0.0)  # opens the listening end
    ringer = Store(store.folder, database=database_url)
    woken: queue.SimpleQueue[int] = queue.SimpleQueue()

    def listen() -> None:
        for number in range(20):
            store.wait_for_requests(60.0)
            woken.put(number)

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    for number in range(20):
        ringer.interrupt()
        assert woken.get(timeout=10) == number, "long before it would have looked by itself"
    listener.join(timeout=10)
    ringer.close()


def test_a_sweep_removes_what_a_crash_cut_off_and_nothing_else(store: Store) -> None:
    kept = add(store)
    done = add(store, "other")
    store.claim("other", 1)
    store.place_result(done, room=64, data_bytes=0)
    store.finish([Finished(request=done, header=b"h" * 64)])
    store.request_path(store.new_id()).write_bytes(b"half an upload")
    store.place_result(kept, room=64, data_bytes=8)
    assert store.sweep() == 2
    assert store.request_path(kept).exists()
    assert store.result_path(done).exists()


_WRITER = """
import sys
from pathlib import Path
from api.store import Store
from cluster.requests import DeploymentState
store = Store(Path(sys.argv[1]), database=sys.argv[2])
store.set_state("m", DeploymentState.READY, "ready")
while True:
    request = store.new_id()
    store.request_path(request).write_bytes(request.encode())
    store.received.sync(request)
    store.add(request, "m", b"[]", work=1, max_open=1_000_000)
    print(request, flush=True)
"""

_RUNNER = """
import sys
from pathlib import Path
from api.store import Store
from cluster.requests import Finished
store = Store(Path(sys.argv[1]), database=sys.argv[2])
store.requeue("m", is_clean=True)
while True:
    for claimed in store.claim("m", 4):
        place = store.place_result(claimed.request, 64, 32)
        with place.path.open("r+b") as file:
            file.seek(64)
            file.write(claimed.path.read_bytes())
        store.finish([Finished(request=claimed.request, header=b"h" * 64)])
        print(claimed.request, flush=True)
    store.wait_for_requests(0.05)
"""


def test_a_new_store_opens_while_another_process_is_making_it(tmp_path: Path) -> None:
    other = sqlite3.connect(tmp_path / "store.db", isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    release = threading.Timer(0.2, other.execute, ["COMMIT"])
    release.start()
    store = Store(tmp_path)
    release.join()
    other.close()
    assert not store.statuses([])
    store.close()


def test_nothing_acknowledged_is_lost_when_both_sides_are_killed(tmp_path: Path, database_url: str) -> None:
    folder = tmp_path / "store"
    acknowledged: list[str] = []
    answered: list[str] = []
    for round_number in range(3):
        writer, runner = (
            subprocess.Popen(
                [sys.executable, "-c", code, str(folder), database_url], stdout=subprocess.PIPE, cwd=Path.cwd()
            )
            for code in (_WRITER, _RUNNER)
        )
        assert writer.stdout is not None and runner.stdout is not None
        writer.stdout.readline()  # both are under way
        runner.stdout.readline()
        time.sleep(0.2 + 0.1 * round_number)
        os.kill(writer.pid, signal.SIGKILL)
        os.kill(runner.pid, signal.SIGKILL)
        acknowledged += writer.communicate()[0].decode().split()
        answered += runner.communicate()[0].decode().split()
    store = Store(folder, database=database_url)
    store.requeue("m", is_clean=True)
    store.sweep()
    statuses = store.statuses([RequestId(request) for request in acknowledged])
    assert len(acknowledged) > 10 and len(answered) > 10
    assert set(statuses) == set(acknowledged)
    for status in statuses.values():
        if status.state is RequestState.DONE:
            assert store.result_path(status.id).read_bytes() == b"h" * 64 + status.id.encode()
        else:
            assert status.state is RequestState.QUEUED
            assert store.request_path(status.id).read_bytes() == status.id.encode()
    done = {request for request, status in statuses.items() if status.state is RequestState.DONE}
    assert {request for request in answered if request in statuses} <= done
    store.close()


def test_logs_are_told_pass_by_pass_within_their_limits_and_gone_when_the_result_is_there(store: Store) -> None:
    request = add(store)
    store.claim("m", 1)
    place = store.place_result(request, room=64, data_bytes=MAX_LOGS_BYTES + 64)
    with store.result_path(request).open("r+b") as file:
        file.seek(place.start)
        file.write(bytes(range(16)))

    def log(name: str, offset: int, num_bytes: int, passes_done: int) -> Logged:
        facts = ValueFacts(shape=(num_bytes,), dtype="uint8", num_bytes=num_bytes)
        slot = SaveSlot(name=name, node=NodeId(0), stage=0, facts=facts, offset=offset)
        return Logged(passes_done=passes_done, slot=slot)

    small = [log("log0", 0, 4, 1), log("log1", 4, 8, 2)]
    large = [log(f"log{number}", 0, MAX_LOG_BYTES, 2) for number in range(2, 40)]
    too_large = log("log40", 0, MAX_LOG_BYTES + 1, 2)
    told = Progress(
        request=request, passes_done=2, passes=3, logs=(*small, too_large, *large), result_start=place.start
    )
    store.note_progress([told])
    status = store.status(request)
    assert status is not None and (status.passes_done, status.passes) == (2, 3)
    names = [entry["name"] for entry in status.logs]
    assert names[:2] == ["log0", "log1"] and "log40" not in names
    assert len(names) - 2 == (MAX_LOGS_BYTES - 12) // MAX_LOG_BYTES
    assert [base64.b64decode(entry["data"]) for entry in status.logs[:2]] == [bytes(range(4)), bytes(range(4, 12))]
    assert "log0" not in [entry["name"] for entry in logs_since(status.logs, 1)]
    store.finish([Finished(request=request, error=RunError("it failed"))])
    ended = store.status(request)
    assert ended is not None and ended.logs == ()
    assert (ended.passes_done, ended.passes) == (2, 3), "how far it came"
