"""What follows from a node and from the same of other nodes (its shape, its dtype, whose rows it has), when asked."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

from polytrace.graph import NodeId

T = TypeVar("T")


class Derived(Generic[T]):
    """A fact of every node of one recording, worked out for those that somebody asks for, and kept."""

    def __init__(self, parts: Callable[[NodeId], Iterable[NodeId]], make: Callable[[NodeId], T]) -> None:
        self.known: dict[NodeId, T] = {}
        self._parts = parts  # the nodes whose fact a node's fact follows from
        self._make = make  # the fact of a node whose parts are known

    def of(self, wanted: NodeId) -> T:
        """Depth first without recursion: graphs are longer than Python's stack is deep."""
        waiting = [] if wanted in self.known else [wanted]
        while waiting:
            node = waiting[-1]
            if node in self.known:
                waiting.pop()
                continue
            missing = [part for part in self._parts(node) if part not in self.known]
            if missing:
                waiting += missing
                continue
            self.known[node] = self._make(node)
        return self.known[wanted]
