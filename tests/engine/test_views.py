"""Views of the packed stream, against hand-written padding."""

from __future__ import annotations

import torch

from engine.views import all_rows, kept_rows
from scheduling.plan import View

CPU = torch.device("cpu")


def view(lengths: tuple[int, ...], start: int = 0, kept: tuple[int, ...] = (), kept_start: int = 0) -> View:
    return View(member=0, invoke=0, start=start, lengths=lengths, kept_columns=kept, kept_start=kept_start)


def test_equal_lengths_alias_the_stream() -> None:
    packed = torch.arange(20.0).view(1, 10, 2)
    value = all_rows(view((3, 3), start=2), CPU).read(packed)
    assert value.shape == (2, 3, 2)
    assert value.untyped_storage().data_ptr() == packed.untyped_storage().data_ptr()
    assert torch.equal(value.flatten(0, 1), packed[0, 2:8])


def test_ragged_views_are_left_padded_with_zeros() -> None:
    packed = torch.arange(1.0, 21.0).view(1, 10, 2)
    value = all_rows(view((1, 3), start=4), CPU).read(packed)
    expected = torch.zeros(2, 3, 2)
    expected[0, 2:] = packed[0, 4:5]
    expected[1] = packed[0, 5:8]
    assert torch.equal(value, expected)


def test_writes_reach_only_the_views_own_rows_and_pads_vanish() -> None:
    packed = torch.zeros(1, 10, 2)
    all_rows(view((1, 3), start=4), CPU).write(packed, torch.ones(2, 3, 2))
    assert packed[0, :, 0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 0, 0]


def test_kept_columns_skip_pads() -> None:
    packed = torch.arange(1.0, 7.0).view(1, 6, 1)  # rows the head ran on: one of the first sequence, two of the second
    value = kept_rows(view((1, 3), kept=(1, 2), kept_start=3), CPU).read(packed)
    assert value[..., 0].tolist() == [[0, 4], [5, 6]]
