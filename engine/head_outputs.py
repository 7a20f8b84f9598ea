"""What each head adds to the residual: its result times its own rows of the output projection, worked out when asked.

No forward makes this tensor. A read multiplies head by head over all rows of the stream, so a row's bits do not depend
on who asks; a write becomes the difference that it makes to what this rank's projection gives, before ranks add up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from engine.copies import to_device

if TYPE_CHECKING:
    from engine.head_seam import HeadSeam
    from engine.views import RowView
    from engine.writes import RowWrite

# T = rows of the stream, H = heads here, C = features of a head, D = hidden, R = rows that are written


class HeadOutputs:
    """`[1, T, H, D]` of one layer in one pass."""

    def __init__(self, z_1THC: Tensor, weight_HCD: Tensor) -> None:
        self.z = z_1THC.detach()  # who asks sees numbers
        self.recorded = z_1THC  # as autograd knows it
        self.weight = weight_HCD
        self.seam: HeadSeam | None = None  # where the gradient stops here
        self.change: tuple[Tensor, Tensor] | None = None  # rows, and what is added to the projection's `[R, D]`

    def whole(self) -> Tensor:
        """All of it."""
        return torch.stack([self._head(head) for head in range(self.z.shape[2])], 2)

    def read(self, rows: RowView) -> Tensor:
        """`[sequences, columns, H, D]`."""
        read = self.z.new_empty(*rows.shape, self.z.shape[2], self.weight.shape[2])
        for head in range(self.z.shape[2]):
            read[:, :, head] = rows.read(self._head(head))  # no head's rows of the whole stream stay
        return read

    def write(self, writes: Sequence[RowWrite]) -> None:
        """Takes all writes of the visit; of those to one row the last stands."""
        written = sorted({row for write in writes for row in write.rows.numbers})
        if not written:
            return
        change_TD = self.z.new_zeros(self.z.shape[1], self.weight.shape[2], dtype=torch.float32)
        for write in sorted(writes, key=lambda write: write.turn):
            if write.rows.num_rows:
                difference = write.rows.part(write.value.float() - self.read(write.rows).float())
                total = difference[:, 0].clone()
                for head in range(1, difference.shape[1]):  # one after the other: the order of addition is fixed
                    total += difference[:, head]
                change_TD.index_copy_(0, write.rows.rows, total)
        rows = to_device(written, self.z.device, torch.long)
        self.change = rows, change_TD.index_select(0, rows)

    def _head(self, head: int) -> Tensor:
        product: Tensor = self.z[:, :, head] @ self.weight[head]
        return product


def with_change(product: Tensor, change: tuple[Tensor, Tensor] | None) -> Tensor:
    """`[1, T, D]` of the projection with the changes of some rows; the same object without any."""
    if change is None:
        return product
    rows, added = change
    changed = (product.index_select(1, rows).float() + added).to(product.dtype)
    return product.index_copy(1, rows, changed)
