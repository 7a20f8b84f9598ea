from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.spans import Span, SpanStore
from polytrace.errors import CapacityError
from scheduling.plan import PassId, RequestId, TrunkId

PASS, SWEEP, OTHER = PassId(1), RequestId("sweep"), RequestId("other")


def rows_of(count: int, first: float = 0.0) -> tuple[Tensor, Tensor]:
    """Keys and values `[2, count, 4]`: 64 bytes a row, both together."""
    keys = torch.arange(first, first + count).repeat_interleave(4).view(1, count, 4).expand(2, -1, -1).contiguous()
    return keys, -keys


def test_spans_are_read_one_after_another() -> None:
    store = SpanStore(1 << 20)
    store.put(0, PASS, *rows_of(8))
    keys, values = store.read(0, (Span(PASS, 6, 8), Span(PASS, 1, 2)))
    assert keys[0, :, 0].tolist() == [6, 7, 1]
    assert torch.equal(values, -keys)


def test_what_is_kept_outlives_the_pass_and_ends_with_its_request() -> None:
    store = SpanStore(1 << 20)
    first, second, others = TrunkId((SWEEP, 0)), TrunkId((SWEEP, 1)), TrunkId((OTHER, 0))
    store.put(3, PASS, *rows_of(8))
    store.keep_keys(first, 3, *rows_of(2))
    store.keep_keys(second, 3, *rows_of(3, 5.0))
    store.keep_output(first, 3, torch.ones(2, 16))
    store.keep_keys(others, 3, *rows_of(1, 9.0))
    store.clear()
    assert store.held_bytes == 64 * (2 + 3 + 1) + 2 * 16 * 4
    assert store.kept_keys(second, 3)[0][0, :, 0].tolist() == [5, 6, 7]
    assert store.kept_output(first, 3).shape == (2, 16)
    store.forget(SWEEP)
    store.forget(SWEEP)  # unknown by now
    assert store.held_bytes == 64
    assert store.kept_keys(others, 3)[0][0, :, 0].tolist() == [9]
    with pytest.raises(KeyError):
        store.kept_keys(first, 3)


def test_what_exceeds_the_budget_is_refused_and_counts_for_nothing() -> None:
    store = SpanStore(64 * 10)
    trunk = TrunkId((SWEEP, 0))
    store.keep_keys(trunk, 0, *rows_of(6))
    with pytest.raises(CapacityError, match="need 320 bytes a layer; the store holds 384 of 640"):
        store.put(0, PASS, *rows_of(5))
    with pytest.raises(CapacityError):
        store.keep_keys(trunk, 1, *rows_of(5))
    assert store.held_bytes == 64 * 6
    store.put(0, PASS, *rows_of(4))
    store.forget(SWEEP)
    assert store.held_bytes == 64 * 4
