"""Contents in the store: constants that were uploaded, kept values and states.

Owns uploads, and what makes rows and files agree after a crash. The files are `api.content_files`; what an owner may
hold, and what goes when that is used up, `api.holdings`; names, `api.kept`; which requests need what,
`api.content_uses`. Knows nothing of graphs.

Only its owner can use a content: others have it only if they have uploaded the same bytes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path

from api.away import AwayError
from api.content_files import ContentFiles, digest_of_file
from api.content_uses import ContentUses
from api.database import Database
from api.holdings import Holdings, has
from api.kept import Kept
from api.objects import Objects
from polytrace.errors import NotFoundError, WireError


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
        self._files = ContentFiles(folder, objects)
        self.holdings = Holdings(db, self._files, quota_bytes, now)
        self.kept = Kept(db, self._files, self.holdings, now)
        self.uses = ContentUses(db, self._files, self.holdings, now)
        self._given_up: list[str] = []  # parts, whose rows are to go

    def folder_of(self, owner: str) -> Path:
        """Where an owner's contents are."""
        return self._files.folder_of(owner)

    def collect(self) -> None:
        """Removes the files of what was dropped, behind the transaction that did it."""
        self.holdings.collect()

    def missing(self, owner: str, digests: Iterable[str]) -> list[str]:
        """Those that the owner does not have. The others count as used now."""
        asked, now = list(dict.fromkeys(digests)), self._now()
        with self._db.transaction(is_durable=False) as db:
            touched = [(now, owner, digest) for digest in asked]
            db.executemany("UPDATE contents SET used = ? WHERE owner = ? AND digest = ?", touched)
            missing = [digest for digest in asked if not has(db, owner, digest)]
        for digest in set(asked) - set(missing):
            self._files.bring(owner, digest)
        return missing

    def content_path(self, owner: str, digest: str) -> Path:
        """The file of a content. Raises NotFoundError when the owner does not have it."""
        if self.missing(owner, [digest]):
            raise NotFoundError(f"there is no content {digest} here: it has expired, was purged or deleted")
        return self._files.path(owner, digest)

    def begin_upload(self, owner: str, part: str, file_bytes: int) -> Path:
        """Makes room for a file that is to arrive, and says where. `finish_upload` or `give_up` follow."""
        with self._db.transaction(is_durable=False) as db:
            self.holdings.make_room(db, owner, file_bytes, "the upload")
            db.execute("INSERT INTO room (part, id, owner, bytes) VALUES (?, ?, ?, ?)", (part, part, owner, file_bytes))
        self.collect()
        return self._files.part(owner, part)

    def finish_upload(self, owner: str, part: str, digest: str) -> None:
        """Takes the file in. Raises WireError when it is not what its hash says."""
        path = self._files.part(owner, part)
        if (found := digest_of_file(path)) != digest:
            raise WireError(f"the content's hash is {found}, not {digest}")
        self._files.keep(owner, path, digest)
        with self._db.transaction() as db:
            self.holdings.adopt(db, owner, path, digest, is_uploaded=True)
            self.holdings.drop_parts(db, part)
        self.collect()

    def give_up(self, part: str) -> None:
        """Drops what is on its way for an upload or a request; nothing when there is nothing."""
        try:
            with self._db.transaction(is_durable=False) as db:
                self.holdings.drop_parts(db, part)
        except AwayError:
            self._given_up.append(part)  # another time: its room must not be lost to its owner
            return
        self.collect()

    def give_up_uploads(self) -> None:
        """Drops what uploads had begun: the gateway that they came to is gone."""
        with self._db.transaction(is_durable=False) as db:
            for (part,) in db.execute("SELECT part FROM room WHERE part LIKE 'upload-%'").fetchall():
                self.holdings.drop_parts(db, part)
        self.collect()

    def sweep(self) -> None:
        """Makes rows and files agree after a crash. Only at the start, while nobody else has the store open."""
        with self._db.transaction() as db:
            db.execute("DELETE FROM room")
            self.uses.end_of_ended(db)
            rows = {(row[0], row[1]) for row in db.execute("SELECT owner, digest FROM contents")}
            lost = self._files.keep_only(rows)
            db.executemany("DELETE FROM contents WHERE owner = ? AND digest = ?", lost)
            for owner, digest in lost:
                db.execute("DELETE FROM kept WHERE owner = ? AND digest = ?", (owner, digest))
        self.purge()

    def purge(self) -> int:
        """Drops what has expired; how many names. And what could not be given up before."""
        given_up, self._given_up = self._given_up, []
        for part in given_up:
            self.give_up(part)
        return self.kept.purge()
