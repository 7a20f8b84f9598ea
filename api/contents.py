"""Contents in the store: constants that were uploaded, kept values and states. A folder for each owner.

    contents/<owner>/<hash>       one tensor, a file of `polytrace.wire`; never changes
    contents/<owner>/<part>.part  on its way: an upload, or what shards write for a request that is to leave it

Owns an owner's quota: all contents and what is on its way. When it is used up, what was used least recently goes, but
never what a request that has not ended uses, nor what has a name. Knows nothing of graphs.

Invariants
- A content's row is there only when its file is, whole and durable, and its name is its hash.
- Only its owner can use a content: others have it only if they have uploaded the same bytes.
- Files come and go inside transactions, which all processes take in turn; one goes only when it is on the disk that its
  row has gone, so whatever breaks, what has a name has its file.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from api.away import AwayError
from api.database import Database, Transaction
from api.identity import LOCAL
from api.objects import Objects
from cluster.requests import LeftBehind, Place
from polytrace.contents import digest_of
from polytrace.errors import (
    CapacityError,
    ConflictError,
    GraphError,
    MissingError,
    NotFoundError,
    TooLargeError,
    WireError,
)
from polytrace.keepers import KeptEntry, not_found
from polytrace.tensors import RawTensor, num_bytes
from polytrace.wire import content_header, decode_content
from scheduling.plan import SaveSlot

DEFAULT_OWNER = LOCAL.owner
_AT_ONCE = 500  # ids in one query
_KEPT = "name, is_state, dtype, shape, digest, version, request, expires"
_COLUMNS = "owner, is_state, name, dtype, shape, digest, version, request, expires"


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What a request needs of its owner's contents, and what it will leave there."""

    digests: tuple[str, ...] = ()
    states: tuple[tuple[str, bool, str, tuple[int, ...]], ...] = ()  # name, whether it is updated, dtype, shape
    kept_bytes: int = 0

    @property
    def is_empty(self) -> bool:
        return not (self.digests or self.states or self.kept_bytes)


NOTHING = Needs()


def needs_of(constants: Iterable[RawTensor], saves: Iterable[SaveSlot]) -> Needs:
    """What a request needs: its constants as they were sent, and where its saves go."""
    digests: dict[str, None] = {}
    states: dict[tuple[str, bool, str, tuple[int, ...]], None] = {}
    for raw in constants:
        if raw.state is not None:
            states[raw.state, False, raw.dtype, raw.shape] = None
        elif raw.digest is not None and not raw.is_here:
            digests[raw.digest] = None
    kept_bytes = 0
    for slot in saves:
        if slot.keep is not None:
            kept_bytes += slot.facts.num_bytes
            if slot.keep.is_state:
                states[slot.keep.name, True, slot.facts.dtype, slot.facts.shape] = None
    return Needs(digests=tuple(digests), states=tuple(states), kept_bytes=kept_bytes)


