"""Seams where several sequences stop together that run alone (`engine.padded`): one for each, seen side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from engine.arguments import Selector
from engine.gradient_port import Gradient, RowGradient
from engine.head_seam import HeadGradient
from engine.pair_seam import PairGradient
from engine.seams import Seam
from engine.side_by_side import JointPairs


class LaneSeam:
    """The sequences' seams at one port."""

    def __init__(self, seams: Sequence[Seam], starts: Sequence[int], layouts: Mapping[Selector, int]) -> None:
        """`starts`: the first row of each sequence, and the number of all rows."""
        self._seams, self._starts, self._layouts = seams, starts, layouts
        self._own: list[Mapping[Selector, Gradient]] = []  # of each, during a visit

    def gradients(self) -> Mapping[Selector, Gradient]:
        self._own = [seam.gradients() for seam in self._seams]
        return {selector: self._joined(selector, [own[selector] for own in self._own]) for selector in self._own[0]}

    def go_on(self, gradients: Mapping[Selector, Gradient]) -> None:
        for selector, joint in gradients.items():
            self._take_apart(joint, selector)
        for seam, own in zip(self._seams, self._own, strict=True):
            seam.go_on(own)
        self._own = []

    def leaves(self) -> Iterator[Tensor]:
        for seam in self._seams:
            yield from seam.leaves()

    def _joined(self, selector: Selector, parts: Sequence[Gradient]) -> Gradient:
        first = parts[0]
        if isinstance(first, PairGradient):
            return PairGradient(
                JointPairs([part.pairs for part in parts if isinstance(part, PairGradient)], self._starts)
            )
        if isinstance(first, HeadGradient):
            return HeadGradient.joined([part for part in parts if isinstance(part, HeadGradient)])
        rows = [part for part in parts if isinstance(part, RowGradient)]
        dim = self._layouts.get(selector, 1)
        held = [part.held for part in rows if part.held is not None]
        return RowGradient(
            torch.cat([part.handed for part in rows], dim),
            torch.cat(held, dim) if len(held) == len(rows) else None,
            dim,
        )

    def _take_apart(self, joint: Gradient, selector: Selector) -> None:
        """What graphs have left, into each sequence's own. Those of pairs have it already."""
        parts = [own[selector] for own in self._own]
        if isinstance(joint, HeadGradient):
            joint.take_apart([part for part in parts if isinstance(part, HeadGradient)], self._starts)
        elif isinstance(joint, RowGradient):
            dim = self._layouts.get(selector, 1)
            rows = [part for part in parts if isinstance(part, RowGradient)]
            sizes = [part.handed.shape[dim] for part in rows]
            for part, handed in zip(rows, joint.handed.split(sizes, dim), strict=True):
                part.handed.copy_(handed)
            if joint.held is not None:
                for part, given in zip(rows, joint.held.split(sizes, dim), strict=True):
                    assert part.held is not None
                    part.held.copy_(given)
