"""Contents in the store: an owner's quota, whose they are, how long they stay, and the order of what changes states."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from api.identity import LOCAL, Identity, owner_name
from api.needs import Needs
from api.status import RequestState
from api.store import Store
from cluster.requests import Claimed, DeploymentState, Finished, LeftBehind, Place
from polytrace.contents import digest_of
from polytrace.errors import CapacityError, GraphError, MissingError, NotFoundError, RunError, TooLargeError, WireError
from polytrace.tensors import num_bytes
from polytrace.wire import content_header, decode_content
from scheduling.plan import RequestId

QUOTA = 20_000
KIB = 1024  # bytes of data of each content here
OWNER, ADA, BOB = LOCAL.owner, owner_name("lab", "ada"), owner_name("lab", "bob")


@pytest.fixture
def store(tmp_path: Path, database_url: str) -> Iterator[Store]:
    store = Store(tmp_path / "store", database=database_url, quota_bytes=QUOTA)
    store.set_state("m", DeploymentState.READY, "ready")
    store.set_state("other", DeploymentState.READY, "ready")
    yield store
    store.close()


def content(number: int, size: int = KIB) -> tuple[str, bytes]:
    """A hash and its file."""
    data = bytes([number]) * size
    return digest_of("uint8", [size], data), content_header("uint8", (size,)) + data


def upload(store: Store, number: int, owner: str = OWNER, size: int = KIB) -> str:
    digest, file = content(number, size)
    path = store.contents.begin_upload(owner, f"upload-{number}", len(file))
    path.write_bytes(file)
    store.contents.finish_upload(owner, f"upload-{number}", digest)
    return digest


def add(
    store: Store,
    *digests: str,
    states: Sequence[str] = (),
    reads: Sequence[str] = (),
    owner: str = OWNER,
    model: str = "m",
) -> RequestId:
    """A request that uses these contents, updates these states and reads those."""
    request = store.new_id()
    store.request_path(request).write_bytes(b"request")
    updated = [(name, True, "uint8", (KIB,)) for name in states]
    read = [(name, False, "uint8", (KIB,)) for name in reads]
    needs = Needs(digests=digests, states=(*updated, *read))
    store.add(request, model, b"[]", work=1, max_open=100, caller=caller(owner), needs=needs)
    return request


def caller(owner: str) -> Identity:
    tenant, user = owner.split("~")
    return Identity(tenant=tenant, user=user)


def left(name: str, *, is_state: bool = False, ttl_s: float | None = None, size: int = KIB) -> LeftBehind:
    return LeftBehind(name=name, is_state=is_state, ttl_s=ttl_s, dtype="uint8", shape=(size,))


def run(store: Store, request: RequestId, *leaves: tuple[LeftBehind, int], error: RunError | None = None) -> None:
    """Ends a claimed request as the controller and its shards do; `leaves`: what stays, and the byte that it is of."""
    places = place(store, request, *leaves)
    header = None if error else bytes(64)
    if header:
        store.place_result(request, 64, 0)
    store.finish([Finished(request=request, header=header, error=error, left=tuple(places))])


def place(store: Store, request: RequestId, *leaves: tuple[LeftBehind, int]) -> list[Place]:
    places = store.place_left(request, [each for each, _ in leaves])
    for placed, (each, number) in zip(places, leaves, strict=True):
        with placed.path.open("r+b") as file:
            file.seek(placed.start)
            file.write(bytes([number]) * num_bytes(each.dtype, each.shape))
    return places


def claim(store: Store, model: str = "m") -> list[Claimed]:
    return store.claim(model, 100)


def state_of(store: Store, name: str) -> int:
    """The byte that a state is of."""
    entry = store.contents.kept.entry(OWNER, name, is_state=True)
    return decode_content(store.contents.content_path(OWNER, entry.digest).read_bytes()).data[0]


def begin_state(store: Store, name: str, number: int) -> None:
    store.contents.kept.begin_state(OWNER, name, "uint8", (KIB,), upload(store, number))


def files(store: Store) -> int:
    return len(list(store.folder.glob("contents/*/*")))


def test_an_uploaded_content_is_there_once_and_its_hash_is_checked(store: Store) -> None:
    digest, file = content(1)
    assert store.contents.missing(OWNER, [digest]) == [digest]
    assert upload(store, 1) == digest == upload(store, 1)
    assert store.contents.missing(OWNER, [digest]) == []
    assert store.contents.content_path(OWNER, digest).read_bytes() == file and files(store) == 1
    for number, wrong in enumerate((file[:-1], file + b"x", b"", b"no content", content(2)[1])):
        store.contents.begin_upload(OWNER, f"upload-w{number}", len(file)).write_bytes(wrong)
        with pytest.raises(WireError):
            store.contents.finish_upload(OWNER, f"upload-w{number}", digest_of("uint8", [KIB], bytes(KIB)))
        store.contents.give_up(f"upload-w{number}")
    assert files(store) == 1


def test_a_content_is_its_owners_alone(store: Store) -> None:
    """Knowing the hash is not having the content: another owner has to upload it too."""
    digest = upload(store, 1, owner=ADA)
    assert store.contents.missing(BOB, [digest]) == [digest]
    with pytest.raises(NotFoundError):
        store.contents.content_path(BOB, digest)
    with pytest.raises(MissingError, match=digest[:12]):
        add(store, digest, owner=BOB)
    with pytest.raises(MissingError):
        store.contents.kept.begin_state(BOB, "s", "uint8", (KIB,), digest)
    add(store, digest, owner=ADA)
    upload(store, 1, owner=BOB)
    add(store, digest, owner=BOB)
    assert [claimed.contents.name for claimed in claim(store)] == [ADA, BOB]
    for dtype, shape in (("uint8", (KIB // 2,)), ("float64", (1 << 40,))):
        with pytest.raises(WireError, match="the first content of the state 's' is uint8"):
            store.contents.kept.begin_state(ADA, "s", dtype, shape, digest)
    store.contents.kept.begin_state(ADA, "s", "uint8", (KIB,), digest)
    assert store.contents.kept.entries(BOB, is_state=True) == []
    with pytest.raises(ValueError):
        store.contents.folder_of("../ada")


def test_the_quota_purges_what_was_used_least_recently_and_nothing_that_is_needed(store: Store) -> None:
    needed, oldest, older, named = (upload(store, number, size=4000) for number in range(4))
    request = add(store, needed)
    store.contents.kept.begin_state(OWNER, "s", "uint8", (4000,), named)
    store.contents.missing(OWNER, [oldest])  # used now: no longer the oldest
    newest = upload(store, 5, size=6000)
    assert store.contents.missing(OWNER, [needed, oldest, older, named]) == [older]
    with pytest.raises(CapacityError, match="20000"):
        store.contents.begin_upload(OWNER, "upload-big", 19_000)
    with pytest.raises(TooLargeError, match="20000"):
        store.contents.begin_upload(OWNER, "upload-huge", 20_001)
    assert store.contents.missing(OWNER, [needed, oldest, named]) == []  # refused, so nothing went
    claim(store)
    run(store, request)
    upload(store, 6, size=9000)
    assert sorted(store.contents.missing(OWNER, [newest, needed, oldest, named])) == sorted([newest, needed])


def test_uploads_under_way_count(store: Store) -> None:
    store.contents.begin_upload(OWNER, "upload-a", 12_000)
    with pytest.raises(CapacityError):
        store.contents.begin_upload(OWNER, "upload-b", 12_000)
    store.contents.begin_upload("other", "upload-c", 12_000)  # an owner of its own
    store.contents.give_up_uploads()
    store.contents.begin_upload(OWNER, "upload-b", 12_000)


def test_a_kept_value_is_there_when_its_request_is_done_and_goes_when_its_time_is_over(store: Store) -> None:
    request = add(store)
    claim(store)
    run(store, request, (left("mean", ttl_s=60), 7), (left("other"), 8))
    entry = store.contents.kept.entry(OWNER, "mean", is_state=False)
    assert (entry.shape, entry.version, entry.request) == ((KIB,), 1, request)
    assert entry.digest == digest_of("uint8", [KIB], bytes([7]) * KIB)
    assert [each.name for each in store.contents.kept.entries(OWNER, is_state=False)] == ["mean", "other"]
    waiting = add(store, entry.digest)
    with store._db.transaction() as db:
        db.execute("UPDATE kept SET expires = ? WHERE name = ?", (time.time() - 1, "mean"))
    with pytest.raises(NotFoundError):
        store.contents.kept.entry(OWNER, "mean", is_state=False)
    assert store.contents.purge() == 1
    assert files(store) == 2  # a request that waits has it still
    claim(store)
    run(store, waiting)
    assert files(store) == 1
    store.contents.kept.delete(OWNER, "other", is_state=False)
    assert files(store) == 0
    with pytest.raises(NotFoundError):
        store.contents.kept.delete(OWNER, "other", is_state=False)


def test_keeping_under_a_name_again_replaces_what_was_there(store: Store) -> None:
    for number in (1, 2):
        request = add(store)
        claim(store)
        run(store, request, (left("mean"), number))
    entry = store.contents.kept.entry(OWNER, "mean", is_state=False)
    assert (entry.version, entry.digest) == (2, content(2)[0]) and files(store) == 1


def test_an_end_that_is_told_twice_leaves_its_values_once(store: Store) -> None:
    """As after an outage of the database, when nobody knows whether the first word was heard."""
    begin_state(store, "s", 1)
    request = add(store, states=["s"])
    claim(store)
    places = place(store, request, (left("s", is_state=True), 5), (left("mean"), 7))
    store.place_result(request, 64, 0)
    finished = Finished(request=request, header=b"h" * 64, left=tuple(places))
    for _ in range(2):
        store.finish([finished])
        assert state_of(store, "s") == 5
        assert store.contents.kept.entry(OWNER, "s", is_state=True).version == 2
        assert store.contents.kept.entry(OWNER, "mean", is_state=False).version == 1
    status = store.status(request)
    assert status is not None and status.state is RequestState.DONE


def test_a_transaction_that_fails_leaves_what_it_needs_to_be_tried_again(store: Store) -> None:
    request = add(store)
    claim(store)
    places = place(store, request, (left("mean"), 7))
    digests = [(one, store.contents.kept.commit(one)) for one in places]
    with pytest.raises(RunError), store.database.transaction() as db:
        store.contents.kept.leave(db, request, digests)
        store.contents.uses.end(db, request)
        raise RunError("the transaction does not come to its end")
    store.contents.collect()
    store.place_result(request, 64, 0)
    store.finish([Finished(request=request, header=b"h" * 64, left=tuple(places))])
    entry = store.contents.kept.entry(OWNER, "mean", is_state=False)
    assert store.contents.content_path(OWNER, entry.digest).read_bytes() == content(7)[1] and files(store) == 1


def test_what_does_not_fit_into_the_quota_is_not_kept(store: Store) -> None:
    with pytest.raises(TooLargeError, match="keeps 20001 bytes"):
        store.add(store.new_id(), "m", b"[]", work=1, max_open=9, needs=Needs(kept_bytes=20_001))
    first, second = add(store), add(store)
    claim(store)
    places = place(store, first, (left("a", size=12_000), 1))
    with pytest.raises(CapacityError):
        store.place_left(second, [left("b", size=12_000)])
    store.finish([Finished(request=first, error=RunError("it failed"), left=tuple(places))])
    assert files(store) == 0
    store.place_left(second, [left("b", size=12_000)])


def test_a_failed_request_leaves_nothing_and_changes_no_state(store: Store) -> None:
    begin_state(store, "s", 1)
    request = add(store, states=["s"])
    claim(store)
    run(store, request, (left("mean"), 7), (left("s", is_state=True), 2), error=RunError("it failed"))
    assert state_of(store, "s") == 1 and files(store) == 1
    assert store.contents.kept.entries(OWNER, is_state=False) == []


def test_a_file_that_is_lost_before_its_request_ends_fails_that_request_only(store: Store) -> None:
    begin_state(store, "s", 1)
    broken, whole = add(store, states=["s"]), add(store)
    claim(store)
    ends = []
    for request, each in ((broken, left("s", is_state=True)), (whole, left("mean"))):
        places = place(store, request, (left("other"), 3), (each, 2))
        store.place_result(request, 64, 0)
        ends.append(Finished(request=request, header=bytes(64), left=tuple(places)))
    ends[0].left[1].path.unlink()
    store.finish(ends)
    statuses = store.statuses([broken, whole])
    assert (statuses[broken].state, statuses[whole].state) == (RequestState.FAILED, RequestState.DONE)
    assert state_of(store, "s") == 1
    names = [entry.name for entry in store.contents.kept.entries(OWNER, is_state=False)]
    assert names == ["mean", "other"] and files(store) == 3  # what the whole one left, and the state


def test_requests_on_one_state_run_in_order_and_others_go_on(store: Store) -> None:
    begin_state(store, "s", 1)
    begin_state(store, "t", 1)
    first, second = add(store, states=["s"]), add(store, states=["s", "t"])
    third, free = add(store, states=["t"], model="other"), add(store)
    claims = {claimed.request: claimed for claimed in (*claim(store), *claim(store, "other"))}
    assert claims.keys() == {first, free}
    assert claims[first].states == {"s": content(1)[0]}
    run(store, first, (left("s", is_state=True), 2))
    (claimed,) = claim(store)
    assert claimed.request == second and claimed.states == {"s": content(2)[0], "t": content(1)[0]}
    assert claim(store, "other") == []  # of whatever deployment
    store.give_back([second], [second])  # a shard was lost: it keeps its turn
    assert claim(store, "other") == []
    (claimed,) = claim(store)
    assert claimed.request == second and claimed.is_suspect
    run(store, second, (left("t", is_state=True), 3))
    assert [claimed.request for claimed in claim(store, "other")] == [third]
    assert (state_of(store, "s"), state_of(store, "t")) == (2, 3)


def test_readers_of_a_state_do_not_wait_for_each_other(store: Store) -> None:
    begin_state(store, "s", 1)
    first, second = add(store, reads=["s"]), add(store, reads=["s"])
    update, last = add(store, states=["s"], reads=["s"]), add(store, reads=["s"])
    assert {claimed.request: claimed.states for claimed in claim(store)} == {
        first: {"s": content(1)[0]},
        second: {"s": content(1)[0]},
    }
    run(store, second)
    assert claim(store) == []  # or the first, run again after a breakdown, would see what came later
    run(store, first)
    assert [claimed.request for claimed in claim(store)] == [update]
    run(store, update, (left("s", is_state=True), 2))
    (claimed,) = claim(store)
    assert (claimed.request, claimed.states) == (last, {"s": content(2)[0]})


@pytest.mark.parametrize("how", ["cancel", "refuse", "worn out"])
def test_a_request_that_ends_in_any_way_gives_its_turn_on(store: Store, how: str) -> None:
    begin_state(store, "s", 1)
    first, second = add(store, states=["s"], model="other"), add(store, states=["s"])
    if how == "cancel":
        store.cancel(first)
    elif how == "refuse":
        store.refuse("other", RunError("gone"))
    else:
        for _ in range(3):
            store.claim("other", 1)
            store.requeue("other", is_clean=False)
    status = store.status(first)
    assert status is not None and status.state.is_final
    assert [claimed.request for claimed in claim(store)] == [second]


def test_a_state_that_is_gone_or_another_one_is_refused(store: Store) -> None:
    with pytest.raises(NotFoundError, match="no state 's'"):
        add(store, states=["s"])
    store.contents.kept.begin_state(OWNER, "s", "uint8", (12,), upload(store, 1, size=12))
    with pytest.raises(GraphError, match=r"'s' is uint8 \[12\]"):
        add(store, states=["s"])
    store.contents.kept.delete(OWNER, "s", is_state=True)
    begin_state(store, "s", 1)
    request = add(store, states=["s"])
    claim(store)
    store.contents.kept.delete(OWNER, "s", is_state=True)
    run(store, request, (left("s", is_state=True), 2))
    status = store.status(request)
    assert status is not None and status.state is RequestState.FAILED and "'s' was deleted" in str(status.error)
    assert store.contents.kept.entries(OWNER, is_state=True) == []


def test_the_first_content_of_a_state_stays_when_it_is_begun_again(store: Store) -> None:
    begin_state(store, "s", 1)
    begin_state(store, "s", 2)
    assert state_of(store, "s") == 1


def test_kept_values_outlive_every_process_and_a_sweep_finds_what_a_crash_left(store: Store, database_url: str) -> None:
    begin_state(store, "s", 1)
    request = add(store)
    claim(store)
    run(store, request, (left("mean"), 7))
    cut = add(store, states=["s"])
    claim(store)
    place(store, cut, (left("s", is_state=True), 9))
    store.contents.begin_upload(OWNER, "upload-cut", 100).write_bytes(b"half")
    lost = upload(store, 5)
    store.contents.content_path(OWNER, lost).unlink()
    store.close()
    again = Store(store.folder, database=database_url, quota_bytes=QUOTA)
    again.sweep()
    again.requeue("m", is_clean=False)
    assert state_of(again, "s") == 1 and again.contents.kept.entry(OWNER, "mean", is_state=False).version == 1
    assert files(again) == 2 and again.contents.missing(OWNER, [lost]) == [lost]
    (claimed,) = again.claim("m", 10)
    run(again, claimed.request, (left("s", is_state=True), 9))
    assert state_of(again, "s") == 9
    again.close()
