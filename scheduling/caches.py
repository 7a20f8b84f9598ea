"""Where a sequence's keys and values are kept while it goes on, and how many positions there is room for.

Equal prompts of one invoke (samples) have the whole pages of it in common: a cache of their own that all fork from.
"""

from __future__ import annotations

from dataclasses import dataclass

from scheduling.plan import PAGE, Grow, Program, TrunkId

SequenceId = tuple[int, int]  # of a request: invoke, place in it


@dataclass(slots=True, kw_only=True)
class Cache:
    """One sequence's."""

    trunk: TrunkId
    begin: int  # the first position that is its own; those before are `prefix`'s
    capacity: int  # positions from `begin` on that there is room for
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


@dataclass(slots=True, kw_only=True)
class Caches:
    """All of one request's."""

    own: dict[SequenceId, Cache]
    shared: dict[SequenceId, Cache]  # prefixes, by the first sequence that has it

    @property
    def num_positions(self) -> int:
        """That there is room for, in all of them."""
        return sum(cache.capacity for cache in (*self.own.values(), *self.shared.values()))


def caches_of(program: Program) -> Caches:
    """Those that a generation needs, with room for all of its tokens. Numbers are below 0: trunks have the others."""
    own: dict[SequenceId, Cache] = {}
    shared: dict[SequenceId, Cache] = {}
    number = 0

    def new(begin: int, positions: int, prefix: TrunkId | None = None) -> Cache:
        nonlocal number
        number -= 1
        return Cache(trunk=(program.request, number), begin=begin, capacity=in_pages(positions - begin), prefix=prefix)

    for index, invoke in enumerate(program.invokes):
        if invoke.generation is None:
            continue
        first: dict[tuple[int, ...], int] = {}  # of each prompt
        counts: dict[tuple[int, ...], int] = {}
        for tokens in invoke.sequences:
            counts[tokens] = counts.get(tokens, 0) + 1
        for place, tokens in enumerate(invoke.sequences):
            begin, prefix = 0, None
            if counts[tokens] > 1 and len(tokens) >= PAGE:
                begin = len(tokens) // PAGE * PAGE
                owner = (index, first.setdefault(tokens, place))
                if owner not in shared:
                    shared[owner] = new(0, begin)
                prefix = shared[owner].trunk
            own[index, place] = new(begin, len(tokens) + invoke.generation.max_new_tokens, prefix)
    return Caches(own=own, shared=shared)


def in_pages(positions: int) -> int:
    """Room for so many positions: whole pages, a power of two or half as many again, so at most a third is empty.

    Caches of equal room lie side by side and are attended to together, so there are few sizes.
    """
    pages = -(-positions // PAGE)
    power = 1 << max(0, pages - 1).bit_length()  # the least that is enough
    return PAGE * (power * 3 // 4 if power > 2 and pages <= power * 3 // 4 else power)
