"""The queue of a deployment: which waves are ready, which pass they are in, how each request ends.

Owns the life of a request between `add` and its one `Outcome`. Who goes into a pass is `scheduling.policy`'s, what the
pass looks like is `scheduling.packing`'s, what its results say is `scheduling.receipts`'.

Invariants
- A request is in one pass at a time; its waves go in order.
- Every request that was added ends in exactly one outcome.
- Requests that end between two waves are named in the next plan (`Plan.ended`), so that shards forget them.
"""

from __future__ import annotations

import time
from bisect import insort
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from polytrace.certificate import Receipt
from polytrace.description import ModelDescription
from polytrace.errors import CancelledError, PolytraceError, ServiceError
from scheduling.checks import table_of
from scheduling.packing import Going, Packer
from scheduling.plan import PassId, Plan, Program, RequestId, ShardResult
from scheduling.policy import FirstComeFirstServed, PassPolicy
from scheduling.receipts import Account, find_error

__all__ = ["Outcome", "PassPolicy", "Progress", "Scheduler"]


_MAX_LOSSES_ALONE = 2  # shards that a request may take down
_MAX_REFILLS = 3  # times that a pass is planned again because it has room left


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a request ended: with a receipt or with an error."""

    request: RequestId
    receipt: Receipt | None = None
    error: PolytraceError | None = None
    values: Mapping[str, Any] = field(default_factory=dict)  # saves, when the program has no result file


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a request of several passes is."""

    request: RequestId
    passes_done: int
    passes: int


class _Job:
    """A request on its way through its waves."""

    def __init__(self, program: Program, number: int, now: float) -> None:
        self.program = program
        self.number = number  # of arrival
        self.added = now
        self.is_cancelled = False
        self.is_keeping: bool | None = None  # its trunks; None: nobody has asked yet
        self.losses = 0  # passes that died with shards while it was in them
        self.losses_alone = 0  # of these, those that it had to itself
        self.restart()

    def restart(self) -> None:
        """From its first wave."""
        self.wave = 0
        self.started: float | None = None
        self.account = Account(self.program)

    @property
    def num_rows(self) -> int:
        wave = self.program.waves[self.wave]
        return (wave.rows_anew if self.is_keeping is False else wave.rows).widest

    @property
    def is_suspect(self) -> bool:
        """A pass died with it in: it goes alone, so that nobody suffers should it be the cause."""
        return self.losses > 0

    @property
    def going(self) -> Going:
        return Going(program=self.program, wave=self.wave, is_keeping=self.is_keeping is True)

    @property
    def num_waves(self) -> int:
        return len(self.program.waves)

    @property
    def is_last_wave(self) -> bool:
        return self.wave == self.num_waves - 1


