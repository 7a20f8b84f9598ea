"""Tensors of the user's own that require gradients: when a block has run they have them, as behind torch's backward.

A tensor that was computed from others hands its gradient on to them, so modules and optimisers of the user's are
trained as if the model were here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from polytrace.graph import Constant, NodeId

if TYPE_CHECKING:
    from polytrace.recording import Recording
    from polytrace.storage import State


@dataclass(slots=True, eq=False)
class Leaf:
    """One such tensor."""

    tensor: Any
    nodes: list[NodeId] = field(default_factory=list)  # one for each content that it had
    num_sweeps: int = 0  # backwards whose gradients are saved
    saved: list[Any] = field(default_factory=list)  # recorded values that become gradients of it


class Leaves:
    """Of one recording."""

    def __init__(self, recording: Recording) -> None:
        self._recording = recording
        self._own: dict[int, Leaf] = {}  # by the tensor's id

    def __bool__(self) -> bool:
        return bool(self._own)

    def add(self, tensor: Any, name: str, where: str) -> NodeId:
        """The tensor's node: its own, also where another tensor has the same content."""
        node = self._recording.once(Constant(name=name, where=where), f"{name} of {id(tensor)}")
        leaf = self._own.setdefault(id(tensor), Leaf(tensor))
        if node not in leaf.nodes:
            leaf.nodes.append(node)
        return node

    def __iter__(self) -> Iterator[Leaf]:
        return iter(self._own.values())

    def of(self, tensor: Any) -> Leaf | None:
        """What is known of a tensor; None when it is no part of the program."""
        return self._own.get(id(tensor))

    def land(self, num_sweeps: int, summed: Callable[[Leaf, int], State | None]) -> None:
        """Saves the gradients of all backwards so far. `summed`: those of one leaf, from a backward on."""
        for leaf in self._own.values():
            total, leaf.num_sweeps = summed(leaf, leaf.num_sweeps), num_sweeps
            if total is not None:
                value = self._recording.session.wrap(total)
                total.is_saved = True
                self._recording.saved.append((total, value, total.where))
                leaf.saved.append(value)

    def deliver(self) -> None:
        """The saved gradients have data: each goes to its tensor, and through what that was computed from."""
        pairs = [(leaf.tensor, grad) for leaf in self._own.values() for grad in leaf.saved]
        if pairs:
            import torch

            grads = [grad.to(tensor.device) for tensor, grad in pairs]
            torch.autograd.backward([tensor for tensor, _ in pairs], grads)
