"""Seams: where the autograd graph of a pass is cut, so that graphs can see and change the gradient (`engine.tape`).

What was computed before a seam ends at an edge, and what comes behind begins at leaves: one is what everybody in the
model holds who had the tensor already (a residual), one what the port hands on, since an assigned value is for that way
alone. There are always both, whatever is written: another number of leaves would be another order of addition.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.graph import GradientEdge, get_gradient_edge

from engine.arguments import Selector
from engine.gradient_port import Gradient, RowGradient
from engine.saved import SavedTensors


class Seam(Protocol):
    """Where the gradient stops at one port."""

    def gradients(self) -> Mapping[Selector, Gradient]:
        """What has come to its leaves, for graphs to see and change."""

    def go_on(self, gradients: Mapping[Selector, Gradient]) -> None:
        """Takes what graphs have left of it further back."""

    def leaves(self) -> Iterator[Tensor]:
        """Its leaves."""


@dataclass(slots=True)
class _Joint:
    """One tensor of a seam."""

    edge: GradientEdge | None  # further back; None: nothing is there
    held: Tensor | None  # the leaf of who holds it already; None where it cannot be cut for them
    handed: dict[Selector, Tensor] = field(default_factory=dict)  # leaves of what is handed on


class TensorSeam:
    """A seam through tensors that have rows."""

    def __init__(self, layouts: Mapping[Selector, int]) -> None:
        self._layouts = layouts
        self._joints: dict[int, _Joint] = {}  # by the tensor's id during the visit
        self._tensors: list[Tensor] = []  # so that ids stay theirs

    def cut(self, selector: Selector, tensor: Tensor, handed: Tensor, saved: SavedTensors, is_held: bool) -> Tensor:
        """Cuts at a tensor, in whose place `handed` is handed on; returns what is to be handed on now.

        `is_held`: others may hold the tensor, and are to go on from the seam as well.
        """
        joint = self._joints.get(id(tensor))
        if joint is None:
            joint = _Joint(get_gradient_edge(tensor) if tensor.requires_grad else None, None)
            leaf = tensor.detach().requires_grad_()
            if is_held and become(tensor, leaf, saved):
                joint.held = leaf
            self._joints[id(tensor)] = joint
            self._tensors.append(tensor)
        joint.handed[selector] = handed.detach().requires_grad_()
        return handed_on(joint.handed[selector])

    def gradients(self) -> Mapping[Selector, Gradient]:
        found: dict[Selector, Gradient] = {}
        for joint in self._joints.values():
            held = None if joint.held is None else gradient_of(joint.held)
            for selector, leaf in joint.handed.items():
                dim = self._layouts.get(selector, 1)
                found[selector] = RowGradient(gradient_of(leaf), held, dim)
        return found

    def go_on(self, gradients: Mapping[Selector, Gradient]) -> None:
        edges, totals = [], []
        for joint in self._joints.values():
            if joint.edge is None:
                continue
            total: Tensor | None = None
            for selector in joint.handed:
                own = gradients[selector]
                assert isinstance(own, RowGradient)
                total = own.handed if total is None else total + own.handed
                held = own.held
            assert total is not None
            edges.append(joint.edge)
            totals.append(total if held is None else held + total)
        go_back(edges, totals)

    def leaves(self) -> Iterator[Tensor]:
        for joint in self._joints.values():
            if joint.held is not None:
                yield joint.held
            yield from joint.handed.values()


def gradient_of(leaf: Tensor) -> Tensor:
    """A copy of what has come to a leaf, in one piece."""
    if leaf.grad is None:
        return torch.zeros(leaf.shape, dtype=leaf.dtype, device=leaf.device)
    return leaf.grad.clone(memory_format=torch.contiguous_format)


def go_back(edges: Sequence[GradientEdge], gradients: Sequence[Tensor]) -> None:
    """Runs gradients back from edges to the leaves before them."""
    if edges:
        torch.autograd.backward(list(edges), list(gradients), retain_graph=True)


def handed_on(leaf: Tensor) -> Tensor:
    """A leaf as the model may have it: the same memory, and no leaf any more."""
    found: Tensor = _HandedOn.apply(leaf)  # type: ignore[no-untyped-call]
    return found


def become(tensor: Tensor, leaf: Tensor, saved: SavedTensors) -> bool:
    """From now on a tensor is a leaf's for everybody who holds it. False where torch forbids that."""
    if not tensor._is_view():
        tensor.detach_()
    elif tensor.requires_grad and not _can_change(tensor):
        return False
    try:
        with saved.unchanged(tensor):
            _Become.apply(tensor, leaf)  # type: ignore[no-untyped-call]
    except RuntimeError:  # one of several views of an operation
        return False
    return True


def _can_change(view: Tensor) -> bool:
    """Whether torch lets a view change in place: not one of several of an operation. Trying would spoil them all."""
    autograd: Any = torch._C._autograd
    return bool(autograd._get_creation_meta(view) == autograd.CreationMeta.DEFAULT)  # `is` is never so


class _HandedOn(Function):
    @staticmethod
    def forward(ctx: Any, leaf: Tensor) -> Tensor:
        return leaf.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class _Become(Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, leaf: Tensor) -> Tensor:
        ctx.mark_dirty(tensor)
        return tensor

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        return None, gradient
