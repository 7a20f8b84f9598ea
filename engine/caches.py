"""Caches: keys and values of sequences that grow, each in one piece, those of like room side by side.

Owns where they lie. A *slab* has, for every layer, some slots of equal room; a cache has the same slot at all
layers. So what many sequences attend to at a layer is one tensor with strides, and nothing of it is copied to be read.
On a CPU attention is computed in float32, and so slots are float32 there: each number is widened once, which is exact.

Values of a slot are numbers everywhere, also where nothing has been put: what no row sees has weight zero. Slots count
as held from when they are first used until their slab is gone, which is when it is empty, or when what is in it has
moved closer together (`pack`). Before they are used a CPU has no memory for them; on a GPU all of a slab's count.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from heapq import heappop, heappush

import torch
from torch import Tensor

from polytrace.errors import CapacityError, ServiceError
from scheduling.plan import Grow, RequestId, TrunkId

# S = slots of a slab, G = key/value heads, P = positions of a slot, C = dimension of a key's head, U = of a value's,
# N = positions of a cache

# Of a slab. A CPU's memory comes with its first use; a GPU's is taken at once, and nothing there reads many slots.
_CPU_SLOTS, _GPU_SLOTS = 32, 8


@dataclass(slots=True)
class Layer:
    """One slab's slots at one layer."""

    keys_SGPC: Tensor
    values_SGPU: Tensor
    odd: set[int] = field(default_factory=set)  # slots with values that are not finite

    @property
    def slot_bytes(self) -> int:
        return (self.keys_SGPC.nbytes + self.values_SGPU.nbytes) // self.keys_SGPC.shape[0]


class Slab:
    """Slots of equal room."""

    def __init__(self, capacity: int, num_slots: int) -> None:
        self.capacity = capacity  # P
        self.num_slots = num_slots
        self.layers: dict[int, Layer] = {}
        self.num_touched = 0  # slots that have been used since the slab was made
        self.free = list(range(num_slots))  # a heap: the first is used first, so that those in use lie close

    @property
    def is_empty(self) -> bool:
        return len(self.free) == self.num_slots

    @property
    def slot_bytes(self) -> int:
        """Of all layers."""
        return sum(layer.slot_bytes for layer in self.layers.values())

    @property
    def held_bytes(self) -> int:
        return self.num_touched * self.slot_bytes


@dataclass(frozen=True, slots=True)
class Cache:
    """Where one sequence's keys and values are."""

    slab: Slab
    slot: int
    begin: int  # its first position


