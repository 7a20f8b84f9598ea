"""Scores or patterns that a family's own formula has as a tensor, seen as those of the engine's attention are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.copies import to_device
from engine.points import Pairs

# R = rows asked for, T = tokens of the sequence in this pass, H = heads, K = positions of keys, W = keys there


class TensorPairs(Pairs):
    """`[1, H, T, W]` of one sequence. What a query does not see reads as masked, whatever the formula has there.

    The W keys are the last ones up to the last query; the first query has the position `begin`.
    """

    def __init__(self, tensor_1HTW: Tensor, masked: float, begin: int = 0) -> None:
        super().__init__([], masked, tensor_1HTW.shape[1], 1, tensor_1HTW.device)
        self.tensor = tensor_1HTW  # a copy from the first write on
        self._begin = begin
        self._first = max(0, begin + tensor_1HTW.shape[2] - tensor_1HTW.shape[3])  # position of the first key

    def read(self, rows: Sequence[int], num_keys: int) -> Tensor:
        """As `Pairs.read`."""
        width = max(0, min(num_keys - self._first, self.tensor.shape[3]))
        out_RHK = torch.full((len(rows), self.num_groups, num_keys), self.masked, device=self.device)
        here = to_device(rows, self.device, torch.long)
        taken_RHW = self.tensor[0].index_select(1, here)[:, :, :width].transpose(0, 1)
        out_RHK[:, :, self._first : self._first + width] = taken_RHW
        return out_RHK.masked_fill_(self._is_later(here, num_keys)[:, None], self.masked)

    def write(self, rows: Sequence[int], values_RHK: Tensor) -> None:
        """As `Pairs.write`."""
        if not self.written:
            self.tensor = self.tensor.clone()
        self.written.update(rows)
        here = to_device(rows, self.device, torch.long)
        before_RHW = self.tensor[0].index_select(1, here).transpose(0, 1)
        first = self._first
        width = max(0, min(values_RHK.shape[2] - first, before_RHW.shape[2]))
        after_RHW = before_RHW.clone()
        after_RHW[:, :, :width] = values_RHK[:, :, first : first + width].to(before_RHW.dtype)
        is_later = self._is_later(here, first + before_RHW.shape[2])[:, first:]
        after_RHW = torch.where(is_later[:, None], before_RHW, after_RHW)
        self.tensor[0].index_copy_(1, here, after_RHW.transpose(0, 1))

    def _is_later(self, queries: Tensor, num_keys: int) -> Tensor:
        return torch.arange(num_keys, device=self.device) > self._begin + queries[:, None]
