"""Who has room on the shards, for caches of generations and what passes keep for gradients, and who waits for some.

Room is given before the pass that fills it. Where none is left for caches the youngest is put back and runs again from
its first step; so the oldest always goes on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection
from heapq import heapify, heappop, heapreplace

from polytrace.description import ModelDescription
from polytrace.errors import TooLargeError
from scheduling.checks import table_of
from scheduling.fair import FairShares
from scheduling.jobs import Job
from scheduling.memory import Memory


class Room:
    """Of one deployment's shards. Belongs to a scheduler."""

    def __init__(
        self,
        description: ModelDescription,
        prefix_bytes: int | None,
        shares: FairShares,
        *,
        put_back: Callable[[Job], None],
        end: Callable[[Job, TooLargeError], None],
    ) -> None:
        """`put_back` has a job begin again, which gives back its room; `end` ends one that is too large."""
        self.memory = Memory(description.limits.trunk_bytes, prefix_bytes)
        self.tapes = Memory(description.limits.tape_bytes, prefix_bytes=0)  # of what passes keep for gradients
        stages = table_of(description).levels.stages
        self.position_bytes = description.key_value_bytes * max(map(stages.count, set(stages)), default=0)
        self.is_short = False  # somebody waits for room
        self._shares = shares
        self._put_back = put_back
        self._end = end

    def give_caches(self, ready: Collection[Job], jobs: Collection[Job]) -> None:
        """Gives the ready the room that their caches need, in turn, until one waits. `jobs`: all there are, as they
        come and go.
        """
        for job in self._in_order([job for job in ready if job.needed], jobs):
            if not self._make_room(job, jobs):
                self.is_short = True
                break

    def give_tapes(self, ready: Collection[Job]) -> None:
        """The same of what is kept for gradients."""
        for job in sorted([job for job in ready if not job.has_tape_room], key=lambda job: job.number):
            if job.program.tape_bytes > self.tapes.most_bytes:  # of a replica that has less room than the first had
                self._end(job, _no_tape_room(job.program.tape_bytes, self.tapes.most_bytes))
                continue
            job.has_tape_room = self.tapes.take(job.program.tape_bytes)
            if not job.has_tape_room:
                break  # whoever is younger waits behind it

    def settle(self, job: Job) -> None:
        """Caches that have moved are where they are."""
        self.memory.give(job.leaving * self.position_bytes)
        job.reserved -= job.leaving
        job.leaving = 0

    def free(self, job: Job) -> None:
        """Takes back what a job has."""
        if job.generating is not None and job.reserved:
            self.memory.give(job.reserved * self.position_bytes)
            job.reserved = 0
        if job.has_tape_room and job.program.tape_bytes:
            self.tapes.give(job.program.tape_bytes)
            job.has_tape_room = False

    def _in_order(self, asking: list[Job], jobs: Collection[Job]) -> list[Job]:
        """In the order in which they are given room: those that go on, and then those that begin."""
        if len({job.tenant for job in asking}) < 2:
            return sorted(asking, key=lambda job: job.number)
        held: dict[str, int] = {}
        for job in jobs:
            held[job.tenant] = held.get(job.tenant, 0) + job.reserved
        going_on = sorted([job for job in asking if job.reserved], key=lambda job: job.number)
        begins: list[Job] = []
        waiting = {job.tenant: deque[Job]() for job in asking}
        for job in sorted([job for job in asking if not job.reserved], key=lambda job: job.number):
            waiting[job.tenant].append(job)
        heap = [(held[tenant] / self._shares.weight(tenant), tenant) for tenant, own in waiting.items() if own]
        heapify(heap)
        while heap:
            room, tenant = heap[0]
            job = waiting[tenant].popleft()
            begins.append(job)
            if waiting[tenant]:
                heapreplace(heap, (room + job.needed / self._shares.weight(tenant), tenant))
            else:
                heappop(heap)
        return [*going_on, *begins]

    def _make_room(self, job: Job, jobs: Collection[Job]) -> bool:
        """Gives a job's caches the room that they need for its next step, if need be that of younger ones: when it
        begins, of its tenant's.
        """
        while not self.memory.take(job.needed * self.position_bytes):
            holders = [other for other in jobs if other.reserved and other is not job]
            own = [other for other in holders if job.reserved or other.tenant == job.tenant]
            younger = [other for other in own if other.number > job.number]
            idle = [other for other in younger if not other.in_flight]
            is_alone = self.memory.taken_bytes == job.reserved * self.position_bytes
            if idle:
                self._put_back(max(idle, key=lambda other: other.number))
            elif is_alone and not job.reserved:
                self._end(job, _no_room(job.needed * self.position_bytes, self.memory.most_bytes))
                return False
            elif is_alone:
                self._put_back(job)  # it begins with no more than it has come to need, and moves nothing
            else:
                if job.reserved and holders and not younger:
                    self._put_back(job)
                return False  # what others have comes free
        job.reserved += job.needed
        job.needed = 0
        if job.generating is not None:
            job.generating.caches.widen(job.generating.lengths)
            job.leaving = job.reserved - job.generating.caches.num_positions
        return True


def _no_room(needed: int, most: int) -> TooLargeError:
    return TooLargeError(
        f"the keys and values of this generation take {needed:,} bytes on a shard; there is room for {most:,}: "
        "ask for fewer new tokens, shorter prompts or fewer samples"
    )


def _no_tape_room(needed: int, most: int) -> TooLargeError:
    return TooLargeError(
        f"gradients of this request keep {needed:,} bytes on a shard; there is room for {most:,}: ask for them of "
        "fewer or smaller inputs at a time"
    )
