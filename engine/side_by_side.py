"""Values that several sequences have at one port, laid side by side into a stream `[1, T, ...]`, and taken apart again.

Owns the way there and back. What a visitor changed in the stream in place goes into each sequence's own tensor, so that
everyone in the model who holds it sees it; what was assigned goes into a new tensor, laid out in memory as the own one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from engine.arguments import Selector
from engine.copies import to_device
from engine.head_outputs import HeadOutputs
from engine.leaves import port_leaves
from engine.points import Pairs
from engine.writes import with_member

# n = sequences, T = rows of all of them, L = tokens of one, H = heads, K = positions of keys


class SideBySide:
    """What the sequences of a pass have at one port during one visit."""

    def __init__(self, values: Sequence[Any], lengths: Sequence[int], layouts: Mapping[Selector, int]) -> None:
        """By sequence; `layouts` has the dimension of the rows where it is not the second."""
        self._values = values
        self._lengths = lengths
        self._own_lengths: dict[Selector, list[int]] = {}  # of tensors that have rows
        self._starts = [0, *accumulate(lengths)]
        self._leaves: list[dict[Selector, Tensor]] = []
        self._dims: dict[Selector, int] = {}  # of tensors that have rows
        self.value = self._joined(layouts)
        self._versions = {selector: self._joint[selector]._version for selector in self._dims}

    @property
    def values(self) -> Sequence[Any]:
        """Of each sequence."""
        return self._values

    @property
    def starts(self) -> Sequence[int]:
        """The first row of each sequence, and the number of all rows."""
        return self._starts

    def _joined(self, layouts: Mapping[Selector, int]) -> Any:
        first = self._values[0]
        self._joint: dict[Selector, Tensor] = {}
        if isinstance(first, Pairs):
            return JointPairs(self._values, self._starts)
        if isinstance(first, HeadOutputs):
            return HeadOutputs(torch.cat([own.z for own in self._values], 1), first.weight)
        self._leaves = [port_leaves(value)[1] for value in self._values]
        joined = first
        for selector in self._leaves[0]:
            own = [leaves.get(selector) for leaves in self._leaves]
            dim = layouts.get(selector, 1)
            tensors = [tensor for tensor in own if tensor is not None]
            if len(tensors) == len(own) and self._has_rows(tensors, dim):
                self._dims[selector] = dim
                self._own_lengths[selector] = [tensor.shape[dim] for tensor in tensors]
                self._joint[selector] = torch.cat(tensors, dim)
                joined = with_member(joined, selector, self._joint[selector])
        return joined

    def _has_rows(self, tensors: Sequence[Tensor], dim: int) -> bool:
        shapes = [tensor.shape for tensor in tensors]
        if any(len(shape) != len(shapes[0]) or len(shape) <= dim for shape in shapes):
            return False
        rest = {(*shape[:dim], *shape[dim + 1 :]) for shape in shapes}
        own = [shape[dim] for shape in shapes]
        return len(rest) == 1 and own in (list(self._lengths), [1] * len(own))  # 1: of the decoder behind an encoder

    def apart(self, after: Any) -> list[Any]:
        """Each sequence's value, of what a visitor made of `value`; the same objects where nothing was replaced."""
        if isinstance(self.value, Pairs):
            return list(self._values)  # they were written to
        if isinstance(self.value, HeadOutputs):
            return [self._with_change(place, own) for place, own in enumerate(self._values)]
        found = list(self._values)
        behind = {} if after is self.value else port_leaves(after)[1]
        for selector in self._dims:
            joint = self._joint[selector]
            if joint._version != self._versions[selector]:
                for own, part in zip(self._leaves, self._parts(joint, selector), strict=True):
                    own[selector].copy_(part)
            given = behind.get(selector, joint)
            if given is not joint:
                for place, part in enumerate(self._parts(given, selector)):
                    new = torch.empty_like(self._leaves[place][selector]).copy_(part)
                    found[place] = with_member(found[place], selector, new)
        return found

    def _parts(self, joint: Tensor, selector: Selector) -> Iterable[Tensor]:
        parts: tuple[Tensor, ...] = joint.split(self._own_lengths[selector], self._dims[selector])
        return parts

    def _with_change(self, place: int, own: HeadOutputs) -> HeadOutputs:
        if self.value.change is not None:
            rows, added = self.value.change
            start, stop = self._starts[place], self._starts[place + 1]
            places = [number for number, row in enumerate(rows.tolist()) if start <= row < stop]
            if places:
                taken = to_device(places, rows.device, torch.long)
                own.change = rows[taken] - start, added[taken]
        return own


class JointPairs(Pairs):
    """Scores or patterns of several sequences, whose rows are numbered one sequence after another."""

    def __init__(self, parts: Sequence[Pairs], starts: Sequence[int]) -> None:
        super().__init__([], parts[0].masked, parts[0].num_groups, parts[0].share, parts[0].device)
        self._parts, self._starts = parts, starts

    def read(self, rows: Sequence[int], num_keys: int) -> Tensor:
        """As `Pairs.read`."""
        heads = self.num_groups * self.share
        out_RHK = torch.full((len(rows), heads, num_keys), self.masked, device=self.device)
        for part, places, own in self._by_sequence(rows):
            out_RHK[places] = part.read(own, num_keys)
        return out_RHK

    def write(self, rows: Sequence[int], values_RHK: Tensor) -> None:
        """As `Pairs.write`."""
        for part, places, own in self._by_sequence(rows):
            part.write(own, values_RHK[places])

    def _by_sequence(self, rows: Sequence[int]) -> Iterable[tuple[Pairs, Tensor, list[int]]]:
        for number, part in enumerate(self._parts):
            start, stop = self._starts[number], self._starts[number + 1]
            places = [place for place, row in enumerate(rows) if start <= row < stop]
            if places:
                yield part, to_device(places, self.device, torch.long), [rows[place] - start for place in places]
