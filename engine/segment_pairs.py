"""Scores or patterns of whole sequences of a pass, each as a tensor: in passes whose gradients are run back."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from engine.copies import to_device
from engine.points import Pairs

# L = tokens of one sequence, H = heads, R = rows asked for, K = positions of keys


class SegmentPairs(Pairs):
    """`[H, L, L]` of each sequence; rows are the stream's."""

    def __init__(
        self, starts: Sequence[int], parts: Sequence[Tensor], masked: float, num_groups: int, sinks_H: Tensor | None
    ) -> None:
        """`starts`: the first row of each sequence, ascending."""
        super().__init__([], masked, num_groups, parts[0].shape[0] // num_groups, parts[0].device)
        self.sinks_H = sinks_H
        self.starts = starts
        self.parts = list(parts)  # copies from the first write on

    def read(self, rows: Sequence[int], num_keys: int) -> Tensor:
        """As `Pairs.read`."""
        out_RHK = torch.full(
            (len(rows), self.num_groups * self.share, num_keys), self.masked, device=self.device, dtype=torch.float32
        )
        for part, places, queries in self._by_sequence(rows):
            width = min(num_keys, self.parts[part].shape[2])
            out_RHK[places, :, :width] = self.parts[part][:, queries, :width].transpose(0, 1)
        return out_RHK

    def write(self, rows: Sequence[int], values_RHK: Tensor) -> None:
        """As `Pairs.write`."""
        for part, places, queries in self._by_sequence(rows):
            after = self.parts[part].clone()
            width = min(values_RHK.shape[2], after.shape[2])
            after[:, queries, :width] = values_RHK[places, :, :width].transpose(0, 1)
            self.parts[part] = after
        self.written.update(rows)

    def _by_sequence(self, rows: Sequence[int]) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Per sequence that has some of the rows: it, their places among the rows, and which queries they are."""
        found: dict[int, list[tuple[int, int]]] = {}
        for place, row in enumerate(rows):
            part = bisect_right(self.starts, row) - 1
            found.setdefault(part, []).append((place, row - self.starts[part]))
        for part, cells in found.items():
            places, queries = to_device(cells, self.device, torch.long).unbind(1)
            yield part, places, queries
