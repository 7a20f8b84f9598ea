"""What operators did, and users with their keys: who, what, when, on what. Only written, never changed.

An act that changes the store's own tables is written in the same transaction (`write`), any other one when it was
taken (`Audit.record`).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from api.database import Database, Transaction
from api.identity import Identity


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One act."""

    seq: int
    at: float  # seconds since the epoch
    actor: str  # tenant/user
    act: str  # such as "keys.revoke"
    subject: str  # what it was done to
    details: Mapping[str, Any]  # `key`: the prefix of the one that the actor brought


class Audit:
    """The store's record of acts. Any thread."""

    def __init__(self, db: Database, now: Callable[[], float] = time.time) -> None:
        self._db = db
        self._now = now

    def record(self, actor: Identity, act: str, subject: str, **details: Any) -> None:
        """Writes an act down; it is on the disk when this returns."""
        with self._db.transaction() as db:
            write(db, self._now(), actor, act, subject, details)

    def entries(self, *, limit: int = 100, before: int | None = None) -> list[Entry]:
        """The newest acts, newest first; `before`: those in front of this one."""
        rows = self._db.rows(
            "SELECT seq, at, actor, act, subject, details FROM audit WHERE seq < ? ORDER BY seq DESC LIMIT ?",
            ((1 << 62) if before is None else before, limit),
        )
        return [
            Entry(seq=row[0], at=row[1], actor=row[2], act=row[3], subject=row[4], details=json.loads(row[5]))
            for row in rows
        ]


def write(db: Transaction, at: float, actor: Identity, act: str, subject: str, details: Mapping[str, Any]) -> None:
    """Writes an act down in the transaction that does it."""
    told = dict(details) if actor.key is None else {**details, "key": actor.key}
    db.execute(
        "INSERT INTO audit (at, actor, act, subject, details) VALUES (?, ?, ?, ?, ?)",
        (at, str(actor), act, subject[:200], json.dumps(told)),
    )
