"""Where requests and results are kept: one SQLite file or PostgreSQL, and a folder or objects.

The gateway and the controller share it. With SQLite and a folder alone:

    store.db                      states, checked facts, and the deployments (`api.catalogue`)
    requests/<id>.safetensors     as received; gone once the request has ended
    results/<id>.safetensors      filled by the shards (`api.results`); complete when the state says done; it, the
                                  events and the state go some time after the end (`api.expiry`). The database has a
                                  small one too, until the file is on the disk (`api.fresh`)
    contents/<owner>/<hash>       what was uploaded or kept (`api.contents`)
    gateway.counts, controller.counts    what each has counted (`api.tally`)
    events/<id>                   what a generation tells while it runs (`api.events`)
    controller.bell, gateway.bell, events.bell    who wakes whom
    draining                      while nothing new is accepted (`api.draining`)

With a place of objects (`api.objects`) requests, contents and events of what has ended are there too, by the same
names, and results are there alone. The folder then holds only what is at hand: on another machine it fills itself.

Owns durability and the states: queued -> running -> done | failed | cancelled. Knows nothing of graphs and plans. Its
parts are what is done with requests: `api.accepting`, `api.handover`, `api.ending`, `api.sweeping`.

Invariants
- A request is on disk (file, folder entry, row) before `add` returns, or, where its caller is told nothing before,
  when `received.secure` does; a result before its state says done.
- A state changes in one transaction whose WHERE names the state it leaves, so each request ends exactly once.
- Ids are 128 random bits. Who may see what is not decided here but where a call comes in (`api.waiting`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from api import figures, usage
from api.accepting import Accepting
from api.ending import Ending
from api.handover import Handover
from api.results import FileResults
from api.status import RequestState, RequestStatus, news, statuses
from api.sweeping import Sweeping
from api.telling import tell_pass
from api.usage import Usage
from cluster.config import Heat
from cluster.requests import PassFigures
from scheduling.plan import RequestId
from scheduling.scheduler import Progress


class Store(Accepting, Handover, Ending, Sweeping):
    """One per process; its methods may be called from any thread. Construction makes the folder when there is none."""

    def statuses(self, requests: Iterable[RequestId]) -> dict[RequestId, RequestStatus]:
        """Of those that exist."""
        return statuses(self._db, requests)

    def news(self, requests: Iterable[RequestId]) -> dict[RequestId, RequestStatus]:
        """Of those that have ended, with small results that ended just now, or have run some of their passes."""
        return news(self._db, requests)

    def status(self, request: RequestId) -> RequestStatus | None:
        return self.statuses([request]).get(request)

    def open_requests(self) -> dict[str, dict[RequestState, int]]:
        """How many requests wait and run, by model."""
        counts: dict[str, dict[RequestState, int]] = {}
        query = "SELECT model, state, count(*) FROM requests WHERE state IN ('queued', 'running') GROUP BY model, state"
        for model, state, count in self._db.rows(query):
            counts.setdefault(model, {})[RequestState(state)] = count
        return counts

    def num_open(self, model: str) -> int:
        return sum(self.open_requests().get(model, {}).values())

    def usage(self, month: str, *, tenant: str | None = None, user: str | None = None) -> list[Usage]:
        """What was used in a month."""
        return usage.usage_of(self._db, month, tenant, user)

    def result_path(self, request: RequestId) -> Path:
        """The result's file; complete when the state says done, and not to be read before. Of a store without a place
        of objects.
        """
        assert isinstance(self.results, FileResults)
        return self.results.path(request)

    def bring_events(self, request: RequestId) -> None:
        """The events of a request that has ended are at hand, if it has any, though another machine wrote them."""
        if self.objects is not None and not self.events.path(request).exists():
            self.objects.get_file(f"events/{request}", self.events.path(request))

    # --- what the controller tells

    def note_progress(self, progress: Sequence[Progress]) -> None:
        """How far running requests are; who waits for them hears of it."""
        self._progress.note(progress)

    def cool(self, model: str, heat: Heat, why: str, cause: str) -> bool:
        is_so = super().cool(model, heat, why, cause)
        if is_so:
            self.tally.count(figures.RESTS, model, cause)
        return is_so

    def note_pass(self, model: str, told: PassFigures) -> None:
        tell_pass(self.tally, model, told)
        if self.traces is not None:
            self.traces.tell_pass(model, told)

    def note_planning(self, request: RequestId, seconds: float) -> None:
        if self.traces is not None:
            self.traces.tell_planning(request, seconds)

    def wait_for_requests(self, timeout_s: float) -> None:
        self.controller_bell.wait(timeout_s)

    def interrupt(self) -> None:
        self.controller_bell.ring()
