"""What a loss was made of: which values and which prompts can have a gradient of it.

Known from the nodes alone, as far as they tell: a value that reaches a loss through the model does so where its site
comes before one that the loss was read from. Whoever differentiates (the service) knows it exactly.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from polytrace.graph import Call, Constant, Grad, NodeId, Op, Read, Site, Write, operands

if TYPE_CHECKING:
    from polytrace.recording import Recording

# The order of a site that the description does not tell of (a call inside of a forward): before any, or behind all.
_FIRST, _LAST = -1, 1 << 62


@dataclass(slots=True, eq=False)
class Lineage:
    """What one loss was made of."""

    nodes: set[NodeId]
    last: dict[int, int] = field(default_factory=dict)  # by invoke: the order of the last site that it depends on
    is_of_gradients: bool = False  # gradients are among it, which are no functions of anything here
    is_detached: bool = False  # something was recorded under torch.no_grad()
    num_writes: int = 0  # that had been recorded to these invokes


class Lineages:
    """Of one recording."""

    def __init__(self, recording: Recording) -> None:
        self._recording = recording
        self._orders = {(info.module, info.port, info.visit): info.order for info in recording.description.sites}
        self._known: dict[NodeId, Lineage] = {}
        self._writes: dict[int, list[tuple[int, NodeId]]] = {}  # by invoke: with the order of the site
        self._looked = 0  # nodes among which writes have been looked for

    def of(self, loss: NodeId) -> Lineage:
        """What a loss depends on, with every write that was recorded so far."""
        self._find_writes()
        found = self._known.get(loss)
        if found is None or found.num_writes != self._count(found):
            found = self._known[loss] = self._find(loss)
        return found

    def has(self, lineage: Lineage, node: NodeId) -> bool:
        """Whether a loss can depend on a value."""
        if node in lineage.nodes:
            return True
        made = self._recording.nodes[node]
        return isinstance(made, Read) and self._order(made.site, _FIRST) < lineage.last.get(made.invoke, _FIRST)

    def _find(self, loss: NodeId) -> Lineage:
        found, waiting = Lineage({loss}), [loss]
        nodes = self._recording.nodes
        while waiting:
            node = waiting.pop()
            made = nodes[node]
            parts: list[NodeId] = []
            if isinstance(made, Grad):
                found.is_of_gradients = True
            elif isinstance(made, (Op, Call)) and self._recording.gradients.detaching.has(node):
                found.is_detached = True
            elif isinstance(made, Read):
                parts = list(self._written_before(found, made))
            elif isinstance(made, (Op, Call, Write, Constant)) and getattr(made, "name", "") != "detach":
                parts = [part for part in operands(made) if self._recording.facts.dtypes.of(part) not in _DISCRETE]
            fresh = [part for part in parts if part not in found.nodes]
            found.nodes.update(fresh)
            waiting += fresh
        found.num_writes = self._count(found)
        return found

    def _written_before(self, lineage: Lineage, read: Read) -> Iterator[NodeId]:
        order, before = self._order(read.site, _LAST), lineage.last.get(read.invoke, _FIRST)
        if order > before:
            lineage.last[read.invoke] = order
            yield from (write for place, write in self._writes.get(read.invoke, ()) if place <= order)

    def _find_writes(self) -> None:
        nodes = self._recording.nodes
        for place in range(self._looked, len(nodes)):
            made = nodes[place]
            if isinstance(made, Write):
                self._writes.setdefault(made.invoke, []).append((self._order(made.site, _FIRST), NodeId(place)))
        self._looked = len(nodes)

    def _count(self, lineage: Lineage) -> int:
        return sum(len(self._writes.get(invoke, ())) for invoke in lineage.last)

    def _order(self, site: Site, unknown: int) -> int:
        return self._orders.get((site.module, site.port, site.visit), unknown)


_DISCRETE = frozenset(("int64", "int32", "int16", "int8", "uint8", "bool"))
