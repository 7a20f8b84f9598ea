"""The queue of a deployment: which waves are ready, which pass they are in, how each request ends.

Owns the life of a request between `add` and its one `Outcome`. Who goes into a pass is `scheduling.policy`'s, what the
pass looks like is `scheduling.packing`'s, what its results say is `scheduling.receipts`'.

A pass that does not fit into a shard's memory is abandoned, and its members run again in two halves that never merge
with others again; so whoever is too large for a pass to itself is found out, and nobody else suffers. Passes have at
most half as many rows from then on (but no fewer than the policy's least).

Invariants
- A request's waves go in order, each when the one before has ended. With several stages a wave may follow while the
  one before is on its way through them, if it needs nothing that a later stage has; it stands behind all others then.
- Every request that was added ends in exactly one outcome.
- Requests that end between two waves are named in the next plan (`Plan.ended`), so that shards forget them.
"""

from __future__ import annotations

import time
from bisect import insort
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

from polytrace.certificate import Receipt, Token
from polytrace.description import ModelDescription, PassLayout
from polytrace.errors import CancelledError, PolytraceError, ServiceError, TooLargeError
from scheduling.checks import table_of
from scheduling.generating import Generating
from scheduling.packing import Going, Packer
from scheduling.plan import (
    Member,
    PassAbandonedError,
    PassId,
    PassTooLargeError,
    Plan,
    Program,
    RequestId,
    SaveSlot,
    ShardResult,
)
from scheduling.policy import (
    Choice,
    FirstComeFirstServed,
    InTurns,
    PassPolicy,
    passes_in_flight,
    share_of,
    share_of_steps,
)
from scheduling.receipts import Account, Logged, find_error, find_out_of_memory
from scheduling.stopping import Decode

__all__ = ["Outcome", "PassPolicy", "Progress", "Scheduler"]


_MAX_LOSSES_ALONE = 3  # shards that may die while a request is alone on them: two may be bad luck
_MAX_REFILLS = 3  # times that a pass is planned again because it has room left


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a request ended: with a receipt or with an error."""

    request: RequestId
    receipt: Receipt | None = None
    error: PolytraceError | None = None
    may_be_cut: bool = (
        False  # too large, but for passes of fewer rows (`Scheduler.budget_tokens`) it takes more of them
    )
    values: Mapping[str, Any] = field(default_factory=dict)  # saves, when the program has no result file
    tokens: tuple[Token, ...] = ()  # of the last steps, which no `Progress` has told
    saves: tuple[SaveSlot, ...] = ()  # of a generation: all that came, as of `Progress`


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a request of several passes is."""

    request: RequestId
    passes_done: int
    passes: int
    tokens: tuple[Token, ...] = ()  # that are new since it was told before
    saves: tuple[SaveSlot, ...] = ()  # of a generation: those that came since then, where they are in the result
    logs: tuple[Logged, ...] = ()  # of these passes
    result_start: int = 0  # as of `Program`: where their slots are counted from
    values: Mapping[str, Any] = field(default_factory=dict)  # of logs, when the program has no result file