class Contents:
    """The part of the store that holds contents. Its methods may be called from any thread."""

    def __init__(
        self,
        db: Database,
        folder: Path,
        quota_bytes: int,
        now: Callable[[], float] = time.time,
        objects: Objects | None = None,
    ) -> None:
        self._db = db
        self._now = now
        self._objects = objects  # where every content is too, so that the folder may be lost
        self._folder = folder
        self._made: set[str] = set()  # owners whose folder is there
        self.quota_bytes = quota_bytes  # of each owner
        self._dropped: SimpleQueue[tuple[str, str]] = SimpleQueue()  # owner and hash, whose files are to go
        self._given_up: list[str] = []  # parts, whose rows are to go
        self._later: list[tuple[str, str]] = []  # the same, of objects
        self._dropped_parts: SimpleQueue[tuple[str, str]] = SimpleQueue()  # owner and part, the same
        folder.mkdir(mode=0o700, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # of a store from before there were tenants
            (folder / "default").rename(folder / DEFAULT_OWNER)

    def folder_of(self, owner: str) -> Path:
        """Where an owner's contents are."""
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._@~-]{0,130}", owner):
            raise ValueError(f"{owner!r} cannot own anything")
        folder = self._folder / owner
        if owner not in self._made:
            folder.mkdir(mode=0o700, exist_ok=True)
            self._made.add(owner)
        return folder

    def collect(self) -> None:
        """Removes the files of what was dropped, behind the transaction that did it."""
        gone, parts = _all_of(self._dropped) | set(self._later), _all_of(self._dropped_parts)
        self._later.clear()
        if not gone and not parts:
            return
        try:
            with self._db.transaction(is_durable=False) as db:  # nobody puts one there again meanwhile
                for owner, digest in gone:
                    if not _has(db, owner, digest):
                        (self.folder_of(owner) / digest).unlink(missing_ok=True)
                        self._drop_object(db, owner, digest)
                for owner, part in parts:
                    if db.execute("SELECT 1 FROM room WHERE part = ?", (part,)).fetchone() is None:
                        self._part(owner, part).unlink(missing_ok=True)
        except AwayError:  # what called for it is done; the files go another time
            for each in gone:
                self._dropped.put(each)
            for each in parts:
                self._dropped_parts.put(each)

    def _drop_object(self, db: Transaction, owner: str, digest: str) -> None:
        """Of a content that is dropped, unless its owner may be putting it there again: then another time."""
        if self._objects is None:
            return
        if db.execute("SELECT 1 FROM room WHERE owner = ?", (owner,)).fetchone() is None:
            self._objects.remove(_object_of(owner, digest))
        else:
            self._later.append((owner, digest))

    def _bring(self, owner: str, digest: str) -> None:
        """A content's file is at hand, if the content is anywhere."""
        path = self.folder_of(owner) / digest
        if self._objects is not None and not path.exists():
            self._objects.get_file(_object_of(owner, digest), path)

    def bring_used(self, request: str) -> None:
        """The same of all contents that a claimed request has."""
        for owner, digest in self._db.rows(
            "SELECT owner, digest FROM uses WHERE id = ? AND digest IS NOT NULL", (request,)
        ):
            self._bring(owner, digest)

    # --- uploads

    def missing(self, owner: str, digests: Iterable[str]) -> list[str]:
        """Those that the owner does not have. The others count as used now."""
        asked, now = list(dict.fromkeys(digests)), self._now()
        with self._db.transaction(is_durable=False) as db:
            touched = [(now, owner, digest) for digest in asked]
            db.executemany("UPDATE contents SET used = ? WHERE owner = ? AND digest = ?", touched)
            missing = [digest for digest in asked if not _has(db, owner, digest)]
        for digest in set(asked) - set(missing):
            self._bring(owner, digest)
        return missing

    def begin_upload(self, owner: str, part: str, file_bytes: int) -> Path:
        """Makes room for a file that is to arrive, and says where. `finish_upload` or `give_up` follow."""
        with self._db.transaction(is_durable=False) as db:
            self._make_room(db, owner, file_bytes, "the upload")
            db.execute("INSERT INTO room (part, id, owner, bytes) VALUES (?, ?, ?, ?)", (part, part, owner, file_bytes))
        self.collect()
        return self._part(owner, part)

    def finish_upload(self, owner: str, part: str, digest: str) -> None:
        """Takes the file in. Raises WireError when it is not what its hash says."""
        path = self._part(owner, part)
        if (found := _digest_of_file(path)) != digest:
            raise WireError(f"the content's hash is {found}, not {digest}")
        self._keep(owner, path, digest)
        with self._db.transaction() as db:
            self._adopt(db, owner, path, digest, is_uploaded=True)
            self._drop_parts(db, part)
        self.collect()

    def give_up(self, part: str) -> None:
        """Drops what is on its way for an upload or a request; nothing when there is nothing."""
        try:
            with self._db.transaction(is_durable=False) as db:
                self._drop_parts(db, part)
        except AwayError:
            self._given_up.append(part)  # another time: its room must not be lost to its owner
            return
        self.collect()

    def give_up_uploads(self) -> None:
        """Drops what uploads had begun: the gateway that they came to is gone."""
        with self._db.transaction(is_durable=False) as db:
            for (part,) in db.execute("SELECT part FROM room WHERE part LIKE 'upload-%'").fetchall():
                self._drop_parts(db, part)
        self.collect()

    def sweep(self) -> None:
        """Makes rows and files agree after a crash. Only at the start, while nobody else has the store open."""
        with self._db.transaction() as db:
            db.execute("DELETE FROM room")
            self.end_uses_of_ended(db)
            rows = {(row[0], row[1]) for row in db.execute("SELECT owner, digest FROM contents")}
            files = {(path.parent.name, path.name) for path in self._folder.glob("*/*")}
            for owner, name in files - rows:
                (self._folder / owner / name).unlink(missing_ok=True)
            if self._objects is not None:
                files = {_named(name) for name in self._objects.sizes("contents")}
                self._objects.remove(*(_object_of(*each) for each in files - rows))
            db.executemany("DELETE FROM contents WHERE owner = ? AND digest = ?", rows - files)
            for owner, digest in rows - files:
                db.execute("DELETE FROM kept WHERE owner = ? AND digest = ?", (owner, digest))
        self.purge()

    # --- kept values and states

    def kept_entries(self, owner: str, *, is_state: bool, request: str | None = None) -> list[KeptEntry]:
        """All of an owner that have not expired, by name; or those that a request left."""
        rows = self._db.rows(
            f"SELECT {_KEPT} FROM kept WHERE owner = ? AND is_state = ? AND (expires IS NULL OR expires > ?) "
            "AND (? IS NULL OR request = ?) ORDER BY name",
            (owner, is_state, self._now(), request, request),
        )
        return [_entry(row) for row in rows]

    def kept_entry(self, owner: str, name: str, *, is_state: bool) -> KeptEntry:
        """Raises NotFoundError when there is none, or it has expired."""
        rows = self._db.rows(
            f"SELECT {_KEPT} FROM kept WHERE owner = ? AND is_state = ? AND name = ? "
            "AND (expires IS NULL OR expires > ?)",
            (owner, is_state, name, self._now()),
        )
        if not rows:
            raise not_found(name, is_state)
        return _entry(rows[0])

    def content_path(self, owner: str, digest: str) -> Path:
        """The file of a content. Raises NotFoundError when the owner does not have it."""
        if self.missing(owner, [digest]):
            raise NotFoundError(f"there is no content {digest} here: it has expired, was purged or deleted")
        return self.folder_of(owner) / digest

    def delete_kept(self, owner: str, name: str, *, is_state: bool) -> None:
        """Takes a name away, and its content when no request needs it. Raises NotFoundError."""
        with self._db.transaction() as db:
            row = db.execute(
                "DELETE FROM kept WHERE owner = ? AND is_state = ? AND name = ? "
                "AND (expires IS NULL OR expires > ?) RETURNING digest",
                (owner, is_state, name, self._now()),
            ).fetchone()
            if row is None:
                raise not_found(name, is_state)
            self._drop_unused(db, owner, row[0])
        self.collect()

    def begin_state(self, owner: str, name: str, dtype: str, shape: tuple[int, ...], digest: str) -> KeptEntry:
        """The state of a name, made with this content when there is none.

        Raises MissingError without the content, WireError when it is another one than it is said to be.
        """
        self._bring(owner, digest)
        with self._db.transaction() as db:
            if not _has(db, owner, digest):
                raise _missing([digest])
            content = _mapped(self.folder_of(owner) / digest)[1]
            if (content.dtype, content.shape) != (dtype, shape):
                told = f"{content.dtype} {list(content.shape)}, and not {dtype} {list(shape)}"
                raise WireError(f"the first content of the state {name!r} is {told}")
            db.execute(
                f"INSERT INTO kept ({_COLUMNS}) VALUES (?, 1, ?, ?, ?, ?, 1, NULL, NULL) ON CONFLICT DO NOTHING",
                (owner, name, dtype, json.dumps(shape), digest),
            )
        return self.kept_entry(owner, name, is_state=True)

    def purge(self) -> int:
        """Drops what has expired; how many names. And what could not be given up before."""
        given_up, self._given_up = self._given_up, []
        for part in given_up:
            self.give_up(part)
        if not self._db.rows("SELECT 1 FROM kept WHERE expires <= ? LIMIT 1", (self._now(),)):
            return 0
        with self._db.transaction() as db:
            gone = db.execute("DELETE FROM kept WHERE expires <= ? RETURNING owner, digest", (self._now(),)).fetchall()
            for owner, digest in gone:
                self._drop_unused(db, owner, digest)
        self.collect()
        return len(gone)

    # --- for requests, inside the store's transactions; `collect` follows behind them

    def use(self, db: Transaction, request: str, seq: int, owner: str, needs: Needs) -> None:
        """A request that is accepted has its contents until it has ended, and its turn at its states.

        Raises MissingError, NotFoundError, ConflictError or TooLargeError when it cannot have them.
        """
        if needs.kept_bytes > self.quota_bytes:
            raise TooLargeError(f"the request keeps {needs.kept_bytes} bytes; an owner has {self.quota_bytes} in all")
        if missing := [digest for digest in needs.digests if not _has(db, owner, digest)]:
            raise _missing(missing)
        for name, _, dtype, shape in needs.states:
            row = db.execute(
                "SELECT dtype, shape FROM kept WHERE owner = ? AND is_state = 1 AND name = ?", (owner, name)
            ).fetchone()
            if row is None:
                raise not_found(name, True)
            if (row[0], tuple(json.loads(row[1]))) != (dtype, shape):
                raise GraphError(f"the state {name!r} is {row[0]} {row[1]}, and not {dtype} {list(shape)}")
        contents = [(request, seq, owner, digest) for digest in needs.digests]
        db.executemany("INSERT INTO uses (id, seq, owner, digest) VALUES (?, ?, ?, ?)", contents)
        states = [(request, seq, owner, name, is_update) for name, is_update, _, _ in needs.states]
        db.executemany("INSERT INTO uses (id, seq, owner, state, is_update) VALUES (?, ?, ?, ?, ?)", states)
        now = self._now()
        touched = [(now, owner, digest) for digest in needs.digests]
        db.executemany("UPDATE contents SET used = ? WHERE owner = ? AND digest = ?", touched)

    def states_now(self, db: Transaction, owners: Mapping[str, str]) -> dict[str, dict[str, str]]:
        """The contents that the states of claimed requests have, which stay until they have ended. `owners`: whose each
        of the requests is. Of those that have states.
        """
        found: dict[str, dict[str, str]] = {}
        requests = list(owners)
        for begin in range(0, len(requests), _AT_ONCE):
            some = requests[begin : begin + _AT_ONCE]
            rows = db.execute(
                "SELECT uses.id, kept.name, kept.digest FROM uses JOIN kept ON kept.owner = uses.owner "
                f"AND is_state = 1 AND kept.name = uses.state WHERE uses.id IN ({','.join('?' * len(some))})",
                some,
            )
            for request, name, digest in rows:
                found.setdefault(request, {})[name] = digest
        pins = [(one, owners[one], digest) for one, digests in found.items() for digest in digests.values()]
        if pins:
            db.executemany("INSERT INTO uses (id, owner, digest) VALUES (?, ?, ?)", pins)
        return found

    def end_uses(self, db: Transaction, request: str) -> bool:
        """A request has ended. Whether another one may have waited for its states."""
        gone = db.execute("DELETE FROM uses WHERE id = ? RETURNING owner, state, digest", (request,)).fetchall()
        for owner, _, digest in gone:
            if digest is not None:
                self._drop_unused(db, owner, digest)
        self._drop_parts(db, request)
        return any(state is not None for _, state, _ in gone)

    def end_uses_of_ended(self, db: Transaction) -> None:
        """The same for every request that has ended in some other way."""
        ended = db.execute(
            "SELECT id FROM requests WHERE state NOT IN ('queued', 'running') "
            "AND id IN (SELECT id FROM uses UNION SELECT id FROM room)"
        ).fetchall()
        for (request,) in ended:
            self.end_uses(db, request)

    def place(self, db: Transaction, request: str, left: Sequence[LeftBehind]) -> list[Path]:
        """Room for what a claimed request is to leave, whatever it had before."""
        owner = _owner_of(db, request)
        self._drop_parts(db, request)
        sizes = [len(content_header(each.dtype, each.shape)) + num_bytes(each.dtype, each.shape) for each in left]
        self._make_room(db, owner, sum(sizes), "what the request keeps")
        paths = []
        for number, size in enumerate(sizes):
            part = f"{request}-{number}"
            db.execute("INSERT INTO room (part, id, owner, bytes) VALUES (?, ?, ?, ?)", (part, request, owner, size))
            paths.append(self._part(owner, part))
        return paths

    def leave(self, db: Transaction, request: str, places: Sequence[tuple[Place, str]]) -> None:
        """What a running request leaves gets its names: files that are whole and durable, with their hashes.

        Raises ConflictError when a state has gone or become another one meanwhile; nothing is changed then.
        """
        owner = _owner_of(db, request)
        for place, _ in places:
            left = place.left
            if left.is_state:
                found = db.execute(
                    "SELECT dtype, shape FROM kept WHERE owner = ? AND is_state = 1 AND name = ?", (owner, left.name)
                ).fetchone()
                if found is None or (found[0], tuple(json.loads(found[1]))) != (left.dtype, left.shape):
                    raise ConflictError(f"the state {left.name!r} was deleted while the request ran")
        now = self._now()
        for place, digest in places:
            left = place.left
            before = db.execute(
                "SELECT digest FROM kept WHERE owner = ? AND is_state = ? AND name = ?",
                (owner, left.is_state, left.name),
            ).fetchone()
            self._adopt(db, owner, place.path, digest, is_uploaded=False)
            db.execute(
                f"INSERT INTO kept ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, 1, ?, ?) "
                "ON CONFLICT (owner, is_state, name) DO UPDATE SET "
                "dtype = excluded.dtype, shape = excluded.shape, digest = excluded.digest, version = kept.version + 1, "
                "request = excluded.request, expires = excluded.expires",
                (
                    *(owner, left.is_state, left.name, left.dtype, json.dumps(left.shape), digest, request),
                    None if left.ttl_s is None else now + left.ttl_s,
                ),
            )
            if before is not None and before[0] != digest:
                self._drop_unused(db, owner, before[0])

    def commit_place(self, place: Place) -> str:
        """Makes what shards wrote durable, and gives its hash. OSError when the disk does not take it."""
        digest = _digest_of_file(place.path)
        self._keep(place.path.parent.name, place.path, digest)
        return digest

    def drop_all(self, db: Transaction, owned: str, values: Sequence[Any]) -> list[int]:
        """Drops everything of the owners that a condition names, names or not; the bytes of each content."""
        for owner, part in db.execute(f"DELETE FROM room WHERE {owned} RETURNING owner, part", values).fetchall():
            self._dropped_parts.put((owner, part))
        gone = db.execute(f"DELETE FROM contents WHERE {owned} RETURNING owner, digest, bytes", values).fetchall()
        for owner, digest, _ in gone:
            self._dropped.put((owner, digest))
        return [row[2] for row in gone]

    # --- inside

    def _keep(self, owner: str, path: Path, digest: str) -> None:
        """Makes a file durable that is to become a content, before its row is there; its room has a row meanwhile."""
        if self._objects is None:
            sync(path)
        else:
            self._objects.put_file(_object_of(owner, digest), path)

    def _part(self, owner: str, part: str) -> Path:
        return self.folder_of(owner) / f"{part}.part"

    def _adopt(self, db: Transaction, owner: str, path: Path, digest: str, *, is_uploaded: bool) -> None:
        """A durable file becomes a content too; one that is there already stays.

        The file stays where it was until its part is dropped: the transaction may fail, and be tried again.
        """
        target = self.folder_of(owner) / digest
        num_file_bytes = path.stat().st_size
        if not _has(db, owner, digest) or not target.exists():
            target.unlink(missing_ok=True)  # what a transaction left that failed
            os.link(path, target)
            sync(target.parent)
        db.execute(
            "INSERT INTO contents (owner, digest, bytes, used, is_uploaded) VALUES (?, ?, ?, ?, ?) "
            "ON CONFLICT (owner, digest) DO UPDATE SET used = excluded.used, "
            "is_uploaded = CASE WHEN excluded.is_uploaded = 1 THEN 1 ELSE contents.is_uploaded END",
            (owner, digest, num_file_bytes, self._now(), is_uploaded),
        )

    def _make_room(self, db: Transaction, owner: str, wanted: int, what: str) -> None:
        """Purges what was used least recently, as far as it must. Raises TooLargeError or CapacityError."""
        if wanted > self.quota_bytes:
            raise TooLargeError(f"{what} takes {wanted} bytes; its owner has {self.quota_bytes} in all")
        (held,) = db.execute(
            "SELECT (SELECT coalesce(sum(bytes), 0) FROM contents WHERE owner = ?) "
            "+ (SELECT coalesce(sum(bytes), 0) FROM room WHERE owner = ?)",
            (owner, owner),
        ).fetchone()
        excess = held + wanted - self.quota_bytes
        if excess <= 0:
            return
        free = db.execute(
            f"SELECT digest, bytes FROM contents WHERE owner = ? AND {_UNUSED} ORDER BY used", (owner,)
        ).fetchall()
        if sum(size for _, size in free) < excess:
            raise CapacityError(
                f"{what} takes {wanted} bytes, and {held - sum(size for _, size in free)} of its owner's "
                f"{self.quota_bytes} are kept values, states and what requests use now: delete some, or try again later"
            )
        for digest, size in free:
            if excess <= 0:
                break
            self._drop(db, owner, digest)
            excess -= size

    def _drop_unused(self, db: Transaction, owner: str, digest: str) -> None:
        """Drops a content that no name and no request has any more. One that was uploaded waits for its turn."""
        found = db.execute(
            f"SELECT 1 FROM contents WHERE owner = ? AND digest = ? AND is_uploaded = 0 AND {_UNUSED}", (owner, digest)
        ).fetchone()
        if found is not None:
            self._drop(db, owner, digest)

    def _drop(self, db: Transaction, owner: str, digest: str) -> None:
        db.execute("DELETE FROM contents WHERE owner = ? AND digest = ?", (owner, digest))
        self._dropped.put((owner, digest))

    def _drop_parts(self, db: Transaction, request: str) -> None:
        for part, owner in db.execute("DELETE FROM room WHERE id = ? RETURNING part, owner", (request,)).fetchall():
            self._dropped_parts.put((owner, part))


