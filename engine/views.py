"""How a request sees its rows: views of the packed stream shaped as if it ran alone.

Owns the way from packed rows `[1, R, *tail]` to `[sequences, columns, *tail]` and back, for one invoke of one member
and for one of the two row spaces (all rows, or the rows kept for the head). Sequences of equal length need no copy;
ragged ones are left-padded with zeros, and what is written on pads vanishes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from scheduling.plan import View


@dataclass(frozen=True, slots=True, kw_only=True)
class RowView:
    """The rows of one invoke in one row space of a pass."""

    start: int  # first row
    num_sequences: int
    num_columns: int
    rows: Tensor | None  # [real] rows of the stream, None when every column is real: then rows are contiguous
    cells: Tensor | None  # [real] flat indices into sequences x columns of those rows

    def read(self, packed: Tensor) -> Tensor:
        """`[sequences, columns, *tail]`: aliases `packed` when nothing is padded, else a padded copy."""
        if self.rows is None or self.cells is None:
            rows = packed[0, self.start : self.start + self.num_sequences * self.num_columns]
            return rows.view(self.num_sequences, self.num_columns, *packed.shape[2:])
        out = packed.new_zeros(self.num_sequences * self.num_columns, *packed.shape[2:])
        out.index_copy_(0, self.cells, packed[0].index_select(0, self.rows))
        return out.view(self.num_sequences, self.num_columns, *packed.shape[2:])

    def write(self, packed: Tensor, value: Tensor) -> None:
        """Puts a value of the view's shape into the packed rows, in place."""
        flat = value.flatten(0, 1)
        if self.rows is None or self.cells is None:
            packed[0, self.start : self.start + self.num_sequences * self.num_columns].copy_(flat)
        else:
            packed[0].index_copy_(0, self.rows, flat.index_select(0, self.cells))


def all_rows(view: View, device: torch.device) -> RowView:
    """The invoke's rows at sites that have every row of the stream."""
    return _row_view(view.start, view.lengths, range(max(view.lengths)), device)


def kept_rows(view: View, device: torch.device) -> RowView:
    """The invoke's rows at sites that have the kept rows only; columns are the kept ones."""
    return _row_view(view.kept_start, view.lengths, view.kept_columns, device)


def _row_view(start: int, lengths: tuple[int, ...], columns: range | tuple[int, ...], device: torch.device) -> RowView:
    longest = max(lengths)
    num_columns = len(columns)
    real = [
        sequence * num_columns + place
        for sequence, length in enumerate(lengths)
        for place, column in enumerate(columns)
        if column >= longest - length
    ]
    is_padded = len(real) < len(lengths) * num_columns
    return RowView(
        start=start,
        num_sequences=len(lengths),
        num_columns=num_columns,
        rows=torch.arange(start, start + len(real), device=device) if is_padded else None,
        cells=torch.tensor(real, dtype=torch.long, device=device) if is_padded else None,
    )
