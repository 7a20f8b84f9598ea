"""With a place of objects, the service's folder may be lost: everything that was accepted or done is in the place."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from databases import Postgres
from gateways import GENERATED, Agreeable, GatewayService, body, description_of_nothing, receipt_of, submit
from object_stores import S3

from api.away import AwayError
from api.needs import Needs
from api.objects import Objects
from api.results import ObjectResults
from api.store import Store
from cluster.requests import DeploymentState, Finished, LeftBehind
from engine.extents import write_extents
from engine.results import FileSink, Writer
from polytrace.contents import digest_of
from polytrace.errors import RunError, UserError
from polytrace.graph import NodeId
from polytrace.wire import HOLE, content_header, decode_result, result_header
from scheduling.plan import RequestId, SaveSlot, ValueFacts

OWNER = "default~default"
ROOM = 4096


@pytest.fixture(params=["s3", "file"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where objects are: S3, and a folder by its URL, as any place that fsspec knows."""
    if request.param == "file":
        return f"file://{tmp_path / 'objects'}"
    return str(request.getfixturevalue("s3").place())


@pytest.fixture
def database(postgres: Postgres) -> str:
    return postgres.database()


def opened(folder: Path, database: str, place: str) -> Store:
    store = Store(folder, database=database, objects=place)
    store.set_state("m", DeploymentState.READY, "ready")
    return store


def lose(store: Store) -> Path:
    """The machine is gone, with its folder."""
    store.close()
    shutil.rmtree(store.folder)
    return store.folder


def accept(store: Store, content: bytes = b"request", needs: Needs | None = None) -> RequestId:
    request = store.new_id()
    store.request_path(request).write_bytes(content)
    store.received.sync(request)
    store.add(request, "m", b"[]", work=1, max_open=10, needs=needs or Needs())
    return request


def slot(name: str, offset: int, shape: tuple[int, ...], dtype: str = "float32") -> SaveSlot:
    num_bytes = torch.empty(shape, dtype=getattr(torch, dtype)).nbytes
    facts = ValueFacts(shape=shape, dtype=dtype, num_bytes=num_bytes)
    return SaveSlot(name=name, node=NodeId(0), stage=0, facts=facts, offset=offset)


def save(target: str, room: int, values: dict[SaveSlot, torch.Tensor]) -> FileSink:
    """What a shard does with what a request saved."""
    writer = Writer()
    sink = FileSink(target, room, writer)
    for own, value in values.items():
        sink.put(own, value)
    writer.wait()
    writer.close()
    return sink


def test_what_was_accepted_on_a_machine_that_is_lost_runs_on_another(tmp_path: Path, database: str, place: str) -> None:
    first = opened(tmp_path / "store", database, place)
    request = accept(first, b"mine")
    folder = lose(first)
    store = opened(folder, database, place)
    store.sweep()
    (claimed,) = store.claim("m", 10)
    assert claimed.request == request and claimed.path.read_bytes() == b"mine"
    store.finish([Finished(request=request, error=RunError("it failed"))])
    assert Objects(place).sizes("requests") == {} and not claimed.path.exists()
    store.close()