class _Job:
    """A request on its way through its waves."""

    def __init__(self, program: Program, number: int, now: float, decode: Decode | None) -> None:
        self.program = program
        self.decode = decode
        self.number = number  # of arrival
        self.added = now
        self.is_cancelled = False
        self.is_keeping: bool | None = None  # its trunks; None: nobody has asked yet
        self.losses = 0  # passes that died with shards while it was in them, since it got further than there
        self.lost_at = 0  # the step of its generation that it was at then
        self.losses_alone = 0  # of these, those that it had to itself
        self.party: object | None = None  # with whom it goes, and with nobody else; None: with anyone
        self.reserved: int | None = None  # bytes of its caches; None: nothing yet
        self.num_told = 0  # steps whose tokens have been told
        self.restart()

    def restart(self) -> None:
        """From its first wave; what is in flight of it counts no more."""
        self.wave = 0  # that goes next
        self.in_flight: list[PassId] = []
        self.started: float | None = None
        self.account = Account(self.program)
        self.num_saves_told = 0
        self.generating = None if self.program.chain is None else Generating(self.program, self.decode)

    @property
    def now(self) -> Program:
        """What runs: the program, or the step that its generation is at."""
        return self.program if self.generating is None else self.generating.program

    @property
    def is_step(self) -> bool:
        """Whether it is behind its prompts, with one row a sequence."""
        return self.generating is not None and self.generating.run is not None

    @property
    def is_suspect(self) -> bool:
        """A pass died with it in: it goes alone, so that nobody suffers should it be the cause."""
        return self.losses > 0

    @property
    def num_rows(self) -> int:
        if self.is_step and self.generating is not None:
            return self.generating.num_rows
        wave = self.program.waves[self.wave]
        return (wave.rows_anew if self.is_keeping is False else wave.rows).widest

    @property
    def going(self) -> Going:
        return Going(
            program=self.now,
            wave=self.wave,
            is_keeping=self.is_keeping is True and not self.is_step,
            generating=self.generating,
        )

    @property
    def num_waves(self) -> int:
        return len(self.now.waves)

    @property
    def num_done(self) -> int:
        """Waves that have ended."""
        return self.wave - len(self.in_flight)

    @property
    def progress(self) -> Progress:
        logs, values = self.account.logs, self.account.values
        steps = 0 if self.program.chain is None else len(self.program.chain.steps)
        return Progress(
            request=self.program.request,
            passes_done=self.account.num_passes,
            passes=len(self.program.waves) + steps,
            logs=tuple(logs),
            result_start=self.program.result_start,
            values={log.slot.name: values[log.slot.name] for log in logs if log.slot.name in values},
        )

    @property
    def is_held(self) -> bool:
        """Whether shards keep values for a wave that has not gone yet."""
        if self.generating is not None:
            return self.started is not None  # caches too
        return 0 < self.wave < self.num_waves

    @property
    def turn(self) -> tuple[bool, bool, bool, int]:
        """Its place in the queue: suspects first, or they would wait for ever behind those that share passes; then
        steps; those whose last wave is under way only fill what others leave.
        """
        return bool(self.in_flight), not self.is_suspect, not self.is_step, self.number

    def clear(self) -> None:
        """Ends the suspicion once its generation is behind the step at which a pass died."""
        if self.is_suspect and self.generating is not None and self.generating.step > self.lost_at:
            self.losses, self.party = 0, None

    def take_tokens(self) -> tuple[Token, ...]:
        """What was drawn and has not been told, also when it was drawn before."""
        if self.generating is None:
            return ()
        told, self.generating.told = self.generating.told, []
        fresh = tuple([token for token in told if token.step >= self.num_told])
        self.num_told = max([self.num_told, *[token.step + 1 for token in fresh]])
        return fresh

    def take_saves(self) -> tuple[SaveSlot, ...]:
        """What was saved and has not been told since it was begun."""
        fresh = self.account.saves[self.num_saves_told :]
        self.num_saves_told += len(fresh)
        return tuple(fresh)

    def may_follow(self) -> bool:
        """Whether the next wave may go while another is in flight: no stage would wait for one behind it."""
        works = self.now.waves[self.wave].stages
        return all(held.source < held.target for work in works for held in work.held)


