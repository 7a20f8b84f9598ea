"""How far requests are and how they end: what a request hears, and what it costs its tenant in the end.

Owns outcomes and progress until somebody takes them. What a request has on the shards, and who may go next, are the
scheduler's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from polytrace.certificate import charge
from polytrace.errors import CapacityError, PolytraceError, ServiceError
from scheduling.checks import ModelTable
from scheduling.costs import token_layers
from scheduling.fair import FairShares
from scheduling.jobs import Job, Outcome, Progress
from scheduling.plan import RequestId
from scheduling.step_costs import step_costs


class Endings:
    """Those of one deployment's requests. Belongs to a scheduler."""

    def __init__(self, table: ModelTable, shares: FairShares, clock: Callable[[], float]) -> None:
        self._table = table
        self._shares = shares
        self._clock = clock
        self._outcomes: list[Outcome] = []
        self._progress: dict[RequestId, Job] = {}  # that got further

    def charge(self, job: Job, cost: float) -> None:
        """What was measured beyond what was charged before, or below it."""
        if cost:
            self._shares.correct(job.tenant, cost)
            job.charged += cost

    def note(self, job: Job) -> None:
        """It got further."""
        self._progress[job.program.request] = job

    def finish(self, job: Job) -> None:
        """With its result. What it had room for is still its own."""
        started = job.added if job.started is None else job.started
        receipt = job.account.receipt(
            self._table,
            is_keeping=job.is_keeping is not False,
            queue_seconds=started - job.added,
            run_seconds=self._clock() - started,
            generating=job.generating,
            spared=0 if job.ahead is None else job.ahead.spared,
        )
        self.charge(job, charge(receipt.token_layers, receipt.moved_bytes) - job.charged)
        self._put(
            Outcome(
                request=job.program.request,
                receipt=receipt,
                values=job.account.values,
                tokens=job.take_tokens(),
                saves=tuple(job.account.saves),
            )
        )

    def end(self, job: Job, error: PolytraceError, *, may_be_cut: bool = False) -> None:
        """Without a result."""
        if isinstance(error, (ServiceError, CapacityError)):
            self.charge(job, -job.charged)  # the fault is not its tenant's
        self._put(
            Outcome(
                request=job.program.request,
                error=error,
                may_be_cut=may_be_cut,
                spent_token_layers=self._spent(job),
                spent_seconds=0.0 if job.started is None else self._clock() - job.started,
            )
        )

    def refuse(self, request: RequestId, error: PolytraceError) -> None:
        """One that could not begin."""
        self._put(Outcome(request=request, error=error))

    def take_progress(self) -> list[Progress]:
        """How far the requests are that got further since the last call and have not ended."""
        jobs, self._progress = list(self._progress.values()), {}
        return [replace(job.progress, tokens=job.take_tokens(), saves=job.take_saves()) for job in jobs]

    def take_outcomes(self) -> list[Outcome]:
        """The requests that ended since the last call, in that order."""
        outcomes, self._outcomes = self._outcomes, []
        return outcomes

    def _put(self, outcome: Outcome) -> None:
        self._progress.pop(outcome.request, None)
        self._outcomes.append(outcome)

    def _spent(self, job: Job) -> int:
        """Rows x layers of a request that ended without a result: of the passes that it was in, with the last one."""
        if job.started is None:
            return 0
        program, rows = job.program, [] if job.generating is None else job.generating.rows_of_steps
        there = token_layers(program, self._table, is_keeping=job.is_keeping is not False)
        begun, waves = job.account.num_passes + 1, len(program.waves)
        return there * min(begun, waves) // max(1, waves) + step_costs(program, rows, self._table).token_layers