def test_shards_write_a_result_as_objects_and_it_outlives_the_machine(
    tmp_path: Path, database: str, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.extents.EXTENT_BYTES", 1 << 16)
    service = GatewayService(
        tmp_path / "store", Agreeable(), description_of_nothing(), database=database, objects=place
    )
    request = submit(service)
    store = service.store
    large, small, none = torch.arange(50_000).float(), torch.ones(2, 3, dtype=torch.bfloat16), torch.empty(0, 4)
    slots = [slot("large", 0, (50_000,)), slot("small", 200_064, (2, 3), "bfloat16"), slot("none", 200_076, (0, 4))]
    hole = slot(f"{HOLE}0", 200_000, (64,), "uint8")
    placed = store.place_result(request, ROOM, 200_128)
    assert not save(placed.target, placed.start, dict(zip(slots, (large, small, none), strict=True))).failures
    header = result_header([slots[0], hole, *slots[1:]], receipt_of(request), placed.start)
    store.finish([Finished(request=request, header=header, size=placed.start + 200_076)])
    assert not list((store.folder / "results").iterdir()), "it has been on no disk of the service"
    assert len(Objects(place).sizes(f"results/{request}")) == 6, (
        "four pieces of the large one, the small one, the header"
    )
    url = f"/v1/requests/{request}/result"
    whole = service.http.get(url)
    values, _ = decode_result(whole.content)
    assert bytes(values["large"].data) == large.numpy().tobytes()
    assert bytes(values["small"].data) == small.view(torch.uint8).numpy().tobytes()
    size, tag = len(whole.content), whole.headers["etag"]
    head = service.http.head(url)
    assert (head.content, head.headers["content-length"], head.headers["etag"]) == (b"", str(size), tag)
    for asked, start, end in (
        ("bytes=0-0", 0, 1),
        ("bytes=4090-70000", 4090, 70_001),
        ("bytes=204000-", 204_000, size),
        ("bytes=-100", size - 100, size),
        (f"bytes=10-{size + 10**6}", 10, size),
    ):
        part = service.http.get(url, headers={"Range": asked, "If-Range": tag})
        assert part.status_code == 206 and part.content == whole.content[start:end], asked
        assert part.headers["content-range"] == f"bytes {start}-{end - 1}/{size}"
    beyond = service.http.get(url, headers={"Range": f"bytes={size}-"})
    assert beyond.status_code == 416 and beyond.headers["content-range"] == f"bytes */{size}"
    for headers in (
        {"Range": "bytes=0-9", "If-Range": '"another"'},
        {"Range": "bytes=0-1,4-5"},
        {"Range": "lines=1-2"},
    ):
        every = service.http.get(url, headers=headers)
        assert every.status_code == 200 and every.content == whole.content
    service.close()
    shutil.rmtree(tmp_path / "store")
    again = opened(tmp_path / "store", database, place)
    again.sweep()
    assert isinstance(again.results, ObjectResults)
    assert again.results.stored(request).size == size
    assert again.drop_ended(again.now() + 1) == [request]
    again.remove_files([request])
    assert Objects(place).sizes("results") == {}
    again.close()


def test_what_a_lost_shard_writes_late_is_in_no_result(tmp_path: Path, database: str, place: str) -> None:
    store = opened(tmp_path / "store", database, place)
    request = accept(store)
    store.claim("m", 1)
    lost = store.place_result(request, 64, 8)
    placed = store.place_result(request, 64, 8)
    write_extents(placed.target, 64, memoryview(b"12345678"))
    store.finish([Finished(request=request, header=b"h" * 64)])
    write_extents(lost.target, 64, memoryview(b"wrong..."))
    assert isinstance(store.results, ObjectResults)
    found = store.results.stored(request)
    assert found.size == 72 and found.chunk(0, 72) == b"h" * 64 + b"12345678"
    store.close()


def test_contents_and_kept_values_come_back_on_another_machine(tmp_path: Path, database: str, place: str) -> None:
    first = opened(tmp_path / "store", database, place)
    data = bytes([7]) * 16
    digest, file = digest_of("uint8", [16], data), content_header("uint8", (16,)) + data
    first.contents.begin_upload(OWNER, "upload-1", len(file)).write_bytes(file)
    first.contents.finish_upload(OWNER, "upload-1", digest)
    first.contents.kept.begin_state(OWNER, "s", "uint8", (16,), digest)
    keeper = accept(first)
    first.claim("m", 1)
    left = LeftBehind(name="mean", is_state=False, ttl_s=None, dtype="uint8", shape=(4,))
    (kept,) = first.place_left(keeper, [left])
    with kept.path.open("r+b") as part:
        part.seek(kept.start)
        part.write(b"abcd")
    first.place_result(keeper, 64, 0)
    first.finish([Finished(request=keeper, header=b"h" * 64, left=(kept,))])
    user = accept(first, needs=Needs(digests=(digest,)))
    store = opened(lose(first), database, place)
    store.sweep()
    (claimed,) = store.claim("m", 10)
    assert claimed.request == user and (claimed.contents / digest).read_bytes() == file
    entry = store.contents.kept.entry(OWNER, "mean", is_state=False)
    assert store.contents.content_path(OWNER, entry.digest).read_bytes() == content_header("uint8", (4,)) + b"abcd"
    store.contents.kept.delete(OWNER, "mean", is_state=False)
    assert set(Objects(place).sizes("contents")) == {f"{OWNER}/{digest}"}, "what is dropped is dropped there too"
    store.close()


def test_events_of_what_has_ended_are_told_by_another_machine(tmp_path: Path, database: str, place: str) -> None:
    first = GatewayService(tmp_path / "store", Agreeable(), description_of_nothing(), database=database, objects=place)
    request = submit(first)
    first.finish(request, GENERATED)
    told = first.http.get(f"/v1/requests/{request}/events").text
    assert told.count("event: token") == 5
    first.close()
    shutil.rmtree(tmp_path / "store")
    second = GatewayService(tmp_path / "store", Agreeable(), description_of_nothing(), database=database, objects=place)
    assert second.http.get(f"/v1/requests/{request}/events").text == told
    second.close()


def test_a_sweep_removes_objects_of_nobody_and_nothing_else(tmp_path: Path, database: str, place: str) -> None:
    store = opened(tmp_path / "store", database, place)
    waiting, done = accept(store), accept(store)
    store.claim("m", 2)
    store.place_result(done, 64, 0)
    store.finish([Finished(request=done, header=b"h" * 64)])
    objects = Objects(place)
    for name in (f"requests/{'0' * 32}.safetensors", f"results/{'0' * 32}/1/2", f"contents/{OWNER}/{'a' * 64}"):
        objects.put(name, b"of nobody")
    store.sweep()
    assert set(objects.sizes("requests")) == {f"{waiting}.safetensors"}
    assert {name.partition("/")[0] for name in objects.sizes("results")} == {done}
    assert objects.sizes("contents") == {}
    store.close()


def test_a_place_that_does_not_answer_refuses_for_a_while_and_loses_nothing(
    tmp_path: Path, database: str, s3: S3
) -> None:
    service = GatewayService(
        tmp_path / "store", Agreeable(), description_of_nothing(), database=database, objects=s3.place()
    )
    done = submit(service)
    service.finish(done)
    running = submit(service)
    s3.stop()
    try:
        refused = service.http.post("/v1/models/m/requests", content=body(3))
        assert refused.status_code == 503 and "objects cannot be written now" in refused.json()["detail"]
        assert refused.headers["retry-after"]
        assert service.http.get(f"/v1/requests/{done}/result").status_code == 503
        with pytest.raises(AwayError):
            service.finish(running)
        lost = slot("lost", 0, (4,))
        place = service.store.place_result(running, ROOM, 16)
        (failure,) = save(place.target, place.start, {lost: torch.ones(4)}).failures
        assert failure[0] == lost.node and "could not be written" in failure[1], "a request's own failure"
    finally:
        s3.start()
    assert service.http.get(f"/v1/requests/{done}/result").status_code == 200
    service.finish(running)
    assert service.http.get(f"/v1/requests/{running}/result").status_code == 200
    assert service.http.post("/v1/models/m/requests", content=body(3)).status_code == 202
    service.close()


def test_a_place_that_no_package_knows_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="objects cannot be kept at nowhere://bucket"):
        Store(tmp_path / "store", objects="nowhere://bucket")
