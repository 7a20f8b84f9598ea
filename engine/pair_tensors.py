"""Scores or patterns that a family's own formula has as a tensor, seen as those of the engine's attention are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.copies import to_device
from engine.points import Pairs

# R = rows asked for, T = tokens of the sequence, H = heads, K = positions of keys


class TensorPairs(Pairs):
    """`[1, H, T, T]` of one sequence. What a query does not see reads as masked, whatever the formula has there."""

    def __init__(self, tensor_1HTT: Tensor, masked: float) -> None:
        super().__init__([], masked, tensor_1HTT.shape[1], 1, tensor_1HTT.device)
        self.tensor = tensor_1HTT  # a copy from the first write on

    def read(self, rows: Sequence[int], num_keys: int) -> Tensor:
        """As `Pairs.read`."""
        width = min(num_keys, self.tensor.shape[3])
        out_RHK = torch.full((len(rows), self.num_groups, num_keys), self.masked, device=self.device)
        here = to_device(rows, self.device, torch.long)
        out_RHK[:, :, :width] = self.tensor[0].index_select(1, here)[:, :, :width].transpose(0, 1)
        return out_RHK.masked_fill_(self._is_later(here, num_keys)[:, None], self.masked)

    def write(self, rows: Sequence[int], values_RHK: Tensor) -> None:
        """As `Pairs.write`."""
        if not self.written:
            self.tensor = self.tensor.clone()
        self.written.update(rows)
        here = to_device(rows, self.device, torch.long)
        before_RHT = self.tensor[0].index_select(1, here).transpose(0, 1)
        width = min(values_RHK.shape[2], before_RHT.shape[2])
        after_RHT = before_RHT.clone()
        after_RHT[:, :, :width] = values_RHK[:, :, :width].to(before_RHT.dtype)
        after_RHT = torch.where(self._is_later(here, before_RHT.shape[2])[:, None], before_RHT, after_RHT)
        self.tensor[0].index_copy_(1, here, after_RHT.transpose(0, 1))

    def _is_later(self, queries: Tensor, num_keys: int) -> Tensor:
        return torch.arange(num_keys, device=self.device) > queries[:, None]
