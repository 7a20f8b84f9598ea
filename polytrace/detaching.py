"""Detached values: of what is recorded under `torch.no_grad()`, where a program has gradients at all, and of gradients
where only shapes are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import overload

from polytrace.grammar import returns_several
from polytrace.graph import Backward, Call, Grad, Node, NodeId, Op, Ref, Save, operands
from polytrace.pruning import moved, renumber


class Detaching:
    """Of one recording."""

    def __init__(self) -> None:
        self.is_off: Callable[[], bool] | None = None  # whether torch's gradients are off now; None: there is no torch
        self._spans: list[list[int]] = []  # of nodes that were recorded while they were

    def note(self, place: NodeId) -> None:
        """Another node was recorded."""
        if self.is_off is not None and self.is_off():
            if self._spans and self._spans[-1][1] == place:
                self._spans[-1][1] = place + 1
            else:
                self._spans.append([place, place + 1])

    def has(self, node: NodeId) -> bool:
        """Whether a node was recorded while they were off."""
        return any(first <= node < stop for first, stop in reversed(self._spans))

    def nodes(self, nodes: tuple[Node, ...], places: Mapping[NodeId, NodeId]) -> tuple[Node, ...]:
        """The nodes that are left, with a `detach` behind each such that others use. `places`: where they are now."""
        if not self._spans or not any(isinstance(node, Backward) for node in nodes):
            return nodes
        inside = {place for old, place in places.items() if _is_computed(nodes[place]) and self.has(old)}
        cut: dict[NodeId, NodeId] = {}  # nodes -> their detached values, behind all others for now
        changed: list[Node] = []
        for place, node in enumerate(nodes):
            is_same = isinstance(node, Save) or place in inside
            used = [] if is_same else [part for part in operands(node) if part in inside]
            for part in used:
                cut.setdefault(part, NodeId(len(nodes) + len(cut)))
            changed.append(moved(node, _Moved(cut)) if used else node)
        changed += [Op(name="detach", args=(Ref(part),), where=nodes[part].where) for part in cut]
        order = [own for place in range(len(nodes)) for own in _with_cut(NodeId(place), cut)]
        return renumber(changed, order)[0]


class AsShapes(Sequence[Node]):
    """Nodes with a `detach` for each gradient, which has the same shape and dtype and needs no backward."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        self._nodes = nodes

    def __len__(self) -> int:
        return len(self._nodes)

    @overload
    def __getitem__(self, place: int) -> Node: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[Node]: ...
    def __getitem__(self, place: int | slice) -> Node | Sequence[Node]:
        if isinstance(place, slice):
            return [self[own] for own in range(*place.indices(len(self)))]
        node = self._nodes[place]
        return Op(name="detach", args=(node.of,), where=node.where) if isinstance(node, Grad) else node


class _Moved(dict[NodeId, NodeId]):
    """Where nodes have gone; those that are not named have stayed."""

    def __missing__(self, node: NodeId) -> NodeId:
        return node


def _with_cut(place: NodeId, cut: Mapping[NodeId, NodeId]) -> Iterator[NodeId]:
    yield place
    if place in cut:
        yield cut[place]


def _is_computed(node: Node) -> bool:
    """Whether it is one value that was computed; of several, each `item` is one."""
    return isinstance(node, Call) or (isinstance(node, Op) and not returns_several(node))
