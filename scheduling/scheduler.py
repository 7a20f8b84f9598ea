"""The queue of a deployment: which waves are ready, which pass they are in, how each request ends.

Owns the life of a request between `add` and its one `Outcome`. Who goes into a pass, and its plan, are
`scheduling.filling`'s, what its results say is `scheduling.receipts`', who has room on the shards is
`scheduling.room`'s, what a request hears of its end is `scheduling.endings`'.

A pass that does not fit into a shard's memory is abandoned, and its members run again in two halves that never merge
with others again; so whoever is too large for a pass to itself is found out, and nobody else suffers. Passes have at
most half as many rows from then on (but no fewer than the policy's least).

Invariants
- A request's waves go in order, each when the one before has ended. With several stages a wave may follow while the
  one before is on its way through them, if it needs nothing that a later stage has; it stands behind all others then.
- Every request that was added ends in exactly one outcome.
- Requests that end between two waves are named in the next plan (`Plan.ended`), so that shards forget them; and so are
  caches, by their owners.
- What cannot be begun or planned, for a fault of ours, ends with that, and alone: whoever calls does not suffer for it.
- A generation has room for its caches before the pass that fills them. Where none is left the youngest is put back and
  runs again from its first step, with the same result; so the oldest always goes on.
"""

from __future__ import annotations

import logging
import time
from bisect import insort
from collections.abc import Callable, Collection
from dataclasses import replace

from polytrace.certificate import PassEntry, charge
from polytrace.description import ModelDescription, PassLayout
from polytrace.errors import CancelledError, PolytraceError, ServiceError
from scheduling.ahead import Ahead
from scheduling.alike import AlikeCalls, calls_merged
from scheduling.caches import caches_of
from scheduling.checks import table_of
from scheduling.endings import Endings
from scheduling.fair import FairShares
from scheduling.fair_choice import FairChoice
from scheduling.filling import Filler
from scheduling.generating import Generating
from scheduling.jobs import Flight, Job, Outcome, Progress
from scheduling.neighbours import entries_of_tenants
from scheduling.packing import Going, Taped
from scheduling.plan import (
    Member,
    PassAbandonedError,
    PassId,
    PassTooLargeError,
    Plan,
    Program,
    RequestId,
    ShardResult,
)
from scheduling.policy import PassPolicy
from scheduling.prefixes import left_by
from scheduling.receipts import find_error, find_out_of_memory, moved_in, pass_entry, values_of
from scheduling.refusals import of_ours, rows_held, too_large
from scheduling.room import Room
from scheduling.stopping import Decode

__all__ = ["Outcome", "Progress", "Scheduler"]

_MAX_LOSSES_ALONE = 3  # shards that may die while a request is alone on them: two may be bad luck

_log = logging.getLogger(__name__)


