"""What each owner holds: its contents and what is on its way, as rows with files, within its quota.

When the quota is used up, what was used least recently goes, but never what a request that has not ended uses, nor what
has a name.

Invariants
- A content's row is there only when its file is, whole and durable, and its name is its hash.
- Files come and go inside transactions, which all processes take in turn; one goes only when it is on the disk that its
  row has gone, so whatever breaks, what has a name has its file.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from api.away import AwayError
from api.content_files import ContentFiles
from api.database import Database, Transaction
from polytrace.errors import CapacityError, MissingError, TooLargeError

# of a row of contents: that no name and no request has it
_UNUSED = (
    "NOT EXISTS (SELECT 1 FROM kept WHERE kept.owner = contents.owner AND kept.digest = contents.digest) "
    "AND NOT EXISTS (SELECT 1 FROM uses WHERE uses.owner = contents.owner AND uses.digest = contents.digest)"
)


class Holdings:
    """Its methods may be called from any thread. `collect` follows behind each transaction that drops anything."""

    def __init__(self, db: Database, files: ContentFiles, quota_bytes: int, now: Callable[[], float]) -> None:
        self._db = db
        self._files = files
        self._now = now
        self.quota_bytes = quota_bytes  # of each owner
        self._dropped: SimpleQueue[tuple[str, str]] = SimpleQueue()  # owner and hash, whose files are to go
        self._later: list[tuple[str, str]] = []  # the same, of objects
        self._dropped_parts: SimpleQueue[tuple[str, str]] = SimpleQueue()  # owner and part, the same

    def collect(self) -> None:
        """Removes the files of what was dropped, behind the transaction that did it."""
        gone, parts = _all_of(self._dropped) | set(self._later), _all_of(self._dropped_parts)
        self._later.clear()
        if not gone and not parts:
            return
        try:
            with self._db.transaction(is_durable=False) as db:  # nobody puts one there again meanwhile
                for owner, digest in gone:
                    if not has(db, owner, digest):
                        self._files.path(owner, digest).unlink(missing_ok=True)
                        self._drop_object(db, owner, digest)
                for owner, part in parts:
                    if db.execute("SELECT 1 FROM room WHERE part = ?", (part,)).fetchone() is None:
                        self._files.part(owner, part).unlink(missing_ok=True)
        except AwayError:  # what called for it is done; the files go another time
            for each in gone:
                self._dropped.put(each)
            for each in parts:
                self._dropped_parts.put(each)

    def adopt(self, db: Transaction, owner: str, path: Path, digest: str, *, is_uploaded: bool) -> None:
        """A durable file becomes a content too; one that is there already stays.

        The file stays where it was until its part is dropped: the transaction may fail, and be tried again.
        """
        num_file_bytes = path.stat().st_size
        if not has(db, owner, digest) or not self._files.path(owner, digest).exists():
            self._files.link(owner, path, digest)
        db.execute(
            "INSERT INTO contents (owner, digest, bytes, used, is_uploaded) VALUES (?, ?, ?, ?, ?) "
            "ON CONFLICT (owner, digest) DO UPDATE SET used = excluded.used, "
            "is_uploaded = CASE WHEN excluded.is_uploaded = 1 THEN 1 ELSE contents.is_uploaded END",
            (owner, digest, num_file_bytes, self._now(), is_uploaded),
        )

    def make_room(self, db: Transaction, owner: str, wanted: int, what: str) -> None:
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

    def drop_unused(self, db: Transaction, owner: str, digest: str) -> None:
        """Drops a content that no name and no request has any more. One that was uploaded waits for its turn."""
        found = db.execute(
            f"SELECT 1 FROM contents WHERE owner = ? AND digest = ? AND is_uploaded = 0 AND {_UNUSED}", (owner, digest)
        ).fetchone()
        if found is not None:
            self._drop(db, owner, digest)

    def drop_parts(self, db: Transaction, request: str) -> None:
        """What is on its way for a request, or an upload."""
        for part, owner in db.execute("DELETE FROM room WHERE id = ? RETURNING part, owner", (request,)).fetchall():
            self._dropped_parts.put((owner, part))

    def drop_all(self, db: Transaction, owned: str, values: Sequence[Any]) -> list[int]:
        """Drops everything of the owners that a condition names, names or not; the bytes of each content."""
        for owner, part in db.execute(f"DELETE FROM room WHERE {owned} RETURNING owner, part", values).fetchall():
            self._dropped_parts.put((owner, part))
        gone = db.execute(f"DELETE FROM contents WHERE {owned} RETURNING owner, digest, bytes", values).fetchall()
        for owner, digest, _ in gone:
            self._dropped.put((owner, digest))
        return [row[2] for row in gone]

    def _drop(self, db: Transaction, owner: str, digest: str) -> None:
        db.execute("DELETE FROM contents WHERE owner = ? AND digest = ?", (owner, digest))
        self._dropped.put((owner, digest))

    def _drop_object(self, db: Transaction, owner: str, digest: str) -> None:
        """Of a content that is dropped, unless its owner may be putting it there again: then another time."""
        if not self._files.have_objects:
            return
        if db.execute("SELECT 1 FROM room WHERE owner = ?", (owner,)).fetchone() is None:
            self._files.drop_object(owner, digest)
        else:
            self._later.append((owner, digest))


def has(db: Transaction, owner: str, digest: str) -> bool:
    """Whether an owner has a content."""
    found = db.execute("SELECT 1 FROM contents WHERE owner = ? AND digest = ?", (owner, digest)).fetchone()
    return found is not None


def missing(digests: Sequence[str]) -> MissingError:
    """The error of who names contents that its owner does not have."""
    told = ", ".join(digest[:12] for digest in digests[:5])
    return MissingError(f"{len(digests)} contents that the request names are not on the service: {told}")


def _all_of(queue: SimpleQueue[tuple[str, str]]) -> set[tuple[str, str]]:
    found: set[tuple[str, str]] = set()
    with contextlib.suppress(Empty):
        while True:
            found.add(queue.get_nowait())
    return found
