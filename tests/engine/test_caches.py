"""Where caches lie, what they cost, and what is left of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.spans import SpanStore
from polytrace.errors import CapacityError, ServiceError
from scheduling.plan import Grow, RequestId, TrunkId

OURS, THEIRS = RequestId("ours"), RequestId("theirs")
LAYERS = (2, 5)
SLOTS = SpanStore(0).caches.num_slots
POSITION_BYTES = 2 * 2 * 4 * 4  # keys and values, heads, dimension, float32


def grow(request: RequestId, number: int, capacity: int = 32, begin: int = 0) -> Grow:
    trunk = TrunkId((request, -1 - number))
    return Grow(trunk=trunk, segment=0, begin=begin, start=begin, stop=begin + 1, capacity=capacity)


def rows(count: int, first: float = 0.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """`[2, count, 4]`."""
    return torch.arange(first, first + count).to(dtype).repeat_interleave(4).view(1, count, 4).repeat(2, 1, 1)


def fill(store: SpanStore, one: Grow, first: float, dtype: torch.dtype = torch.float32) -> None:
    """Holds a cache and gives all of its positions numbers from `first` on."""
    cache = store.caches.hold(one)
    for number in LAYERS:
        layer = store.caches.layer(cache.slab, number, rows(1, dtype=dtype), rows(1, dtype=dtype))
        layer.keys_SGPC[cache.slot] = rows(cache.slab.capacity, first + number)
        layer.values_SGPU[cache.slot] = -rows(cache.slab.capacity, first + number)


def test_caches_of_equal_room_lie_side_by_side_in_float32() -> None:
    store = SpanStore(1 << 22)
    for number in range(3):
        fill(store, grow(OURS, number), 100.0 * number, torch.bfloat16)
    caches = [store.caches.of(grow(OURS, number).trunk) for number in range(3)]
    assert [cache.slot for cache in caches] == [0, 1, 2]
    assert caches[0].slab is caches[1].slab is caches[2].slab
    layer = caches[0].slab.layers[5]
    assert layer.keys_SGPC.dtype == torch.float32
    assert layer.keys_SGPC[:3, 1, 7, 0].tolist() == [12, 112, 212]
    keys, values = store.caches.rows(grow(OURS, 1).trunk, 2, 3)
    assert keys[0, :, 0].tolist() == [102, 103, 104] and torch.equal(values, -keys)
    assert store.held_bytes == 3 * len(LAYERS) * 32 * POSITION_BYTES


def test_a_slot_that_is_used_again_has_no_values_of_before() -> None:
    store = SpanStore(1 << 22)
    fill(store, grow(THEIRS, 0), 1.0)
    fill(store, grow(OURS, 0), 1.0)
    store.forget(THEIRS)
    held = store.held_bytes
    cache = store.caches.hold(grow(OURS, 1))
    assert cache.slot == 0 and not any(bool(layer.values_SGPU[0].any()) for layer in cache.slab.layers.values())
    assert store.held_bytes == held, "the slot had been counted"


def test_a_cache_that_gets_more_room_keeps_what_it_has() -> None:
    store = SpanStore(1 << 22)
    fill(store, grow(OURS, 0), 1.0)
    store.caches.of(grow(OURS, 0).trunk).slab.layers[2].odd.add(0)
    moved = store.caches.hold(grow(OURS, 0, capacity=96))
    assert moved.slab.capacity == 96
    keys, values = store.caches.rows(grow(OURS, 0).trunk, 2, 96)
    assert keys[0, :32, 0].tolist() == [3.0 + place for place in range(32)]
    assert torch.equal(values[:, :32], -keys[:, :32]) and not values[:, 32:].any()
    assert [layer.odd for layer in moved.slab.layers.values()] == [{0}, set()]
    assert store.held_bytes == len(LAYERS) * 96 * POSITION_BYTES, "the smaller slab is gone"
    assert store.caches.hold(grow(OURS, 0)) is moved, "less room is asked for later"


def test_a_cache_does_not_begin_elsewhere_later() -> None:
    store = SpanStore(1 << 22)
    store.caches.hold(grow(OURS, 0))
    with pytest.raises(ServiceError, match="begins at position 0; rows from 32 on"):
        store.caches.hold(grow(OURS, 0, begin=32))


def test_forgetting_a_request_frees_all_it_has_and_nothing_of_others() -> None:
    store = SpanStore(1 << 22)
    for number in range(SLOTS + 3):
        fill(store, grow(OURS, number), 0.0)
    fill(store, grow(THEIRS, 0, capacity=64), 7.0)
    store.forget(OURS)
    store.forget(OURS)  # unknown by now
    assert store.held_bytes == len(LAYERS) * 64 * POSITION_BYTES
    assert store.caches.rows(grow(THEIRS, 0).trunk, 2, 1)[0].flatten()[0] == 9
    assert grow(OURS, 0).trunk not in store.caches
    store.forget(THEIRS)
    assert store.held_bytes == 0


def test_a_thousand_short_ones_leave_nothing() -> None:
    store = SpanStore(1 << 22)
    for number in range(1000):
        fill(store, grow(RequestId(str(number)), 0, capacity=32 * (1 + number % 3)), 0.0)
        store.forget(RequestId(str(number - 5)))
    for number in range(995, 1000):
        store.forget(RequestId(str(number)))
    assert store.held_bytes == 0 and not store.caches._slabs and not any(store.caches._caches.values())


def test_what_exceeds_the_budget_is_refused_and_counts_for_nothing() -> None:
    one = len(LAYERS) * 32 * POSITION_BYTES
    store = SpanStore(3 * one)
    for number in range(2):
        fill(store, grow(OURS, number), 0.0)
    with pytest.raises(CapacityError, match=f"of {3 * one:,}"):
        store.caches.hold(grow(OURS, 0, capacity=64))
    assert store.held_bytes == 2 * one
    fill(store, grow(OURS, 2), 0.0)
    with pytest.raises(CapacityError):
        store.caches.hold(grow(OURS, 3))
    store.forget(OURS)
    assert store.held_bytes == 0
    fill(store, grow(OURS, 0), 0.0)
    store.reset()
    assert store.held_bytes == 0


def test_the_store_forgets_all_caches_at_once() -> None:
    store = SpanStore(1 << 22)
    fill(store, grow(OURS, 0), 0.0)
    fill(store, grow(THEIRS, 0, capacity=64), 0.0)
    store.reset()
    assert store.held_bytes == 0 and grow(OURS, 0).trunk not in store.caches


def test_where_memory_is_short_caches_move_into_slots_that_others_left() -> None:
    one = len(LAYERS) * 32 * POSITION_BYTES
    store = SpanStore((2 * SLOTS) * one)
    for number in range(SLOTS + 4):
        fill(store, grow(RequestId(str(number)), 0), 10.0 * number)
    stay = (3, 9, SLOTS + 2)
    store.caches.of(grow(RequestId(str(stay[2])), 0).trunk).slab.layers[5].odd.add(2)
    for number in range(SLOTS + 4):
        if number not in stay:
            store.forget(RequestId(str(number)))
    assert store.held_bytes == (SLOTS + 4) * one
    store.hold([])
    assert store.held_bytes == 3 * one
    caches = [store.caches.of(grow(RequestId(str(number)), 0).trunk) for number in stay]
    assert sorted(cache.slot for cache in caches) == [0, 1, 2] and len({id(cache.slab) for cache in caches}) == 1
    for number, cache in zip(stay, caches, strict=True):
        layer = cache.slab.layers[5]
        assert layer.keys_SGPC[cache.slot, 1, :3, 0].tolist() == [10.0 * number + 5 + place for place in range(3)]
        assert (cache.slot in layer.odd) == (number == stay[2])
    store.hold([])
    assert store.caches.of(grow(RequestId("3"), 0).trunk) is caches[0], "nothing more to gain"
    for number in stay:
        store.forget(RequestId(str(number)))
    assert store.held_bytes == 0
