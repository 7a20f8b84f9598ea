"""Where a sequence's keys and values are kept while it goes on, and how many positions there is room for.

A cache begins with room for its prompt and a page, and gets about twice as much whenever it is full: few sizes, so that
sequences of different lengths lie side by side. Equal prompts of one invoke (samples) whose edits are equal have their
whole pages in common: a cache of their own that all fork from. Each cache has an owner of its own, by whose name shards
forget it: it may outlive its request (`scheduling.prefixes`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from scheduling.plan import PAGE, Cone, Edit, Grow, Program, RequestId, TrunkId

SequenceId = tuple[int, int]  # of a request: invoke, place in it


@dataclass(slots=True, kw_only=True)
class Cache:
    """One sequence's."""

    trunk: TrunkId
    begin: int  # the first position that is its own; those before are `prefix`'s
    capacity: int  # positions from `begin` on that there is room for
    most: int  # that it can come to need
    prefix: TrunkId | None = None

    def grow(self, segment: int, start: int, stop: int) -> Grow:
        """That a segment's positions from `start` to `stop` are new to it."""
        return Grow(
            trunk=self.trunk,
            segment=segment,
            begin=self.begin,
            start=max(self.begin, start),
            stop=stop,
            capacity=self.capacity,
        )

    def capacity_for(self, positions: int) -> int:
        """The room that it is to have when its sequence has so many positions: what it has while that is enough."""
        needed = positions - self.begin
        return self.capacity if needed <= self.capacity else min(roomy(max(needed, 2 * self.capacity)), self.most)


@dataclass(slots=True, kw_only=True)
class Caches:
    """All of one request's."""

    own: dict[SequenceId, Cache]
    shared: dict[SequenceId, Cache]  # prefixes, by the first sequence that has it

    def __iter__(self) -> Iterator[Cache]:
        yield from self.own.values()
        yield from self.shared.values()

    @property
    def num_positions(self) -> int:
        """That there is room for, in all of them."""
        return sum(cache.capacity for cache in self)

    def needed(self, lengths: Mapping[SequenceId, int]) -> int:
        """Positions of new room for sequences of these lengths: of each cache that is too small, all of it."""
        found = 0
        for sequence, length in lengths.items():
            cache = self.own[sequence]
            if length - cache.begin > cache.capacity:
                found += cache.capacity_for(length)
        return found

    def widen(self, lengths: Mapping[SequenceId, int]) -> None:
        """Gives caches the room that sequences of these lengths need."""
        for sequence, length in lengths.items():
            cache = self.own[sequence]
            cache.capacity = cache.capacity_for(length)


def caches_of(program: Program, new_owner: Callable[[], RequestId] | None = None, least: int = 0) -> Caches:
    """Those that a generation needs at first; `least` positions when it is known to come so far.

    Numbers are below 0: trunks have the others. Without `new_owner` all belong to the request.
    """
    own: dict[SequenceId, Cache] = {}
    shared: dict[SequenceId, Cache] = {}
    number = 0

    def new(begin: int, capacity: int, most: int, prefix: TrunkId | None = None) -> Cache:
        nonlocal number
        number -= 1
        owner = program.request if new_owner is None else new_owner()
        return Cache(trunk=(owner, number), begin=begin, capacity=min(capacity, most), most=most, prefix=prefix)

    cones = drawing_cones(program)
    for index, invoke in enumerate(program.invokes):
        if invoke.generation is None:
            continue
        alike: dict[object, list[int]] = {}  # sequences whose whole pages are equal
        for place, tokens in enumerate(invoke.sequences):
            begin = len(tokens) // PAGE * PAGE
            edits = edits_before(cones[index][place], begin) if index in cones else ()
            is_shared = begin > 0 and program.sharing_domain is not None
            alike.setdefault((tokens, edits) if is_shared else place, []).append(place)
        for places in alike.values():
            tokens, begin, prefix = invoke.sequences[places[0]], 0, None
            if len(places) > 1:
                begin = len(tokens) // PAGE * PAGE
                shared[index, places[0]] = new(0, begin, begin)
                prefix = shared[index, places[0]].trunk
            for place in places:
                total = len(invoke.sequences[place]) + invoke.generation.max_new_tokens - begin
                first = max(len(invoke.sequences[place]) + PAGE, least) - begin
                own[index, place] = new(begin, roomy(first), roomy(total), prefix)
    return Caches(own=own, shared=shared)


def drawing_cones(program: Program) -> dict[int, tuple[Cone, ...]]:
    """Of each invoke that goes on, where its sequences' first tokens are drawn."""
    return {
        invoke: cones
        for wave in program.waves
        for invoke, cones in zip(wave.invokes, wave.cones, strict=True)
        if invoke in wave.drawing
    }


def edits_before(cone: Cone, position: int) -> tuple[Edit, ...]:
    return tuple([edit for edit in cone.edits if edit.position < position])


def roomy(positions: int) -> int:
    """Room for so many, and a little more: 1, 2, 3, 4, 6, 8, 12, ... pages."""
    pages, room = -(-positions // PAGE), 1
    while room < pages:
        room *= 2
    return PAGE * (room // 4 * 3 if room >= 4 and room // 4 * 3 >= pages else room)
