"""Which requests use which contents and states: from when one is accepted until it has ended.

A request takes its turn at a state: one that updates it waits for all before it, and all behind wait for that one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

from api.content_files import ContentFiles
from api.database import Database, Transaction
from api.holdings import Holdings, has, missing
from api.needs import Needs
from polytrace.errors import GraphError, TooLargeError
from polytrace.keepers import not_found

_AT_ONCE = 500  # ids in one query

# of a row of requests: that no earlier one, of whatever deployment, has a state that it needs; readers share one
HAS_ITS_TURN = (
    "NOT EXISTS (SELECT 1 FROM uses AS own JOIN uses AS other ON other.owner = own.owner AND other.state = own.state "
    "AND other.seq < own.seq AND (own.is_update = 1 OR other.is_update = 1) "
    "WHERE own.id = requests.id AND own.state IS NOT NULL)"
)


class ContentUses:
    """Inside the store's transactions; `Holdings.collect` follows behind them."""

    def __init__(self, db: Database, files: ContentFiles, holdings: Holdings, now: Callable[[], float]) -> None:
        self._db = db
        self._files = files
        self._holdings = holdings
        self._now = now

    def begin(self, db: Transaction, request: str, seq: int, owner: str, needs: Needs) -> None:
        """A request that is accepted has its contents until it has ended, and its turn at its states.

        Raises MissingError, NotFoundError, ConflictError or TooLargeError when it cannot have them.
        """
        if needs.kept_bytes > self._holdings.quota_bytes:
            raise TooLargeError(
                f"the request keeps {needs.kept_bytes} bytes; an owner has {self._holdings.quota_bytes} in all"
            )
        if lacking := [digest for digest in needs.digests if not has(db, owner, digest)]:
            raise missing(lacking)
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

    def bring(self, request: str) -> None:
        """All contents that a claimed request has are at hand, if they are anywhere."""
        for owner, digest in self._db.rows(
            "SELECT owner, digest FROM uses WHERE id = ? AND digest IS NOT NULL", (request,)
        ):
            self._files.bring(owner, digest)

    def end(self, db: Transaction, request: str) -> bool:
        """A request has ended. Whether another one may have waited for its states."""
        gone = db.execute("DELETE FROM uses WHERE id = ? RETURNING owner, state, digest", (request,)).fetchall()
        for owner, _, digest in gone:
            if digest is not None:
                self._holdings.drop_unused(db, owner, digest)
        self._holdings.drop_parts(db, request)
        return any(state is not None for _, state, _ in gone)

    def end_of_ended(self, db: Transaction) -> None:
        """The same for every request that has ended in some other way."""
        ended = db.execute(
            "SELECT id FROM requests WHERE state NOT IN ('queued', 'running') "
            "AND id IN (SELECT id FROM uses UNION SELECT id FROM room)"
        ).fetchall()
        for (request,) in ended:
            self.end(db, request)
