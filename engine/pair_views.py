"""How a request sees scores and patterns: `[sequences, heads, columns, longest]`, queries and keys left-padded alike.

Owns the way between a layer's `Pairs`, whose keys are counted from each sequence's first token, and an invoke's view,
whose columns are counted from its longest sequence's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.copies import to_device
from engine.points import Pairs
from engine.views import RowView
from scheduling.plan import View

# R = cells of a view that have rows, H = heads here, K = columns of keys


def read_pairs(pairs: Pairs, rows: RowView, view: View, before: int = 0) -> Tensor:
    """`[sequences, H, columns, K]`; rows of pads read 0, keys of pads as those that a query does not see.

    `before`: positions of each sequence before the view's columns, which are keys as well.
    """
    num_sequences, num_columns = rows.shape
    read_RHK = pairs.read(rows.numbers, before + max(view.lengths))
    read_RHK = _shifted(read_RHK, _pads(rows, view, before), pairs.masked)
    if rows.is_whole:
        cells = read_RHK
    else:
        cells = read_RHK.new_zeros(num_sequences * num_columns, *read_RHK.shape[1:])
        cells.index_copy_(0, rows.cells, read_RHK)
    view_shaped: Tensor = cells.unflatten(0, (num_sequences, num_columns)).transpose(1, 2).contiguous()
    return view_shaped


def pairs_of(value: Tensor, rows: RowView, view: View, pairs: Pairs, before: int = 0) -> Tensor:
    """A view's value as `Pairs.write` takes it: `[R, H, K]`, keys by their position."""
    pads = _pads(rows, view, before)
    return _shifted(rows.part(value.transpose(1, 2)), None if pads is None else -pads, pairs.masked)


def check_pairs(value: Tensor, columns: Sequence[int], view: View, pairs: Pairs, before: int = 0) -> None:
    """ValueError when a query of a view's columns gets something for a key behind it: rows only see earlier ones.

    What is written to the queries of pads vanishes, whatever it is.
    """
    queries = to_device(columns, value.device, torch.long)
    is_later = torch.arange(value.shape[3], device=value.device) > queries[:, None] + before
    first = to_device([max(view.lengths) - length for length in view.lengths], value.device, torch.long)
    is_row = queries >= first[:, None]
    wrong = (value != pairs.masked) & is_later & is_row[:, None, :, None]
    if bool(wrong.any()):  # waits for the device, for those alone who write here
        place = tuple(wrong.nonzero()[0].tolist())
        raise ValueError(
            f"the value gives {float(value[place]):g} to the query at column {columns[place[2]]} for the key at column "
            f"{place[3]}, which comes later: that must stay {pairs.masked:g}"
        )


def _pads(rows: RowView, view: View, before: int) -> Tensor | None:
    """`[R]`: columns before each row's sequence begins; None when there are none."""
    width, begins = before + max(view.lengths), view.begins if before else (0,) * len(view.lengths)
    pads = [width - begin - length for begin, length in zip(begins, view.lengths, strict=True)]
    of_rows = [pads[place // rows.shape[1]] for place in rows.places]
    return to_device(of_rows, rows.device, torch.long) if any(of_rows) else None


def _shifted(values_RHK: Tensor, by_R: Tensor | None, fill: float) -> Tensor:
    """Each row's keys moved by so many places to later columns."""
    if by_R is None:
        return values_RHK
    num_keys = values_RHK.shape[2]
    source_RK = torch.arange(num_keys, device=values_RHK.device) - by_R[:, None]
    is_there = (source_RK >= 0) & (source_RK < num_keys)
    index_RHK = source_RK.clamp(0, num_keys - 1)[:, None].expand_as(values_RHK)
    return values_RHK.gather(2, index_RHK).masked_fill(~is_there[:, None], fill)