# of a row of requests: that no earlier one, of whatever deployment, has a state that it needs; readers share one
HAS_ITS_TURN = (
    "NOT EXISTS (SELECT 1 FROM uses AS own JOIN uses AS other ON other.owner = own.owner AND other.state = own.state "
    "AND other.seq < own.seq AND (own.is_update = 1 OR other.is_update = 1) "
    "WHERE own.id = requests.id AND own.state IS NOT NULL)"
)

# of a row of contents: that no name and no request has it
_UNUSED = (
    "NOT EXISTS (SELECT 1 FROM kept WHERE kept.owner = contents.owner AND kept.digest = contents.digest) "
    "AND NOT EXISTS (SELECT 1 FROM uses WHERE uses.owner = contents.owner AND uses.digest = contents.digest)"
)


def _object_of(owner: str, digest: str) -> str:
    return f"contents/{owner}/{digest}"


def _named(name: str) -> tuple[str, str]:
    owner, _, digest = name.partition("/")
    return owner, digest


def _all_of(queue: SimpleQueue[tuple[str, str]]) -> set[tuple[str, str]]:
    found: set[tuple[str, str]] = set()
    with contextlib.suppress(Empty):
        while True:
            found.add(queue.get_nowait())
    return found


def _mapped(path: Path) -> tuple[memoryview, RawTensor]:
    """A content's file, and the tensor in it; nothing is read yet."""
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            raise WireError("the content is empty")
        view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    return view, decode_content(view)