class Caches:
    """All caches of a shard."""

    def __init__(self, take: Callable[[int], None], give: Callable[[int], None], device: torch.device) -> None:
        """`take` counts bytes as held or raises CapacityError, `give` gives them back."""
        self._take, self._give = take, give
        self._is_cpu = device.type == "cpu"
        self.num_slots = _CPU_SLOTS if self._is_cpu else _GPU_SLOTS
        self._slabs: dict[int, list[Slab]] = {}  # by capacity
        self._caches: dict[RequestId, dict[TrunkId, Cache]] = {}

    def __contains__(self, trunk: TrunkId) -> bool:
        return trunk in self._caches.get(trunk[0], {})

    def of(self, trunk: TrunkId) -> Cache:
        return self._caches[trunk[0]][trunk]

    def hold(self, grow: Grow) -> Cache:
        """The cache that rows go into, made when it is not there, moved when it has not the room."""
        own = self._caches.setdefault(grow.trunk[0], {})
        held = own.get(grow.trunk)
        if held is not None and held.begin != grow.begin:
            raise ServiceError(f"a cache begins at position {held.begin}; rows from {grow.begin} on are to go into it")
        if held is None or grow.capacity > held.slab.capacity:
            moved = self._new(grow.capacity, grow.begin, held)
            if held is not None:
                self._leave(held)
            own[grow.trunk] = held = moved
        return held

    def layer(self, slab: Slab, layer: int, key_GTC: Tensor, value_GTC: Tensor) -> Layer:
        """A slab's slots at a layer, made at the first use for keys and values like these."""
        found = slab.layers.get(layer)
        if found is None:
            shape = (slab.num_slots, key_GTC.shape[0], slab.capacity)
            dtypes = [torch.float32 if self._is_cpu else one.dtype for one in (key_GTC, value_GTC)]
            keys = key_GTC.new_empty(*shape, key_GTC.shape[2], dtype=dtypes[0])
            values = value_GTC.new_empty(*shape, value_GTC.shape[2], dtype=dtypes[1])
            found = Layer(keys, values)
            self._take(slab.num_touched * found.slot_bytes)
            values[: slab.num_touched].zero_()
            slab.layers[layer] = found
        return found

    def rows(self, trunk: TrunkId, layer: int, count: int) -> tuple[Tensor, Tensor]:
        """Keys and values `[G, N, C]` of a cache's first positions, where they are."""
        cache = self.of(trunk)
        held = cache.slab.layers[layer]
        return held.keys_SGPC[cache.slot, :, :count], held.values_SGPU[cache.slot, :, :count]

    def forget(self, request: RequestId) -> None:
        """Drops a request's caches; unknown ones are fine."""
        for cache in self._caches.pop(request, {}).values():
            self._leave(cache)

    def pack(self) -> None:
        """Moves caches closer together where many slots are held that none has; between two passes only."""
        for capacity, slabs in list(self._slabs.items()):
            num_used = sum(slab.num_slots - len(slab.free) for slab in slabs)
            if sum(slab.num_touched for slab in slabs) <= num_used + num_used // 2:
                continue
            self._give(sum(slab.held_bytes for slab in slabs))
            self._slabs[capacity] = []
            for own in self._caches.values():
                for trunk, cache in list(own.items()):
                    if cache.slab.capacity == capacity:
                        own[trunk] = self._new(capacity, cache.begin, cache)

    def reset(self) -> None:
        """Drops all caches."""
        self._give(sum(slab.held_bytes for slabs in self._slabs.values() for slab in slabs))
        self._slabs.clear()
        self._caches.clear()

    def _new(self, capacity: int, begin: int, old: Cache | None) -> Cache:
        slabs = self._slabs.setdefault(capacity, [])
        slab = next((slab for slab in slabs if slab.free), None)
        if slab is None:
            slab = Slab(capacity, self.num_slots)
            slab.num_touched = 0 if self._is_cpu else self.num_slots
            slabs.append(slab)
        slot = slab.free[0]
        if slot >= slab.num_touched:
            self._take(slab.slot_bytes)
            slab.num_touched = slot + 1
        cache = Cache(slab, heappop(slab.free), begin)
        for layer in slab.layers.values():
            layer.values_SGPU[slot].zero_()
        if old is not None:
            try:
                self._move(old, cache)
            except CapacityError:
                self._leave(cache)
                raise
        return cache

    def _move(self, old: Cache, new: Cache) -> None:
        for number, before in old.slab.layers.items():
            after = self.layer(new.slab, number, before.keys_SGPC[0], before.values_SGPU[0])
            after.keys_SGPC[new.slot, :, : old.slab.capacity] = before.keys_SGPC[old.slot]
            after.values_SGPU[new.slot, :, : old.slab.capacity] = before.values_SGPU[old.slot]
            if old.slot in before.odd:
                after.odd.add(new.slot)

    def _leave(self, cache: Cache) -> None:
        slab = cache.slab
        for layer in slab.layers.values():
            layer.odd.discard(cache.slot)
        heappush(slab.free, cache.slot)
        if slab.is_empty:
            self._give(slab.held_bytes)
            slabs = self._slabs[slab.capacity]
            slabs.remove(slab)
            if not slabs:
                del self._slabs[slab.capacity]
