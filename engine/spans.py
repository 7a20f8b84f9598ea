"""Keys and values by layer, read only through spans, within a byte budget.

Owns what attention may look back at. A *block* is what one pass put down at one layer: all its rows, in the order of
the packed stream. Whoever attends names spans of it (block, start, stop), in token order: of its own rows and of those
that it forks from.

Invariant: bytes held never exceed the budget; a block that nobody retains is gone as soon as its layer has attended.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.caches import Caches
from engine.own_caches import OwnCaches
from polytrace.errors import CapacityError
from scheduling.plan import Grow, PassId, RequestId, TrunkId

# R = rows of a block or of a trunk, D = hidden, G = key/value heads, C = head dimension


@dataclass(frozen=True, slots=True)
class Span:
    """Rows of one block."""

    block: PassId  # the pass that put them there
    start: int  # row
    stop: int


class SpanStore:
    """The key/value store of one shard."""

    def __init__(self, budget_bytes: int, device: torch.device | None = None) -> None:
        """`device`: where the shard is, None: on a CPU."""
        self.budget_bytes = budget_bytes
        self.held_bytes = 0
        self.given_bytes = 0  # since somebody set it to 0: the heap has them, if nobody else
        self.row_bytes = 0  # of one row of a block, at most
        self._blocks: dict[tuple[int, PassId], tuple[Tensor, Tensor]] = {}
        self._keys: dict[RequestId, dict[tuple[TrunkId, int], tuple[Tensor, Tensor]]] = {}  # by trunk and layer
        self._outputs: dict[RequestId, dict[tuple[TrunkId, int], Tensor]] = {}
        self.caches = Caches(self._take, self._give, device or torch.device("cpu"))
        self.own_caches = OwnCaches(self._take, self._give)  # of the padded layout

    def put(self, layer: int, block: PassId, key_GRC: Tensor, value_GRC: Tensor) -> None:
        """Takes (no copy) the keys and values of a pass at a layer; CapacityError when the budget would be exceeded."""
        num_bytes = key_GRC.nbytes + value_GRC.nbytes
        self._take(num_bytes)
        self.row_bytes = max(self.row_bytes, num_bytes // key_GRC.shape[1])
        self._blocks[layer, block] = (key_GRC, value_GRC)

    def read(self, layer: int, spans: tuple[Span, ...]) -> tuple[Tensor, Tensor]:
        """Keys and values `[G, rows, C]` of the spans one after another; one span is a view, several are joined."""
        parts = [
            (key_GRC[:, span.start : span.stop], value_GRC[:, span.start : span.stop])
            for span in spans
            for key_GRC, value_GRC in (self._blocks[layer, span.block],)
        ]
        if len(parts) == 1:
            return parts[0]
        return torch.cat([key for key, _ in parts], 1), torch.cat([value for _, value in parts], 1)

    def take(self, layer: int, block: PassId, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values `[G, rows, C]` of chosen rows of one block, copied."""
        key_GRC, value_GRC = self._blocks[layer, block]
        return key_GRC.index_select(1, rows), value_GRC.index_select(1, rows)

    def drop(self, layer: int, block: PassId) -> None:
        """Forgets a block at a layer; unknown blocks are fine."""
        held = self._blocks.pop((layer, block), None)
        if held is not None:
            self._give(held[0].nbytes + held[1].nbytes)

    def clear(self) -> None:
        """Forgets all blocks: the end of a pass, however it ended."""
        for layer, block in list(self._blocks):
            self.drop(layer, block)

    def keep_keys(self, trunk: TrunkId, layer: int, key_GRC: Tensor, value_GRC: Tensor) -> None:
        """Takes (no copy) a trunk's keys and values at a layer; CapacityError when the budget would be exceeded."""
        self._take(key_GRC.nbytes + value_GRC.nbytes)
        self._keys.setdefault(trunk[0], {})[trunk, layer] = (key_GRC, value_GRC)

    def keep_output(self, trunk: TrunkId, layer: int, output_RD: Tensor) -> None:
        """Takes (no copy) what a layer made of a trunk's rows; CapacityError when the budget would be exceeded."""
        self._take(output_RD.nbytes)
        self._outputs.setdefault(trunk[0], {})[trunk, layer] = output_RD

    def kept_keys(self, trunk: TrunkId, layer: int) -> tuple[Tensor, Tensor]:
        """A trunk's keys and values at a layer, `[G, R, C]`."""
        return self._keys[trunk[0]][trunk, layer]

    def kept_output(self, trunk: TrunkId, layer: int) -> Tensor:
        """What a layer made of a trunk's rows, `[R, D]`."""
        return self._outputs[trunk[0]][trunk, layer]

    def hold(self, grows: Sequence[Grow]) -> None:
        """Makes caches that a pass puts rows into, and moves those that need more room. Before the pass begins."""
        if self.held_bytes > self.budget_bytes // 4:
            self.caches.pack()
        for grow in grows:
            self.caches.hold(grow)

    def forget(self, request: RequestId) -> None:
        """Drops what is kept for a request; unknown ones are fine."""
        kept = [part for pair in self._keys.pop(request, {}).values() for part in pair]
        kept += self._outputs.pop(request, {}).values()
        self._give(sum(tensor.nbytes for tensor in kept))
        self.caches.forget(request)
        self.own_caches.forget(request)

    def reset(self) -> None:
        """Forgets everything, kept rows of requests included."""
        self.clear()
        for request in {*self._keys, *self._outputs}:
            self.forget(request)
        self.caches.reset()
        self.own_caches.reset()

    def _give(self, num_bytes: int) -> None:
        self.held_bytes -= num_bytes
        self.given_bytes += num_bytes

    def _take(self, num_bytes: int) -> None:
        if self.held_bytes + num_bytes > self.budget_bytes:
            raise CapacityError(
                f"keys and values of this pass need {num_bytes:,} bytes a layer; the store holds {self.held_bytes:,} "
                f"of {self.budget_bytes:,}: lower the pass's token budget or raise the store's"
            )
        self.held_bytes += num_bytes
