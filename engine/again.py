"""Sequences that run again at every step, where a model has no cache of its own or one that gives other numbers.

A step runs all tokens of its sequence. Visitors see the rows of the new ones alone. What visitors of earlier steps made
of the rows before is put back wherever they changed something, so that those are what they were: a step costs as many
rows as the sequence has, and its numbers are those of a model with a cache.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from engine.arguments import Selector
from engine.head_outputs import HeadOutputs
from engine.leaves import port_leaves
from engine.points import Pairs
from engine.stage import Visit
from engine.writes import with_member

# T = rows of the whole sequence, N = new ones among them, R = rows that are written, H = heads, K = positions of keys

Go = Callable[[Any], Any]  # visits the new rows of a port's value, and returns what goes on
Place = tuple[str, str, Any]  # a module, the way to an operation in it, a port


@dataclass(slots=True)
class _Rows:
    """What one tensor's rows have become, those before a position."""

    in_place: Tensor | None = None  # `[..., T, ...]`; None: nobody changed them in place
    assigned: Tensor | None = None


@dataclass(slots=True)
class _Changes:
    """What visitors made of one port's value."""

    visit: Visit
    rows: dict[Selector, _Rows] = field(default_factory=dict)
    pairs: list[tuple[list[int], Tensor]] = field(default_factory=list)  # rows, `[R, H, K]`
    heads: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # as `HeadOutputs.change`


@dataclass(slots=True, kw_only=True)
class RunsAgain:
    """One sequence."""

    tokens: tuple[int, ...] = ()  # that have run
    num_new: int = 0  # tokens of the pass that runs
    changes: dict[Place, _Changes] = field(default_factory=dict)

    @property
    def length(self) -> int:
        return len(self.tokens)

    def grow(self, tokens: tuple[int, ...]) -> None:
        """A pass of these is over."""
        self.tokens += tokens

    @property
    def num_bytes(self) -> int:
        """Of all rows that are put back."""
        found = 0
        for changes in self.changes.values():
            kept = [one for rows in changes.rows.values() for one in (rows.in_place, rows.assigned) if one is not None]
            kept += [values for _, values in changes.pairs] + [added for _, added in changes.heads]
            found += sum(tensor.nbytes for tensor in kept)
        return found

    def fork(self) -> RunsAgain:
        """Another sequence's, which goes on from the same tokens."""
        places = {
            place: replace(
                changes,
                rows={selector: copy.copy(rows) for selector, rows in changes.rows.items()},
                pairs=[*changes.pairs],
                heads=[*changes.heads],
            )
            for place, changes in self.changes.items()
        }
        return RunsAgain(tokens=self.tokens, changes=places)

    def visits(self, visits: Sequence[Visit]) -> list[Visit]:
        """Ports where something is to be put back and that nobody else visits in a pass."""
        visited = {_place(visit) for visit in visits}
        return [changes.visit for place, changes in self.changes.items() if place not in visited]

    def visit(self, visit: Visit, value: Any, go: Go) -> Any:
        """A port's value behind the visit of its new rows."""
        changes = self.changes.get(_place(visit)) or _Changes(visit)
        after: Any
        if isinstance(value, Pairs):
            after = self._pairs(changes, value, go)
        elif isinstance(value, HeadOutputs):
            after = self._heads(changes, value, go)
        else:
            after = self._rows(changes, value, go)
        if changes.rows or changes.pairs or changes.heads:
            self.changes[_place(visit)] = changes
        return after

    def _rows(self, changes: _Changes, value: Any, go: Go) -> Any:
        begin, layouts = self.length, changes.visit.layouts
        seen: dict[Selector, tuple[Tensor, Tensor, int]] = {}  # all rows, the new ones, and the version of these
        new = value
        for selector, leaf in port_leaves(value)[1].items():
            dim = layouts.get(selector, 1)
            if leaf.ndim > dim and leaf.shape[dim] == begin + self.num_new:
                before = changes.rows.get(selector)
                if before is not None and before.in_place is not None:
                    leaf.narrow(dim, 0, begin).copy_(before.in_place)
                own = leaf.narrow(dim, begin, self.num_new)
                seen[selector] = leaf, own, own._version
                new = with_member(new, selector, own)
        given = port_leaves(go(new))[1]
        for selector, (leaf, own, version) in seen.items():
            rows, dim = changes.rows.get(selector, _Rows()), layouts.get(selector, 1)
            if own._version != version or rows.in_place is not None:
                rows.in_place = leaf.clone()
            if given[selector] is not own or rows.assigned is not None:
                earlier = leaf.narrow(dim, 0, begin) if rows.assigned is None else rows.assigned
                rows.assigned = torch.cat([earlier, given[selector]], dim)
                value = with_member(value, selector, rows.assigned)
            if rows.in_place is not None or rows.assigned is not None:
                changes.rows[selector] = rows
        return value

    def _pairs(self, changes: _Changes, value: Pairs, go: Go) -> Pairs:
        for rows, values in changes.pairs:
            value.write(rows, values)
        later = LaterPairs(value, self.length)
        go(later)
        changes.pairs += later.made
        return value

    def _heads(self, changes: _Changes, value: HeadOutputs, go: Go) -> HeadOutputs:
        later = HeadOutputs(value.z[:, self.length :], value.weight)
        go(later)
        if later.change is not None:
            rows, added = later.change
            changes.heads.append((rows + self.length, added))
        if changes.heads:
            value.change = torch.cat([rows for rows, _ in changes.heads]), torch.cat([own for _, own in changes.heads])
        return value


class LaterPairs(Pairs):
    """Scores or patterns of a sequence's new rows, which are numbered from 0."""

    def __init__(self, whole: Pairs, begin: int) -> None:
        super().__init__([], whole.masked, whole.num_groups, whole.share, whole.device)
        self.sinks_H = whole.sinks_H
        self.made: list[tuple[list[int], Tensor]] = []  # writes, rows of the whole sequence
        self._whole, self._begin = whole, begin

    def read(self, rows: Sequence[int], num_keys: int) -> Tensor:
        """As `Pairs.read`."""
        return self._whole.read([self._begin + row for row in rows], num_keys)

    def write(self, rows: Sequence[int], values_RHK: Tensor) -> None:
        """As `Pairs.write`."""
        own = [self._begin + row for row in rows]
        self._whole.write(own, values_RHK)
        self.made.append((own, values_RHK.clone()))


def _place(visit: Visit) -> Place:
    return visit.module, visit.operation, visit.port
