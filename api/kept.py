"""Kept values and states: contents that have a name, for a time or until they are deleted.

A request leaves them, or a user makes a state; a state has one content after another, and counts them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from api.content_files import ContentFiles, digest_of_file, mapped
from api.database import Database, Transaction
from api.holdings import Holdings, has, missing
from cluster.requests import LeftBehind, Place
from polytrace.errors import ConflictError, WireError
from polytrace.keepers import KeptEntry, not_found
from polytrace.tensors import num_bytes
from polytrace.wire import content_header

_KEPT = "name, is_state, dtype, shape, digest, version, request, expires"
_COLUMNS = "owner, is_state, name, dtype, shape, digest, version, request, expires"


class Kept:
    """Its methods may be called from any thread."""

    def __init__(self, db: Database, files: ContentFiles, holdings: Holdings, now: Callable[[], float]) -> None:
        self._db = db
        self._files = files
        self._holdings = holdings
        self._now = now

    def entries(self, owner: str, *, is_state: bool, request: str | None = None) -> list[KeptEntry]:
        """All of an owner that have not expired, by name; or those that a request left."""
        rows = self._db.rows(
            f"SELECT {_KEPT} FROM kept WHERE owner = ? AND is_state = ? AND (expires IS NULL OR expires > ?) "
            "AND (? IS NULL OR request = ?) ORDER BY name",
            (owner, is_state, self._now(), request, request),
        )
        return [_entry(row) for row in rows]

    def entry(self, owner: str, name: str, *, is_state: bool) -> KeptEntry:
        """Raises NotFoundError when there is none, or it has expired."""
        rows = self._db.rows(
            f"SELECT {_KEPT} FROM kept WHERE owner = ? AND is_state = ? AND name = ? "
            "AND (expires IS NULL OR expires > ?)",
            (owner, is_state, name, self._now()),
        )
        if not rows:
            raise not_found(name, is_state)
        return _entry(rows[0])

    def delete(self, owner: str, name: str, *, is_state: bool) -> None:
        """Takes a name away, and its content when no request needs it. Raises NotFoundError."""
        with self._db.transaction() as db:
            row = db.execute(
                "DELETE FROM kept WHERE owner = ? AND is_state = ? AND name = ? "
                "AND (expires IS NULL OR expires > ?) RETURNING digest",
                (owner, is_state, name, self._now()),
            ).fetchone()
            if row is None:
                raise not_found(name, is_state)
            self._holdings.drop_unused(db, owner, row[0])
        self._holdings.collect()

    def begin_state(self, owner: str, name: str, dtype: str, shape: tuple[int, ...], digest: str) -> KeptEntry:
        """The state of a name, made with this content when there is none.

        Raises MissingError without the content, WireError when it is another one than it is said to be.
        """
        self._files.bring(owner, digest)
        with self._db.transaction() as db:
            if not has(db, owner, digest):
                raise missing([digest])
            content = mapped(self._files.path(owner, digest))[1]
            if (content.dtype, content.shape) != (dtype, shape):
                told = f"{content.dtype} {list(content.shape)}, and not {dtype} {list(shape)}"
                raise WireError(f"the first content of the state {name!r} is {told}")
            db.execute(
                f"INSERT INTO kept ({_COLUMNS}) VALUES (?, 1, ?, ?, ?, ?, 1, NULL, NULL) ON CONFLICT DO NOTHING",
                (owner, name, dtype, json.dumps(shape), digest),
            )
        return self.entry(owner, name, is_state=True)

    def purge(self) -> int:
        """Drops what has expired; how many names."""
        if not self._db.rows("SELECT 1 FROM kept WHERE expires <= ? LIMIT 1", (self._now(),)):
            return 0
        with self._db.transaction() as db:
            gone = db.execute("DELETE FROM kept WHERE expires <= ? RETURNING owner, digest", (self._now(),)).fetchall()
            for owner, digest in gone:
                self._holdings.drop_unused(db, owner, digest)
        self._holdings.collect()
        return len(gone)

    # --- for requests, inside the store's transactions; `Holdings.collect` follows behind them

    def place(self, db: Transaction, request: str, left: Sequence[LeftBehind]) -> list[Path]:
        """Room for what a claimed request is to leave, whatever it had before."""
        owner = _owner_of(db, request)
        self._holdings.drop_parts(db, request)
        sizes = [len(content_header(each.dtype, each.shape)) + num_bytes(each.dtype, each.shape) for each in left]
        self._holdings.make_room(db, owner, sum(sizes), "what the request keeps")
        paths = []
        for number, size in enumerate(sizes):
            part = f"{request}-{number}"
            db.execute("INSERT INTO room (part, id, owner, bytes) VALUES (?, ?, ?, ?)", (part, request, owner, size))
            paths.append(self._files.part(owner, part))
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
            self._holdings.adopt(db, owner, place.path, digest, is_uploaded=False)
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
                self._holdings.drop_unused(db, owner, before[0])

    def commit(self, place: Place) -> str:
        """Makes what shards wrote durable, and gives its hash. OSError when the disk does not take it."""
        digest = digest_of_file(place.path)
        self._files.keep(place.path.parent.name, place.path, digest)
        return digest


def _owner_of(db: Transaction, request: str) -> str:
    (owner,) = db.execute("SELECT owner FROM requests WHERE id = ?", (request,)).fetchone()
    return str(owner)


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
