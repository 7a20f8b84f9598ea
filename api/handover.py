"""Requests go to the controller and come back: claimed, given back, tried again, and given up after MAX_ATTEMPTS.

Which of them go first is `api.claiming`; what tenants were served is kept here for that (`cluster.kept_shares`).
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping

from api.claiming import CANCELLED, Outlook, all_to_each, find_waiting, outlook_of
from api.store_parts import ABOUT, StoreParts
from cluster.requests import Claimed, Divide
from polytrace.errors import ServiceError
from scheduling.plan import RequestId

_ANY_WAITING = "SELECT 1 FROM requests WHERE model = ? AND state = 'queued' AND state IN ('queued', 'running') LIMIT 1"
_AT_ONCE = 500  # ids in one query
MAX_ATTEMPTS = 3  # controllers that may die while they run a request before the request is refused
_WORN_OUT = ServiceError(f"the service broke down {MAX_ATTEMPTS} times while it ran this request")


class Handover(StoreParts):
    """A part of the store, by `cluster.requests.ControllerStore`."""

    def claim(self, model: str, limit: int, divide: Divide = all_to_each) -> list[Claimed]:
        if limit <= 0:
            return []
        if not self._db.rows(_ANY_WAITING, (model,)):  # most rings are about something else: no writer waits for this
            return []
        with self._db.transaction(is_durable=False) as db:  # a claim that a crash forgets is a request that still waits
            found = find_waiting(db, model, limit, divide)
            for begin in range(0, len(found), _AT_ONCE):
                some = [one.id for one in found[begin : begin + _AT_ONCE]]
                db.execute(
                    "UPDATE requests SET state = 'running', started = ?, attempts = attempts + 1 "
                    f"WHERE id IN ({','.join('?' * len(some))})",
                    (self.now(), *some),
                )
            states = self.contents.uses.states_now(db, {one.id: one.owner for one in found})
        for one in found:
            self.received.bring(one.id)
            if self.objects is not None:
                self.contents.uses.bring(one.id)
        return [
            Claimed(
                request=one.id,
                path=self.request_path(one.id),
                accepted=one.created,
                work=one.work,
                facts=one.facts,
                contents=self.contents.folder_of(one.owner),
                states=states.get(one.id, {}),
                is_suspect=one.attempts > 0,
                tenant=one.tenant,
                is_interactive=bool(one.is_interactive),
            )
            for one in found
        ]

    def requeue(self, model: str, *, is_clean: bool) -> int:
        with self._db.transaction() as db:
            if is_clean:
                db.execute(
                    "UPDATE requests SET attempts = attempts - 1 WHERE model = ? AND state = 'running'", (model,)
                )
            worn_out = db.execute(
                "UPDATE requests SET state = 'failed', finished = ?, error = ? "
                f"WHERE model = ? AND state = 'running' AND attempts >= ? RETURNING id, {ABOUT}",
                (self.now(), json.dumps(_WORN_OUT.to_fields()), model, MAX_ATTEMPTS),
            ).fetchall()
            count = db.execute(
                "UPDATE requests SET state = 'queued', started = NULL WHERE model = ? AND state = 'running'", (model,)
            ).rowcount
            self.contents.uses.end_of_ended(db)
        self._tell_over(worn_out, _WORN_OUT)
        self.contents.collect()
        self.gateway_bell.ring()
        return count

    def unclaim(self, model: str, held: Collection[RequestId]) -> int:
        """What is claimed and not held by the controller waits again: it never heard of it. How many."""
        rows = self._db.rows("SELECT id FROM requests WHERE model = ? AND state = 'running'", (model,))
        lost = [RequestId(row[0]) for row in rows if row[0] not in held]
        if lost:
            self.give_back(lost, ())
        return len(lost)

    def give_back(self, requests: Iterable[RequestId], suspects: Iterable[RequestId]) -> None:
        doubted = set(suspects)
        with self._db.transaction() as db:
            worn_out = [
                row
                for request in doubted
                for row in db.execute(
                    "UPDATE requests SET state = 'failed', finished = ?, error = ? "
                    f"WHERE id = ? AND state = 'running' AND attempts >= ? RETURNING id, {ABOUT}",
                    (self.now(), json.dumps(_WORN_OUT.to_fields()), request, MAX_ATTEMPTS),
                ).fetchall()
            ]
            db.executemany(
                "UPDATE requests SET state = 'queued', started = NULL, passes_done = 0, passes = 0, logs = '[]', "
                "attempts = attempts - ? WHERE id = ? AND state = 'running'",
                [(int(request not in doubted), request) for request in requests],
            )
            self.contents.uses.end_of_ended(db)
        self._tell_over(worn_out, _WORN_OUT)
        self.contents.collect()
        self.controller_bell.ring()
        self.gateway_bell.ring()

    def cancellations(self, model: str) -> list[RequestId]:
        return [row[0] for row in self._db.rows(CANCELLED, (model,))]

    def queue_outlook(self, request: RequestId) -> Outlook | None:
        """Where a waiting request stands and when it may start; None when it does not wait."""
        rows = self._db.rows(
            "SELECT model, tenant, is_interactive, seq FROM requests WHERE id = ? AND state = 'queued'", (request,)
        )
        return outlook_of(self._db, rows[0], self.now()) if rows else None

    def weights(self) -> dict[str, float]:
        """Of the tenants whose share is not 1."""
        return {row[0]: row[1] for row in self._db.rows("SELECT name, weight FROM tenants WHERE weight <> 1.0")}

    def counters(self, model: str) -> dict[str, float]:
        """What `save_counters` has kept."""
        return {row[0]: row[1] for row in self._db.rows("SELECT tenant, counter FROM shares WHERE model = ?", (model,))}

    def save_counters(self, model: str, changed: Mapping[str, float], gone: Collection[str]) -> None:
        """Keeps counters of tenants (`scheduling.fair`); those that are gone have what a newcomer has."""
        with self._db.transaction(is_durable=False) as db:
            rows = [(model, tenant, counter) for tenant, counter in changed.items()]
            for begin in range(0, len(rows), _AT_ONCE):
                some = rows[begin : begin + _AT_ONCE]
                db.execute(
                    f"INSERT INTO shares (model, tenant, counter) VALUES {', '.join(['(?, ?, ?)'] * len(some))} "
                    "ON CONFLICT (model, tenant) DO UPDATE SET counter = excluded.counter",
                    [value for row in some for value in row],
                )
            db.executemany("DELETE FROM shares WHERE model = ? AND tenant = ?", [(model, tenant) for tenant in gone])
