"""Splits waves that have more rows than one pass takes, so that a sweep may be of any size.

Owns which invokes wait for a later wave. They go in order, as many to a wave as fit, those that have waited first; so
an invoke whose values others need goes before these, or with them. One invoke is never divided: its prompts are one
view.

Rows are counted along the forests of the waves as they were: a part has the segments of its invokes, and of all that
these fork from the rows that they need. Where those ran in an earlier part, they are kept (`scheduling.trunks`) unless
there is no room for them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import add, sub

from polytrace.graph import Invoke
from scheduling.forest import Forest
from scheduling.plan import Segment
from scheduling.waves import Run

_SLACK = 64  # a part leaves one row in so many: grown by itself, its forest may have another shape


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """What has to wait, and what it would not have waited with."""

    waits: Mapping[int, int]  # invoke -> the wave that it waits for
    ancestors: frozenset[int]  # invokes that those would fork from


def split(
    runs: Sequence[Run],
    forests: Mapping[int, Forest],
    invokes: Sequence[Invoke],
    num_layers: int,
    budget_tokens: int,
) -> Split:
    """Where every wave fits, or nobody can wait, there is nothing that waits. Linear in runs.

    `forests` have each wave's sequences in the order of `runs`.
    """
    shares = _find_shares(runs, forests, invokes)
    waits: dict[int, int] = {}
    started: set[int] = set()  # invokes that have a part already
    late: set[int] = set()  # invokes that have none yet, though their wave has come
    waiting: deque[_Share] = deque()  # what these have of it
    wave, last = 0, max(shares, default=-1)
    while waiting or wave <= last:
        own = [share for share in shares.get(wave, ()) if share.invoke not in late]
        if waiting or (own and not fits(forests[wave], budget_tokens)):
            free = [share for share in own if share.invoke not in started]
            late.update(share.invoke for share in free)
            part = _Part(num_layers, budget_tokens - budget_tokens // _SLACK)
            for share in own:
                if share.invoke not in late:
                    part.take(share, is_bound=True)
            waiting.extend(free)
            while waiting and part.take(waiting[0]):
                share = waiting.popleft()
                late.remove(share.invoke)
                started.add(share.invoke)
                if share.wave != wave:
                    waits[share.invoke] = wave
        started.update(share.invoke for share in own if share.invoke not in late)
        wave += 1
    return Split(waits=waits, ancestors=_find_ancestors(shares.values(), waits))


def fits(forest: Forest, budget_tokens: int) -> bool:
    """Whether one pass takes its rows."""
    return max(forest.layer_rows, default=0) <= budget_tokens


@dataclass(frozen=True, slots=True)
class _Share:
    """What an invoke has of a wave's forest."""

    invoke: int
    wave: int
    segments: tuple[Segment, ...]  # all of the wave
    places: tuple[int, ...]  # its own among them


class _Part:
    """What goes in one wave, and how many rows that is at each layer."""

    def __init__(self, num_layers: int, budget_tokens: int) -> None:
        self._budget_tokens = budget_tokens
        self._reached: dict[tuple[int, int], list[int]] = {}  # (wave, segment) -> up to which row it has, by layer
        self._rows = [0] * num_layers

    def take(self, share: _Share, *, is_bound: bool = False) -> bool:
        """Takes a share when there is room, when nobody is there yet, or when it cannot go elsewhere."""
        rows = self._rows
        fresh: dict[tuple[int, int], list[int]] = {}
        for place in share.places:
            segment: int | None = place
            needed: Sequence[int] = share.segments[place].stops
            while segment is not None:
                own, key = share.segments[segment], (share.wave, segment)
                before = fresh.get(key) or self._reached.get(key) or own.starts
                after = list(map(max, before, map(min, needed, own.stops)))
                more = list(map(sub, after, before))
                if not any(more):
                    break  # all that it needs is there
                rows = list(map(add, rows, more))
                fresh[key] = after
                segment, needed = own.parent, list(map(min, needed, own.starts))
        if self._reached and not is_bound and max(rows, default=0) > self._budget_tokens:
            return False
        self._rows = rows
        self._reached.update(fresh)
        return True


def _find_shares(
    runs: Sequence[Run], forests: Mapping[int, Forest], invokes: Sequence[Invoke]
) -> dict[int, list[_Share]]:
    """By wave: what each of its invokes has."""
    shares: dict[int, list[_Share]] = {}
    taken = dict.fromkeys(forests, 0)
    for run in runs:
        forest, start = forests[run.wave], taken[run.wave]
        taken[run.wave] = stop = start + len(invokes[run.invoke].sequences)
        share = _Share(run.invoke, run.wave, forest.segments, forest.places[start:stop])
        shares.setdefault(run.wave, []).append(share)
    return shares


def _find_ancestors(waves: Iterable[list[_Share]], waits: Mapping[int, int]) -> frozenset[int]:
    """The invokes that those which wait would fork from in the waves that they had."""
    found: set[int] = set()
    for shares in waves:
        owners: dict[int, int] = {}  # segment -> the first invoke that has it
        for share in shares:
            for place in share.places:
                owners.setdefault(place, share.invoke)
        for share in shares:
            if share.invoke in waits:
                parents = {share.segments[place].parent for place in share.places}
                found.update(owners[parent] for parent in parents if parent is not None)
    return frozenset(found)