def _digest_of_file(path: Path) -> str:
    view, raw = _mapped(path)
    header = content_header(raw.dtype, raw.shape)
    if bytes(view[: len(header)]) != header or len(view) != len(header) + len(raw.data):
        raise WireError("the content is not written as contents are")
    return digest_of(raw.dtype, raw.shape, raw.data)


def _owner_of(db: Transaction, request: str) -> str:
    (owner,) = db.execute("SELECT owner FROM requests WHERE id = ?", (request,)).fetchone()
    return str(owner)


def _has(db: Transaction, owner: str, digest: str) -> bool:
    found = db.execute("SELECT 1 FROM contents WHERE owner = ? AND digest = ?", (owner, digest)).fetchone()
    return found is not None


def _missing(digests: Sequence[str]) -> MissingError:
    told = ", ".join(digest[:12] for digest in digests[:5])
    return MissingError(f"{len(digests)} contents that the request names are not on the service: {told}")


def _entry(row: Sequence[Any]) -> KeptEntry:
    return KeptEntry(
        name=row[0],
        is_state=bool(row[1]),
        dtype=row[2],
        shape=tuple(json.loads(row[3])),
        digest=row[4],
        version=row[5],
        request=row[6],
        expires=row[7],
    )


def sync(path: Path) -> None:
    """Returns when the file, or what a folder lists, is on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
