"""Where the gradient stops at what each head adds to the residual (`engine.head_outputs`), which no forward makes.

Every head's share has the gradient of the sum, which is the output projection's. So the projection runs on heads'
results that autograd does not follow, its output is a leaf, and what has come to it goes on to each head through the
head's own rows of the weights.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from engine.arguments import Selector
from engine.copies import to_device
from engine.gradient_port import (
    Gradient,
    PortGradient,
)
from engine.lanes import least_rows
from engine.seams import go_back, gradient_of, handed_on
from engine.views import RowView

# T = rows of the stream, H = heads here, C = features of a head, D = hidden, R = rows that turns were about


class HeadSeam:
    """A seam between heads' results and the output of their projection."""

    def __init__(self, z_1THC: Tensor, weight_HCD: Tensor) -> None:
        self._edge = get_gradient_edge(z_1THC) if z_1THC.requires_grad else None
        self._shape = (1, z_1THC.shape[1], weight_HCD.shape[2])
        self._weight = weight_HCD.detach()
        self._leaf: Tensor | None = None

    def close(self, output_1TD: Tensor) -> Tensor:
        """Takes the projection's output; what goes on."""
        self._leaf = output_1TD.detach().requires_grad_()
        return handed_on(self._leaf)

    def gradients(self) -> Mapping[Selector, Gradient]:
        nothing = self._weight.new_zeros(self._shape)
        return {(): HeadGradient(nothing if self._leaf is None else gradient_of(self._leaf), self._weight)}

    def go_on(self, gradients: Mapping[Selector, Gradient]) -> None:
        own = gradients[()]
        assert isinstance(own, HeadGradient)
        if self._edge is not None:
            go_back([self._edge], [own.of_heads()])

    def leaves(self) -> Iterator[Tensor]:
        if self._leaf is not None:
            yield self._leaf


class HeadGradient(PortGradient):
    """`[1, T, H, D]`, of which only the rows exist that some turn is about; others have one gradient for all heads."""

    def __init__(self, total_1TD: Tensor, weight_HCD: Tensor) -> None:
        self._total, self._weight = total_1TD, weight_HCD
        self._own: dict[int, Tensor] = {}  # rows that are others now: `[H, D]`

    @classmethod
    def joined(cls, parts: Sequence[HeadGradient]) -> HeadGradient:
        """Of several streams, one behind the other."""
        return cls(torch.cat([part._total for part in parts], 1), parts[0]._weight)

    def take_apart(self, parts: Sequence[HeadGradient], starts: Sequence[int]) -> None:
        """Gives what has changed to those that it was joined of."""
        for row, own in self._own.items():
            place = bisect_right(starts, row) - 1
            parts[place]._own[row - starts[place]] = own

    def of_heads(self) -> Tensor:
        """`[1, T, H, C]`: what comes of it to the heads' results."""
        found_1THC: Tensor = (self._total @ self._weight.flatten(0, 1).T).unflatten(-1, self._weight.shape[:2])
        if not self._own:
            return found_1THC
        numbers = sorted(self._own)
        own_RHD = torch.stack([self._own[row] for row in numbers])
        more = max(0, least_rows(own_RHD.device) - len(numbers))
        whole_RHD = F.pad(own_RHD, (0, 0, 0, 0, 0, more))
        parts = [(whole_RHD[:, head] @ weight.T)[: len(numbers)] for head, weight in enumerate(self._weight)]
        rows = to_device(numbers, own_RHD.device, torch.long)
        return found_1THC.index_copy(1, rows, torch.stack(parts, 1)[None])

    def _read(self, rows: RowView) -> Tensor:
        num_heads = self._weight.shape[0]
        found = self._total.new_zeros(rows.shape[0] * rows.shape[1], num_heads, self._total.shape[2])
        for place, row in zip(rows.places, rows.numbers, strict=True):
            found[place] = self._own[row] if row in self._own else self._total[0, row]
        value: Tensor = found.unflatten(0, rows.shape)
        return value

    def _put(self, rows: RowView, value: Tensor) -> None:
        for row, own in zip(rows.numbers, rows.part(value.to(self._total.dtype)), strict=True):
            self._own[row] = own