class Scheduler:
    """One deployment's queue. Not thread-safe: its owner's loop calls it."""

    def __init__(
        self,
        description: ModelDescription,
        policy: PassPolicy,
        *,
        clock: Callable[[], float] = time.monotonic,
        decode: Decode | None = None,
        shares: FairShares | None = None,
        replica: object = None,
    ) -> None:
        """`decode` gives the text of tokens; without it no text ends a generation. `shares` are those of all replicas
        of the deployment, this one by its name; None: its own.
        """
        self._table = table_of(description)
        self._tells_of_other_tenants = policy.tells_of_other_tenants
        shares = FairShares() if shares is None else shares
        fair = FairChoice(shares, replica)
        self._filler = Filler(description, policy, fair, going=self._going, take_ended=self._take_ended)
        self._endings = Endings(self._table, shares, clock)
        self._room = Room(description, policy.prefix_bytes, shares, put_back=self._put_back, end=self._end)
        is_merging = description.layout is PassLayout.WHOLE and policy.merges_calls
        self._alike = AlikeCalls() if is_merging else None
        self._clock = clock
        self._decode = decode
        self._has_prefixes = description.layout is PassLayout.PACKED and description.has_forks
        self._jobs: dict[RequestId, Job] = {}
        self._ready: list[Job] = []  # by turn: those whose next wave may go
        self._flying: dict[PassId, Flight] = {}
        self._ended: list[RequestId] = []  # shards hold values of these; the next plan says to drop them
        self._has_much_left = False  # shards, of generations and gradients that have ended
        self._owners = 0  # of caches
        self._arrivals = 0
        self._passes = 0
        self._has_suspect_in_flight = False
        self._telling: tuple[RequestId, ...] = ()  # what it says has ended

    @property
    def budget_tokens(self) -> int:
        """Rows that a pass may have: the policy's, or fewer since one did not fit into memory."""
        return self._filler.budget_tokens

    def add(self, program: Program) -> None:
        """Takes a request. Its id must not be one that is still on its way."""
        assert program.request not in self._jobs, f"request {program.request} was added twice"
        self._arrivals += 1
        job = Job(program, self._arrivals, self._clock(), self._table.description.num_layers)
        job.since = PassId(self._passes)
        try:
            self._begin(job)
        except Exception as error:  # noqa: BLE001  it is this request's, and not of who adds it or runs beside it
            _log.exception("request %s could not be begun", program.request)
            self._endings.refuse(program.request, of_ours(error))
            return
        self._jobs[program.request] = job
        insort(self._ready, job, key=lambda ready: ready.turn)

    def _begin(self, job: Job) -> None:
        """Brings a job before its first wave."""
        program = job.program
        if self._alike is not None:
            job.alike, job.is_calling = self._alike.of(program), True
        if program.chain is None:
            job.restart(None, None)
            return
        caches = caches_of(program, self._new_owner if self._has_prefixes else None, job.least)
        ahead = Ahead(program, caches, self._table.description.num_layers) if self._has_prefixes else None
        job.restart(Generating(program, self._decode, caches), ahead)

    def _new_owner(self) -> RequestId:
        self._owners += 1
        return RequestId(f"cache:{self._owners}")

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

    def forget_prefixes(self) -> None:
        """Keeps nothing any more of what generations have left for others; the next plan says so."""
        self._room.memory.forget_prefixes()

    def has_work(self) -> bool:
        """Whether a wave may go into a pass now. A suspect goes when no pass is in flight, and none beside it."""
        if self._is_idle and (self._has_much_left or self._room.memory.dropped):
            return True
        if self._has_suspect_in_flight:
            return False
        waiting = self._with_room()
        return bool(waiting) and (not self._flying or not waiting[0].is_suspect)

    def next_pass(self) -> Plan:
        """The next pass, in flight until `complete`, `lost` or `again`. Call it only when there is work.

        It is one of nobody, when nobody waits and shards are to forget what has ended, or when it could not be planned.
        """
        self._passes += 1
        pass_id = PassId(self._passes)
        self._telling = ()
        waiting = self._with_room()
        self._look(waiting)
        num_steps = sum(job.num_rows for job in self._jobs.values() if job.is_step)
        try:
            going, plan = self._filler.fill(pass_id, waiting, num_steps, len(self._flying))
        except Exception as error:  # noqa: BLE001  it is of one of those who were to go
            _log.exception("a pass could not be planned")
            self._part(error)
            going, plan = [], self._filler.of_nobody(pass_id, (*self._telling, *self._take_ended()))
        self._filler.went([job for job, _ in going])
        flight = Flight([job for job, one in going if not one.stretches], [job for job, one in going if one.stretches])
        self._flying[pass_id] = flight
        self._has_suspect_in_flight = any(job.is_suspect for job in flight.jobs)
        now = self._clock()
        for job, one in going:
            self._ready.remove(job)
            job.started = now if job.started is None else job.started
            job.in_flight.append(pass_id)
            job.since = pass_id if job.is_step or one.stretches else job.since
            if job.ahead is not None:
                job.ahead.went(one.stretches)
            if one.stretches:
                job.num_ahead += 1
            else:
                if plan.cuts:
                    job.taped[job.wave] = Taped(pass_id, plan.num_stages)
                job.wave += 1
            if job.wave < job.num_waves and self._filler.depth > 1 and (one.stretches or job.may_follow()):
                self._ready.append(job)
        self._put_in_turn({job for job, _ in going})
        return plan

    def _put_in_turn(self, moved: Collection[Job]) -> None:
        """Puts those of the ready whose turn may be another one now where they belong; all others are in theirs."""
        own = [job for job in self._ready if job in moved]
        if own:
            self._ready = [job for job in self._ready if job not in moved]
            for job in own:
                insort(self._ready, job, key=lambda ready: ready.turn)

    def _part(self, error: Exception) -> None:
        """After a pass that could not be planned: its requests go alone from now on, and one that was alone ends."""
        tried = self._filler.tried
        if not tried:
            raise error
        for job in tried:
            if len(tried) > 1:
                job.party = job.number
            else:
                self._end(job, of_ours(error))

    def _take_ended(self) -> tuple[RequestId, ...]:
        """What shards are to forget, once."""
        self._telling = (*self._ended, *self._room.memory.dropped)
        self._ended, self._room.memory.dropped, self._has_much_left = [], [], False
        return self._telling

    @property
    def _is_idle(self) -> bool:
        return not self._ready and not self._flying

    def _with_room(self) -> list[Job]:
        """Those whose next wave may go: a generation needs room for its sequences' caches before that.

        Those that go on come first, the oldest in front; then those that begin, of whom the tenant has least room.
        Whoever comes after one that waits for room waits behind it.
        """
        self._room.is_short = False
        if not any(job.needed or not job.has_tape_room for job in self._ready):
            return list(self._ready)
        self._room.give_caches(self._ready, self._jobs.values())
        self._room.give_tapes(self._ready)
        return [job for job in self._ready if not job.needed and job.has_tape_room]

    def _put_back(self, job: Job) -> None:
        """It runs again from its first step, when there is room."""
        assert job.generating is not None and not job.in_flight
        job.least = max([job.least, *job.generating.lengths.values()])
        self._restart(job)
        self._put_in_turn({job})

    def _restart(self, job: Job) -> None:
        """What shards have of its caches they are to forget."""
        self._free(job)
        if job.is_held:
            self._ended.append(job.program.request)
        self._begin(job)

    def _free(self, job: Job, kept: Collection[RequestId] = ()) -> None:
        """Gives back what a job has room for, but caches that are kept."""
        if job.generating is not None and job.reserved:
            owners = {cache.trunk[0] for cache in job.generating.caches}
            self._ended += sorted(owners.difference(kept))
            self._has_much_left = True
        self._room.free(job)

    def _look(self, jobs: list[Job]) -> None:
        """Finds prefixes for prompts that have not begun."""
        for job in jobs:
            if job.ahead is not None and not job.is_step:
                job.ahead.look(self._room.memory.prefixes)

    def _going(self, chosen: list[tuple[Job, int]]) -> list[tuple[Job, Going]]:
        """The jobs with their trunks: those keep them that the store has room for when they first go."""
        for job, _ in chosen:
            if job.is_keeping is None:
                is_free = not job.program.trunk_bytes or not self._room.is_short
                job.is_keeping = is_free and self._room.memory.take(job.program.trunk_bytes)
        self._look([job for job, _ in chosen])  # again: what takes room may have been given that of prefixes
        return [(job, job.going(rows)) for job, rows in chosen]

    def complete(self, plan: Plan, results: tuple[ShardResult, ...]) -> None:
        """Takes in what all shards answered to a plan: members end or become ready for their next wave."""
        flight = self._flying[plan.pass_id]
        together = len(flight.jobs)
        entry = pass_entry(plan, results, self._table, together)
        told = entries_of_tenants(entry, plan, flight.jobs, is_of_all=self._tells_of_other_tenants)
        values = values_of(results)
        if self._alike is not None:
            self._alike.learn([job.alike for job in flight.jobs if job.alike is not None], results)
        landed = self._landed(plan)
        for job, member in landed:
            failure = find_out_of_memory(job.program, results)
            error: PolytraceError | None = None
            if member is not None:
                error = find_error(job.now, member, results, job.account.whole)
            if job.is_cancelled:
                error = CancelledError("the request was cancelled")
            elif failure is not None and together > 1:
                self._ended.append(job.program.request)
                self._queue_again(job, party=job.number)  # its neighbours may have had the memory
                continue
            elif failure is not None and member is not None:
                error = too_large(job, member.wave, failure.message, where=None if error is None else error.where)
            if error is not None:
                self._end(job, error)
                continue
            step, offset = (0, 0) if member is None else (member.step, member.offset)
            self._endings.charge(job, charge(0, moved_in(results, job.program.request)))
            own = self._with_calls(told[job.tenant], job, flight, results)
            job.account.enter(own, results, job.now, step, offset, values.get(job.program.request, {}))
            if member is not None and job.generating is not None:
                job.generating.take(results)
            if job.num_done == job.num_waves:
                self._room.settle(job)
                if not job.advance():
                    self._finish(job)
                    continue
                job.clear()
            self._endings.note(job)
            if job.wave < job.num_waves and job not in self._ready:
                self._ready.append(job)
        self._put_in_turn({job for job, _ in landed})

    def _with_calls(self, entry: PassEntry, job: Job, flight: Flight, results: tuple[ShardResult, ...]) -> PassEntry:
        """What a request hears of the calls that were one with its own: of its tenant's, as of the pass."""
        if self._alike is None:
            return entry
        own = {other.program.request for other in flight.jobs if other.tenant == job.tenant}
        seen = None if self._tells_of_other_tenants else own
        return replace(entry, calls_merged=calls_merged(results, job.program.request, seen))

    def lost(self, plan: Plan, error: PolytraceError) -> None:
        """The pass died with its shards: its members end with `error`, requests between two waves start again."""
        for job, _ in self._landed(plan):
            self._end(job, CancelledError("the request was cancelled") if job.is_cancelled else error)
        self._forget_values(plan)

    def again(self, plan: Plan, error: PolytraceError) -> None:
        """The pass was lost, and shards have nothing left but weights: its members run again from their first waves.

        With PassTooLargeError in two halves; one that was alone ends with the numbers, unless fewer rows of its prompts
        will do. With PassAbandonedError as if nothing had happened. With any other error each alone; one that was alone
        in three such passes has killed three shards, as far as anybody can tell, and ends with the reason. A loss in
        company says little, and one or two alone not enough: shards die for other reasons too.
        """
        together = len(self._flying[plan.pass_id].jobs)
        landed = self._landed(plan)
        rows = rows_held(plan)
        is_too_large = isinstance(error, PassTooLargeError)
        if is_too_large:
            self._filler.learn(rows)
        for place, (job, member) in enumerate(landed):
            if job.is_cancelled:
                self._end(job, CancelledError("the request was cancelled"))
            elif is_too_large and together == 1 and job.may_be_cut(member) and rows > self.budget_tokens:
                self._queue_again(job, party=job.party)
            elif is_too_large and together == 1:
                wave = 0 if member is None else member.wave
                work = job.now.waves[wave]
                may_be_cut = len(work.invokes) > 1 and work.rows.widest > self.budget_tokens
                self._end(job, too_large(job, wave, error.message), may_be_cut=may_be_cut)
            elif is_too_large:
                self._queue_again(job, party=(plan.pass_id, 2 * place < len(landed)))
            elif isinstance(error, PassAbandonedError):
                self._queue_again(job, party=job.party)
            else:
                job.losses += 1
                job.lost_at = 0 if job.generating is None else job.generating.step
                job.losses_alone += together == 1
                if job.losses_alone == _MAX_LOSSES_ALONE:
                    told = f"shards died in {job.losses_alone} passes with this request alone: {error.message}"
                    self._end(job, ServiceError(told))
                else:
                    self._queue_again(job, party=job.number)
        self._forget_values(plan)

    def _landed(self, plan: Plan) -> list[tuple[Job, Member | None]]:
        """The jobs that the pass still counts for, and what they were in it; None: rows of theirs ran ahead."""
        flight = self._flying.pop(plan.pass_id)
        self._has_suspect_in_flight = False
        flown = [*zip(flight.members, plan.members, strict=True), *((job, None) for job in flight.ahead)]
        landed = []
        for job, member in flown:
            if plan.pass_id in job.in_flight:
                job.land(plan.pass_id, is_ahead=member is None)
                landed.append((job, member))
        return landed

    def _queue_again(self, job: Job, *, party: object | None) -> None:
        self._restart(job)
        job.party = party
        if job not in self._ready:
            self._ready.append(job)

    def _forget_values(self, plan: Plan) -> None:
        """Requests between two waves start again: their values are gone."""
        for job in self._ready:
            if not job.in_flight:
                self._restart(job)
        self._room.memory.forget_prefixes()
        # Where the shards are still the same, they hold values and rows of all of these.
        self._ended += [member.program.request for member in plan.members]
        self._ended += [job.program.request for job in self._ready]
        self._ready.sort(key=lambda job: job.turn)

    def take_progress(self) -> list[Progress]:
        """How far the requests are that got further since the last call and have not ended."""
        return self._endings.take_progress()

    def take_outcomes(self) -> list[Outcome]:
        """The requests that ended since the last call, in that order."""
        return self._endings.take_outcomes()

    def _finish(self, job: Job) -> None:
        self._endings.finish(job)
        if job.generating is not None and not job.generating.is_ending:
            self._ended.append(job.program.request)  # no plan could say that it was the last
        prefixes = []
        if job.generating is not None and self._has_prefixes:
            num_layers = self._table.description.num_layers
            prefixes = list(left_by(job.program, job.generating, num_layers, self._room.position_bytes))
        self._remove(job, {prefix.trunk[0] for prefix in prefixes})
        self._ended += [prefix.trunk[0] for prefix in prefixes if not self._room.memory.keep(prefix)]

    def _end(self, job: Job, error: PolytraceError, *, may_be_cut: bool = False) -> None:
        """Without a result."""
        if job.is_held:
            self._ended.append(job.program.request)
            self._has_much_left |= bool(job.taped)
        self._remove(job)
        self._endings.end(job, error, may_be_cut=may_be_cut)

    def _remove(self, job: Job, kept: Collection[RequestId] = ()) -> None:
        """`kept`: owners of its caches that stay."""
        job.in_flight.clear()
        if job in self._ready:
            self._ready.remove(job)
        del self._jobs[job.program.request]
        self._free(job, kept)
        self._room.memory.give(job.program.trunk_bytes if job.is_keeping else 0)