class Scheduler:
    """One deployment's queue. Not thread-safe: its owner's loop calls it."""

    def __init__(
        self,
        description: ModelDescription,
        policy: PassPolicy,
        *,
        clock: Callable[[], float] = time.monotonic,
        decode: Decode | None = None,
    ) -> None:
        """`decode` gives the text of tokens; without it no text ends a generation."""
        self._table = table_of(description)
        self._policy = policy
        is_packed = description.layout is PassLayout.PACKED
        choice = FirstComeFirstServed if is_packed else InTurns
        self._choice: Choice = choice(policy.max_members)
        self._depth = passes_in_flight(description.stages)
        self._packer = Packer(description)
        self._clock = clock
        self._decode = decode
        self._jobs: dict[RequestId, _Job] = {}
        self._ready: list[_Job] = []  # by turn: those whose next wave may go
        self._flying: dict[PassId, list[_Job]] = {}
        self._ended: list[RequestId] = []  # shards hold values of these; the next plan says to drop them
        self._outcomes: list[Outcome] = []
        self._progress: dict[RequestId, _Job] = {}  # that got further
        self._most_kept_bytes = self._kept_bytes = description.limits.kept_bytes  # that shards have left for trunks
        stages = table_of(description).levels.stages
        self._position_bytes = description.key_value_bytes * max(map(stages.count, set(stages)), default=0)
        self._has_caches_left = False  # of generations that have ended
        self._waited = 0  # passes that somebody has stood behind steps
        self._arrivals = 0
        self._passes = 0
        self._has_suspect_in_flight = False

    @property
    def budget_tokens(self) -> int:
        """Rows that a pass may have: the policy's, or fewer since one did not fit into memory."""
        return self._policy.budget_tokens

    def add(self, program: Program) -> None:
        """Takes a request. Its id must not be one that is still on its way."""
        assert program.request not in self._jobs, f"request {program.request} was added twice"
        self._arrivals += 1
        job = _Job(program, self._arrivals, self._clock(), self._decode)
        self._jobs[program.request] = job
        if job.generating is not None and self._cache_bytes(job.generating) > self._most_kept_bytes:
            self._end(job, _no_room(self._cache_bytes(job.generating), self._most_kept_bytes))
            return
        insort(self._ready, job, key=lambda ready: ready.turn)

    def cancel(self, request: RequestId) -> None:
        """Ends a request: at once when it is in no pass, else after its pass. Unknown and ended ones are left alone."""
        job = self._jobs.get(request)
        if job is None:
            return
        job.is_cancelled = True
        if job in self._ready:
            self._ready.remove(job)
        if not job.in_flight:
            self._end(job, CancelledError("the request was cancelled"))

    @property
    def suspects(self) -> list[RequestId]:
        """Requests on their way that were in a pass that died with its shards."""
        return [request for request, job in self._jobs.items() if job.is_suspect]

    def has_work(self) -> bool:
        """Whether a wave may go into a pass now. A suspect goes when no pass is in flight, and none beside it."""
        if self._is_idle and self._has_caches_left:
            return True
        if self._has_suspect_in_flight:
            return False
        waiting = self._with_room()
        return bool(waiting) and (not self._flying or not waiting[0].is_suspect)

    def next_pass(self) -> Plan:
        """The next pass, in flight until `complete`, `lost` or `again`. Call it only when there is work.

        It is one of nobody, when nobody waits and shards are to forget what has ended.
        """
        self._passes += 1
        pass_id = PassId(self._passes)
        ended, self._ended = tuple(self._ended), []
        self._has_caches_left = False
        chosen, plan = self._fill(pass_id, ended)
        self._choice.went(chosen)
        self._flying[pass_id] = chosen
        self._has_suspect_in_flight = any(job.is_suspect for job in chosen)
        now = self._clock()
        for job in chosen:
            self._ready.remove(job)
            job.started = now if job.started is None else job.started
            job.wave += 1
            job.in_flight.append(pass_id)
            if job.wave < job.num_waves and self._depth > 1 and job.may_follow():
                self._ready.append(job)
        self._ready.sort(key=lambda job: job.turn)
        return plan

    def _fill(self, pass_id: PassId, ended: tuple[RequestId, ...]) -> tuple[list[_Job], Plan]:
        """Who goes, and their plan: more than the choice foresaw where requests have rows in common."""
        ready = self._in_groups(self._with_room())
        waiting = sum(job.num_rows for job in ready)
        budget = foreseen = self._budget(ready, share_of(waiting, self._depth - len(self._flying), self._policy))
        chosen = self._choice.choose(ready, budget)
        plan = self._packer.pack(pass_id, self._going(chosen), ended)
        for _ in range(_MAX_REFILLS):
            rows = max(plan.layer_rows, default=0)
            if len(chosen) == len(ready) or not 0 < rows * 4 < budget * 3:
                break
            foreseen = foreseen * budget // rows
            more = self._choice.choose(ready, foreseen)
            if len(more) <= len(chosen):
                break
            fuller = self._packer.pack(pass_id, self._going(more), ended)
            if max(fuller.layer_rows) > budget:
                break
            chosen, plan = more, fuller
        return chosen, plan

    def _in_groups(self, ready: list[_Job]) -> list[_Job]:
        """Of the steps only as many as are to go now, so that the others keep other stages at work."""
        steps = [job for job in ready if job.is_step]
        room = share_of_steps(sum(job.num_rows for job in steps), self._depth - len(self._flying))
        rows = accumulate(job.num_rows for job in steps)
        late = {job.number for job, reached in zip(steps[1:], [*rows][1:], strict=True) if reached > room}
        return [job for job in ready if not (job.is_step and job.number in late)] if late else ready

    @property
    def _is_idle(self) -> bool:
        return not self._ready and not self._flying

    def _with_room(self) -> list[_Job]:
        """Those whose next wave may go: a generation needs room for its sequences' caches before it begins."""
        left = self._kept_bytes
        found = []
        for job in self._ready:
            if job.reserved is None and job.generating is not None:
                needed = self._cache_bytes(job.generating)
                if needed > left:
                    continue
                left -= needed
            found.append(job)
        return found

    def _cache_bytes(self, generating: Generating) -> int:
        """Of a generation's caches, on the shard that has most."""
        return generating.caches.num_positions * self._position_bytes

    def _budget(self, ready: list[_Job], budget: int) -> int:
        """Rows of a pass: beside steps only so many others that nobody waits long for the next token.

        Whoever has too many rows for that goes all the same when it has waited for a while.
        """
        steps = [job.num_rows for job in ready if job.is_step]
        others = [job.num_rows for job in ready if not job.is_step]
        if not steps or not others:
            return budget
        beside = self._policy.tokens_beside_steps
        self._waited = 0 if others[0] <= beside else self._waited + 1
        if self._waited > self._policy.max_waits:
            self._waited, beside = 0, max(beside, others[0])
        return min(budget, sum(steps) + beside) if beside < others[0] else max(min(budget, sum(steps) + beside), 0)

    def _going(self, jobs: list[_Job]) -> list[Going]:
        """The jobs with their trunks: those keep them that the store has room for when they first go."""
        for job in jobs:
            if job.generating is not None and job.reserved is None:
                job.reserved = self._cache_bytes(job.generating)
                self._kept_bytes -= job.reserved
            if job.is_keeping is None:
                job.is_keeping = job.program.kept_bytes <= self._kept_bytes
                self._kept_bytes -= job.program.kept_bytes if job.is_keeping else 0
        return [job.going for job in jobs]

    def complete(self, plan: Plan, results: tuple[ShardResult, ...]) -> None:
        """Takes in what all shards answered to a plan: members end or become ready for their next wave."""
        for job, member in self._landed(plan):
            wave = member.wave
            failure = find_out_of_memory(job.program, results)
            error: PolytraceError | None = find_error(job.now, member, results)
            if job.is_cancelled:
                error = CancelledError("the request was cancelled")
            elif failure is not None and len(plan.members) > 1:
                self._ended.append(job.program.request)
                self._queue_again(job, party=job.number)  # its neighbours may have had the memory
                continue
            elif failure is not None:
                error = _too_large(job, wave, failure.message, where=None if error is None else error.where)
            if error is not None:
                self._end(job, error)
                continue
            job.account.enter(plan, results, self._table, job.now, member.step, member.offset)
            if job.generating is not None:
                job.generating.take(results)
            if job.num_done == job.num_waves:
                if job.generating is None or not job.generating.advance():
                    self._finish(job)
                    continue
                job.wave = 0
                job.clear()
            self._progress[job.program.request] = job
            if job.wave < job.num_waves and job not in self._ready:
                self._ready.append(job)
        self._ready.sort(key=lambda job: job.turn)

    def lost(self, plan: Plan, error: PolytraceError) -> None:
        """The pass died with its shards: its members end with `error`, requests between two waves start again."""
        for job, _ in self._landed(plan):
            self._end(job, CancelledError("the request was cancelled") if job.is_cancelled else error)
        self._forget_values(plan)

    def again(self, plan: Plan, error: PolytraceError) -> None:
        """The pass was lost, and shards have nothing left but weights: its members run again from their first waves.

        With PassTooLargeError in two halves; one that was alone ends with the numbers. With PassAbandonedError as if
        nothing had happened. With any other error each alone; one that was alone in three such passes has killed
        three shards, as far as anybody can tell, and ends with the reason. A loss in company says little, and one or
        two alone not enough: shards die for other reasons too.
        """
        landed = self._landed(plan)
        is_too_large = isinstance(error, PassTooLargeError)
        if is_too_large:
            self._learn(max(plan.layer_rows, default=0))
        for place, (job, member) in enumerate(landed):
            wave = member.wave
            if job.is_cancelled:
                self._end(job, CancelledError("the request was cancelled"))
            elif is_too_large and len(plan.members) == 1:
                work = job.now.waves[wave]
                may_be_cut = len(work.invokes) > 1 and work.rows.widest > self.budget_tokens
                self._end(job, _too_large(job, wave, error.message), may_be_cut=may_be_cut)
            elif is_too_large:
                self._queue_again(job, party=(plan.pass_id, 2 * place < len(landed)))
            elif isinstance(error, PassAbandonedError):
                self._queue_again(job, party=job.party)
            else:
                job.losses += 1
                job.lost_at = 0 if job.generating is None else job.generating.step
                job.losses_alone += len(plan.members) == 1
                if job.losses_alone == _MAX_LOSSES_ALONE:
                    told = f"shards died in {job.losses_alone} passes with this request alone: {error.message}"
                    self._end(job, ServiceError(told))
                else:
                    self._queue_again(job, party=job.number)
        self._forget_values(plan)

    def _landed(self, plan: Plan) -> list[tuple[_Job, Member]]:
        """The jobs that the pass still counts for, and what they were in it."""
        flown = self._flying.pop(plan.pass_id)
        self._has_suspect_in_flight = False
        landed = []
        for job, member in zip(flown, plan.members, strict=True):
            if plan.pass_id in job.in_flight:
                job.in_flight.remove(plan.pass_id)
                landed.append((job, member))
        return landed

    def _queue_again(self, job: _Job, *, party: object | None) -> None:
        job.restart()
        job.party = party
        if job not in self._ready:
            self._ready.append(job)

    def _learn(self, rows: int) -> None:
        """A pass of so many rows did not fit."""
        most = max(self._policy.least_tokens, min(self._policy.budget_tokens, rows) // 2)
        self._policy = replace(self._policy, budget_tokens=min(self._policy.budget_tokens, most))

    def _forget_values(self, plan: Plan) -> None:
        """Requests between two waves start again: their values are gone."""
        for job in self._ready:
            if not job.in_flight:
                job.restart()
        # Where the shards are still the same, they hold values and rows of all of these.
        self._ended += [member.program.request for member in plan.members]
        self._ended += [job.program.request for job in self._ready]
        self._ready.sort(key=lambda job: job.turn)

    def take_progress(self) -> list[Progress]:
        """How far the requests are that got further since the last call and have not ended."""
        jobs, self._progress = self._progress, {}
        told = []
        for request, job in jobs.items():
            if request in self._jobs:
                told.append(replace(job.progress, tokens=job.take_tokens(), saves=job.take_saves()))
        return told

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
            generating=job.generating,
        )
        if job.generating is not None and not job.generating.is_ending:
            self._ended.append(job.program.request)  # no plan could say that it was the last
        self._remove(job)
        self._outcomes.append(
            Outcome(
                request=job.program.request,
                receipt=receipt,
                values=job.account.values,
                tokens=job.take_tokens(),
                saves=tuple(job.account.saves),
            )
        )

    def _end(self, job: _Job, error: PolytraceError, *, may_be_cut: bool = False) -> None:
        """Without a result."""
        if job.is_held:
            self._ended.append(job.program.request)
        self._remove(job)
        self._outcomes.append(Outcome(request=job.program.request, error=error, may_be_cut=may_be_cut))

    def _remove(self, job: _Job) -> None:
        job.in_flight.clear()
        self._has_caches_left = self._has_caches_left or job.reserved is not None
        if job in self._ready:
            self._ready.remove(job)
        del self._jobs[job.program.request]
        self._kept_bytes += (job.program.kept_bytes if job.is_keeping else 0) + (job.reserved or 0)


def _no_room(needed: int, most: int) -> TooLargeError:
    return TooLargeError(
        f"the keys and values of this generation take {needed:,} bytes on a shard; there is room for {most:,}: "
        "ask for fewer new tokens, shorter prompts or fewer samples"
    )


def _too_large(job: _Job, wave: int, told: str, *, where: str | None = None) -> TooLargeError:
    rows = job.now.waves[wave].rows.widest
    return TooLargeError(
        f"pass {wave + 1} of {job.num_waves} does not fit into memory though the request has it to itself, "
        f"{rows:,} rows at its widest layer: {told}. Ask for fewer or shorter prompts in one invoke, or smaller values",
        where=where,
    )