class Scheduler:
    """One deployment's queue. Not thread-safe: its owner's loop calls it."""

    def __init__(
        self, description: ModelDescription, policy: PassPolicy, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._table = table_of(description)
        self._choice = FirstComeFirstServed(policy)
        self._packer = Packer(description)
        self._clock = clock
        self._jobs: dict[RequestId, _Job] = {}
        self._ready: list[_Job] = []  # by arrival: those whose next wave may go
        self._ended: list[RequestId] = []  # shards hold values of these; the next plan says to drop them
        self._outcomes: list[Outcome] = []
        self._progress: dict[RequestId, Progress] = {}
        self._kept_bytes = description.limits.kept_bytes  # that shards have left for trunks
        self._arrivals = 0
        self._passes = 0
        self._in_flight = 0
        self._has_suspect_in_flight = False

    def add(self, program: Program) -> None:
        """Takes a request. Its id must not be one that is still on its way."""
        assert program.request not in self._jobs, f"request {program.request} was added twice"
        self._arrivals += 1
        job = _Job(program, self._arrivals, self._clock())
        self._jobs[program.request] = job
        self._ready.append(job)

    def cancel(self, request: RequestId) -> None:
        """Ends a request: at once when it is in no pass, else after its pass. Unknown and ended ones are left alone."""
        job = self._jobs.get(request)
        if job is None:
            return
        job.is_cancelled = True
        if job in self._ready:
            self._ready.remove(job)
            self._end(job, CancelledError("the request was cancelled"), is_held=job.wave > 0)

    @property
    def suspects(self) -> list[RequestId]:
        """Requests on their way that were in a pass that died with its shards."""
        return [request for request, job in self._jobs.items() if job.is_suspect]

    def has_work(self) -> bool:
        """Whether a wave may go into a pass now. A suspect goes when no pass is in flight, and none beside it."""
        if not self._ready or self._has_suspect_in_flight:
            return False
        return not self._in_flight or not self._ready[0].is_suspect

    def next_pass(self) -> Plan:
        """The next pass. Call it only when there is work; its waves are then in flight until `complete` or `lost`."""
        assert self._ready, "a pass needs a wave that is ready"
        self._passes += 1
        ended, self._ended = tuple(self._ended), []
        chosen, plan = self._fill(PassId(self._passes), ended)
        going = {job.number for job in chosen}
        self._ready = [job for job in self._ready if job.number not in going]
        self._in_flight += 1
        self._has_suspect_in_flight = chosen[0].is_suspect
        now = self._clock()
        for job in chosen:
            job.started = now if job.started is None else job.started
        return plan

    def _fill(self, pass_id: PassId, ended: tuple[RequestId, ...]) -> tuple[list[_Job], Plan]:
        """Who goes, and their plan: more than the choice foresaw where requests have rows in common."""
        budget = self._choice.policy.budget_tokens
        foreseen = budget
        chosen = self._choice.choose(self._ready)
        plan = self._packer.pack(pass_id, self._going(chosen), ended)
        for _ in range(_MAX_REFILLS):
            rows = max(plan.layer_rows, default=0)
            if len(chosen) == len(self._ready) or not 0 < rows * 4 < budget * 3:
                break
            foreseen = foreseen * budget // rows
            more = self._choice.choose(self._ready, foreseen)
            fuller = self._packer.pack(pass_id, self._going(more), ended)
            if len(more) <= len(chosen) or max(fuller.layer_rows) > budget:
                break
            chosen, plan = more, fuller
        return chosen, plan

    def _going(self, jobs: list[_Job]) -> list[Going]:
        """The jobs with their trunks: those keep them that the store has room for when they first go."""
        for job in jobs:
            if job.is_keeping is None:
                job.is_keeping = job.program.kept_bytes <= self._kept_bytes
                self._kept_bytes -= job.program.kept_bytes if job.is_keeping else 0
        return [job.going for job in jobs]

    def complete(self, plan: Plan, results: tuple[ShardResult, ...]) -> None:
        """Takes in what all shards answered to a plan: members end or become ready for their next wave."""
        self._landed()
        for member in plan.members:
            job = self._jobs[member.program.request]
            error: PolytraceError | None = find_error(job.program, job.wave, results)
            if job.is_cancelled:
                error = CancelledError("the request was cancelled")
            if error is not None:
                self._end(job, error, is_held=not job.is_last_wave)
                continue
            job.account.enter(plan, results)
            if job.is_last_wave:
                self._finish(job)
            else:
                job.wave += 1
                request = job.program.request
                self._progress[request] = Progress(request=request, passes_done=job.wave, passes=job.num_waves)
                insort(self._ready, job, key=lambda ready: ready.number)

    def lost(self, plan: Plan, error: PolytraceError) -> None:
        """The pass died with its shards: its members end with `error`, requests between two waves start again."""
        self._landed()
        for member in plan.members:
            job = self._jobs[member.program.request]
            self._end(job, CancelledError("the request was cancelled") if job.is_cancelled else error, is_held=False)
        self._restart(plan)

    def again(self, plan: Plan, error: PolytraceError) -> None:
        """The pass died with shards that have come back with nothing but weights: its members run again, each alone.

        One that was alone in two such passes has killed two shards, as far as anybody can tell, and ends with the
        reason. A loss in company says little: shards die for other reasons too.
        """
        self._landed()
        for member in plan.members:
            job = self._jobs[member.program.request]
            job.losses += 1
            job.losses_alone += len(plan.members) == 1
            if job.is_cancelled:
                self._end(job, CancelledError("the request was cancelled"), is_held=False)
            elif job.losses_alone == _MAX_LOSSES_ALONE:
                told = f"shards died in two passes with this request alone: {error.message}"
                self._end(job, ServiceError(told), is_held=False)
            else:
                job.restart()
                insort(self._ready, job, key=lambda ready: ready.number)
        self._restart(plan)

    def _landed(self) -> None:
        self._in_flight -= 1
        self._has_suspect_in_flight = False

    def _restart(self, plan: Plan) -> None:
        """Requests between two waves, whose values are gone."""
        for job in self._ready:
            job.restart()
        # Where the shards are still the same, they hold values and rows of all of these.
        self._ended = [
            *(member.program.request for member in plan.members),
            *(job.program.request for job in self._ready),
        ]

    def take_progress(self) -> list[Progress]:
        """How far the requests are that got further since the last call and have not ended."""
        progress, self._progress = self._progress, {}
        return [told for request, told in progress.items() if request in self._jobs]

    def take_outcomes(self) -> list[Outcome]:
        """The requests that ended since the last call, in that order."""
        outcomes, self._outcomes = self._outcomes, []
        return outcomes

    def _finish(self, job: _Job) -> None:
        started = job.added if job.started is None else job.started
        receipt = job.account.receipt(
            self._table,
            is_keeping=job.is_keeping is not False,
            queue_seconds=started - job.added,
            run_seconds=self._clock() - started,
        )
        self._remove(job)
        self._outcomes.append(Outcome(request=job.program.request, receipt=receipt, values=job.account.values))

    def _end(self, job: _Job, error: PolytraceError, *, is_held: bool) -> None:
        """Without a result; `is_held` when shards may keep values for a wave that will not come."""
        if is_held:
            self._ended.append(job.program.request)
        self._remove(job)
        self._outcomes.append(Outcome(request=job.program.request, error=error))

    def _remove(self, job: _Job) -> None:
        del self._jobs[job.program.request]
        self._kept_bytes += job.program.kept_bytes if job.is_keeping else 0
