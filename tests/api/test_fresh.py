"""A small result is in the database until its file is on the disk, so a crash in between takes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from gateways import body

from api.away import AwayError
from api.idempotency import submit_of_file
from api.identity import LOCAL
from api.results import SMALL_BYTES
from api.status import RequestState
from api.store import Store
from cluster.requests import DeploymentState, Finished
from scheduling.plan import RequestId

HEADER = b"h" * 64


@pytest.fixture
def store(tmp_path: Path, database_url: str) -> Iterator[Store]:
    store = Store(tmp_path / "store", database=database_url)
    store.set_state("m", DeploymentState.READY, "ready")
    yield store
    store.close()


def done(store: Store, data: bytes) -> RequestId:
    request = store.new_id()
    store.request_path(request).write_bytes(b"request")
    store.add(request, "m", b"[]", work=1, max_open=10, is_durable=False)
    store.claim("m", 1)
    place = store.place_result(request, room=64, data_bytes=len(data) + 10)
    with place.path.open("r+b") as file:
        file.seek(place.start)
        file.write(data)
    store.finish([Finished(request=request, header=HEADER, size=64 + len(data))])
    return request


def in_database(store: Store) -> int:
    return int(store.database.rows("SELECT count(*) FROM fresh_results")[0][0])


def test_a_file_that_a_crash_took_is_written_again(store: Store) -> None:
    emptied, gone, other = done(store, b"1"), done(store, b"22"), done(store, b"333")
    store.result_path(emptied).write_bytes(b"")  # as a disk has it that lost what was not synced
    store.result_path(gone).unlink()
    store.sweep()
    for request, data in ((emptied, b"1"), (gone, b"22"), (other, b"333")):
        assert store.result_path(request).read_bytes() == HEADER + data
    assert in_database(store) == 0


def test_what_is_on_the_disk_leaves_the_database_when_the_store_is_closed(store: Store, database_url: str) -> None:
    request = done(store, b"data")
    assert in_database(store) == 1
    store.close()
    again = Store(store.folder, database=database_url)
    assert in_database(again) == 0
    assert again.result_path(request).read_bytes() == HEADER + b"data"
    again.close()


def test_a_large_result_is_in_its_file_alone(store: Store) -> None:
    request = done(store, bytes(SMALL_BYTES))
    assert in_database(store) == 0
    assert store.result_path(request).stat().st_size == 64 + SMALL_BYTES


def test_a_result_that_was_dropped_does_not_come_back(store: Store) -> None:
    request = done(store, b"data")
    assert store.drop_ended(store.now() + 1) == [request]
    store.remove_files([request])
    store.sweep()
    assert not store.result_path(request).exists()


def test_a_result_that_is_told_twice_is_there_once(store: Store) -> None:
    request = done(store, b"data")
    store.finish([Finished(request=request, header=HEADER, size=68)])
    status = store.status(request)
    assert status is not None and status.state is RequestState.DONE
    assert store.result_path(request).read_bytes() == HEADER + b"data"


def test_a_request_is_kept_when_somebody_is_told_of_it_and_after_its_end_there_is_nothing_to_keep(store: Store) -> None:
    waiting = store.new_id()
    store.request_path(waiting).write_bytes(b"request")
    store.add(waiting, "m", b"[]", work=1, max_open=10, is_durable=False)
    store.received.secure(waiting)
    store.received.secure_open()
    assert store.request_path(waiting).read_bytes() == b"request"
    (claimed,) = store.claim("m", 1)
    assert claimed.request == waiting
    store.received.secure(done(store, b"data"))


def kept(store: Store, key: str, *, is_durable: bool = True) -> RequestId:
    """A request that was sent with a key."""
    request = store.new_id()
    store.request_path(request).write_bytes(body())
    submit = submit_of_file(key, "m", store.request_path(request))
    store.add(request, "m", b"[]", work=1, max_open=10, submit=submit, is_durable=is_durable)
    return request


def test_whoever_finds_a_request_by_its_key_is_told_of_it_once_it_is_on_the_disk(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the wait for the disk failed for the one who sent it."""
    settled: list[int] = []

    def settle() -> None:
        settled.append(1)
        if len(settled) == 1:
            raise AwayError("the disk does not answer", may_be_done=True)

    monkeypatch.setattr(store.database, "settle", settle)
    with pytest.raises(AwayError):
        kept(store, "a-key")
    known = store.submitted(LOCAL.owner, "a-key")
    assert known is not None
    store.received.secure(known[0])
    assert len(settled) == 2


def test_a_key_of_a_request_that_a_crash_took_is_free_again(store: Store) -> None:
    torn, whole = kept(store, "torn", is_durable=False), kept(store, "whole")
    content = store.request_path(torn).read_bytes()
    for left in (b"", content[:20], content[:-1]):
        store.request_path(torn).write_bytes(left)
        store.sweep()
        assert store.submitted(LOCAL.owner, "torn") is None
    assert store.submitted(LOCAL.owner, "whole") is not None
    assert {one.request for one in store.claim("m", 2)} == {torn, whole}, "it ends with the reason"
