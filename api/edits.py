"""Edits that users keep by name: in the store, in versions, each its owner's alone or shared with its tenant.

An edit's bytes are those of `polytrace.edits.sets.encode_edits`; they were checked before they come here. Who is not an
edit's owner, and whom it is not shared with, does not learn that it exists. The number of a version that was deleted is
never given again: receipts name edits by name and version.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from api.database import Database
from api.identity import tenant_of
from polytrace.edits.sets import KnownEdit, unknown_edit
from polytrace.errors import ConflictError, TooLargeError

MAX_BYTES = 16 << 20  # of one version
MAX_VERSIONS = 1000  # of one owner, all names together
MAX_OWNED_BYTES = 256 << 20  # of one owner
_IS_SHARED = "(is_shared = 1 AND substr(owner, 1, length(?3)) = ?3)"  # ?3: the tenant whose users share it


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one owner may keep."""

    versions: int = MAX_VERSIONS
    num_bytes: int = MAX_OWNED_BYTES


class KeptEdits:
    """The store's edits. Any thread."""

    def __init__(self, db: Database, limits: Limits | None = None) -> None:
        self._db = db
        self._limits = limits or Limits()

    def put(self, model: str, owner: str, name: str, body: bytes, *, is_shared: bool) -> int:
        """Keeps another version and returns its number, 1 for the first.

        Raises TooLargeError beyond the owner's limits, ConflictError when others share an edit of this name already.
        """
        with self._db.transaction() as db:
            versions, size = db.execute(
                "SELECT count(*), coalesce(sum(num_bytes), 0) FROM edits WHERE owner = ? AND body IS NOT NULL", (owner,)
            ).fetchone()
            if versions >= self._limits.versions:
                raise TooLargeError(f"{versions} versions of edits are kept, the most for one owner: delete some")
            if size + len(body) > self._limits.num_bytes:
                told = f"all edits together would take {size + len(body)} bytes; one owner has {self._limits.num_bytes}"
                raise TooLargeError(f"{told}: delete some")
            taken = db.execute(
                f"SELECT 1 FROM edits WHERE model = ?1 AND owner != ?2 AND name = ?4 AND {_IS_SHARED} "
                "AND body IS NOT NULL",
                (model, owner, tenant_of(owner), name),
            ).fetchone()
            if is_shared and taken:
                raise ConflictError(f"somebody shares an edit {name!r} of {model} already: choose another name")
            (newest,) = db.execute(
                "SELECT coalesce(max(version), 0) FROM edits WHERE model = ? AND owner = ? AND name = ?",
                (model, owner, name),
            ).fetchone()
            db.execute(
                "INSERT INTO edits VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (model, owner, name, newest + 1, is_shared, time.time(), len(body), body),
            )
        return int(newest) + 1

    def get(self, model: str, owner: str, name: str, version: int | None) -> tuple[int, bytes]:
        """A version, by default the newest, and its number: one's own before a shared one. Raises NotFoundError."""
        rows = self._db.rows(
            "SELECT version, body FROM edits WHERE model = ?1 AND name = ?4 AND body IS NOT NULL "
            f"AND (owner = ?2 OR {_IS_SHARED}) AND (?5 IS NULL OR version = ?5) "
            "ORDER BY owner = ?2 DESC, version DESC LIMIT 1",
            (model, owner, tenant_of(owner), name, version),
        )
        if not rows:
            raise unknown_edit(name, version, {known.name for known in self.known(model, owner)})
        return rows[0][0], rows[0][1]

    def known(self, model: str, owner: str) -> list[KnownEdit]:
        """What an owner may use, by name and version."""
        rows = self._db.rows(
            "SELECT name, version, is_shared, owner = ?2, num_bytes, created FROM edits "
            f"WHERE model = ?1 AND body IS NOT NULL AND (owner = ?2 OR {_IS_SHARED}) ORDER BY name, version",
            (model, owner, tenant_of(owner)),
        )
        return [
            KnownEdit(
                name=row[0],
                version=row[1],
                is_shared=bool(row[2]),
                is_own=bool(row[3]),
                num_bytes=row[4],
                created=row[5],
            )
            for row in rows
        ]

    def delete(self, model: str, owner: str, name: str, version: int | None) -> None:
        """Drops one's own version, by default all of the name. Raises NotFoundError."""
        with self._db.transaction() as db:
            count = db.execute(
                "UPDATE edits SET body = NULL, num_bytes = 0 WHERE model = ?1 AND owner = ?2 AND name = ?3 "
                "AND body IS NOT NULL AND (?4 IS NULL OR version = ?4)",
                (model, owner, name, version),
            ).rowcount
        if not count:
            raise unknown_edit(name, version, {known.name for known in self.known(model, owner) if known.is_own})
