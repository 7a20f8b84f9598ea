"""Where the gradient stops at scores or patterns: seams through `Pairs`, and gradients for each query and key."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from engine.arguments import Selector
from engine.gradient_port import (
    Gradient,
    PortGradient,
)
from engine.pair_tensors import TensorPairs
from engine.pair_views import pairs_of, read_pairs
from engine.points import Pairs
from engine.seams import go_back, gradient_of, handed_on
from engine.segment_pairs import SegmentPairs
from engine.views import RowView

Made = Callable[[list[Tensor]], Pairs]  # pairs like those that were visited, of other tensors


class PairSeam:
    """A seam through the scores or patterns that one visit has seen. All who have them got them from there."""

    def __init__(self, before: Sequence[Tensor], pairs: Pairs) -> None:
        """`before`: the tensors as they were computed. Puts leaves into the pairs for what is computed next."""
        self._edges = [get_gradient_edge(one) if one.requires_grad else None for one in before]
        self._leaves = [one.detach().requires_grad_() for one in tensors_of(pairs)]
        self._made = _maker(pairs)
        _put(pairs, [handed_on(leaf) for leaf in self._leaves])

    def gradients(self) -> Mapping[Selector, Gradient]:
        return {(): PairGradient(self._made([gradient_of(leaf) for leaf in self._leaves]))}

    def go_on(self, gradients: Mapping[Selector, Gradient]) -> None:
        own = gradients[()]
        assert isinstance(own, PairGradient)
        found = zip(self._edges, tensors_of(own.pairs), strict=True)
        both = [(edge, gradient) for edge, gradient in found if edge is not None]
        go_back([edge for edge, _ in both], [gradient for _, gradient in both])

    def leaves(self) -> Iterator[Tensor]:
        yield from self._leaves


class PairGradient(PortGradient):
    """What has come to scores or patterns; zero where a query sees no key."""

    def __init__(self, pairs: Pairs) -> None:
        self.pairs = pairs

    def _read(self, rows: RowView) -> Tensor:
        return read_pairs(self.pairs, rows, rows.view)

    def _put(self, rows: RowView, value: Tensor) -> None:
        self.pairs.write(rows.numbers, pairs_of(value.float(), rows, rows.view, self.pairs))


def tensors_of(pairs: Pairs) -> list[Tensor]:
    """What they are kept in, in passes whose gradients are run back."""
    if isinstance(pairs, TensorPairs):
        return [pairs.tensor]
    assert isinstance(pairs, SegmentPairs)
    return list(pairs.parts)


def _put(pairs: Pairs, tensors: list[Tensor]) -> None:
    if isinstance(pairs, TensorPairs):
        (pairs.tensor,) = tensors
    elif isinstance(pairs, SegmentPairs):
        pairs.parts = tensors


def _maker(pairs: Pairs) -> Made:
    if isinstance(pairs, TensorPairs):
        return lambda tensors: TensorPairs(tensors[0], 0.0)
    assert isinstance(pairs, SegmentPairs)
    starts, num_groups = pairs.starts, pairs.num_groups
    return lambda tensors: SegmentPairs(starts, tensors, 0.0, num_groups, None)
