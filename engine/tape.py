"""The tape of a pass: what is kept of its forward so that gradients can be run through it, and where they stop.

Wherever a graph looks at gradients or changes them, and wherever it has written, the autograd graph of the model is
cut: a *seam*. What was computed before a seam ends at an edge, and what comes behind begins at leaves: one is what
everybody in the model holds who had the tensor already (a residual), one what the port hands on, since an assigned
value is for that way alone. On the way back (`sweep`) the gradients that have come to the leaves of a seam are shown to
the graphs, and what these leave of them goes on at the edge.

Invariants
- Seams are where the plan says, whoever is in the pass: another seam would change the order in which gradients are
  added up, and so their last bits.
- Parameters are frozen: nothing before the first seam is kept.
- A sweep leaves the tape as it was: there may be several, each for some of the pass's members.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.graph import GradientEdge, get_gradient_edge

from engine.arguments import Selector
from engine.gradient_port import Gradient, GradientPort, RowGradient
from engine.leaves import port_leaves, with_rows_second
from engine.saved import SavedTensors
from engine.views import InvokeRows
from engine.writes import PortValue, with_member
from polytrace.graph import Port
from scheduling.plan import RequestId

# T = packed rows, D = hidden

# Ports whose values others in the model hold as well.
_HELD = frozenset({Port.INPUT, Port.INPUTS, Port.OUTPUT})


class Seam(Protocol):
    """Where the gradient stops at one port."""

    def gradients(self) -> Mapping[Selector, Gradient]:
        """What has come to its leaves, for graphs to see and change."""

    def go_on(self, gradients: Mapping[Selector, Gradient]) -> None:
        """Takes what graphs have left of it further back."""

    def leaves(self) -> Iterator[Tensor]:
        """Its leaves."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """What the tape needs to know of a port."""

    order: int
    port: Port
    selectors: tuple[Selector, ...]  # of its tensors that have rows
    layouts: Mapping[Selector, int]  # as of `PortValue`


@dataclass(slots=True, kw_only=True)
class Tape:
    """One pass on one shard."""

    cuts: frozenset[int]  # orders
    saved: SavedTensors = field(default_factory=SavedTensors)
    seams: dict[int, Seam] = field(default_factory=dict)  # by order
    rows: dict[RequestId, dict[int, InvokeRows]] = field(default_factory=dict)  # of each member, by invoke
    holders: set[tuple[RequestId, int]] = field(default_factory=set)  # members that may run it back, with their waves
    hidden_in: Tensor | None = None  # `[1, T, D]`, a leaf: what an earlier stage handed on
    hidden_out: Tensor | None = None  # `[1, T, D]`: what goes to a later one

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Forwards inside are recorded. Fragments are not: they run without autograd."""
        with torch.enable_grad(), self.saved.keeping():
            yield

    def receive(self, hidden_1TD: Tensor, *, has_seam: bool) -> Tensor:
        """Hidden states of an earlier stage, as they enter the forward. `has_seam`: there is a seam before them."""
        if not has_seam:
            return hidden_1TD
        self.hidden_in = hidden_1TD.detach().requires_grad_()
        return handed_on(self.hidden_in)

    def visit(self, place: Place, value: Any, run: Callable[[PortValue], None]) -> Any:
        """A port's value behind its visit by fragments, which `run` runs; cut when a seam is planned here."""
        with torch.no_grad():
            port = PortValue(value, None, place.layouts)
            run(port)
            self.saved.protect(port.changing())
            after = port.result()
        if place.order not in self.cuts:
            return after
        seam = TensorSeam(place.layouts)
        found = after
        with torch.enable_grad():
            before, now = port_leaves(value)[1], port_leaves(after)[1]
            for selector in place.selectors:
                if selector in before and before[selector].is_floating_point():
                    handed = seam.cut(selector, before[selector], now[selector], self.saved, place.port in _HELD)
                    found = with_member(found, selector, handed)
        self.seams[place.order] = seam
        return found

    def sweep(self, hidden_1TD: Tensor | None, run: Callable[[int, GradientPort], None]) -> Tensor | None:
        """Runs gradients back; `run` runs the fragments of an order. Returns the gradient of what came in."""
        for leaf in self._leaves():
            leaf.grad = None
        if hidden_1TD is not None and self.hidden_out is not None and self.hidden_out.requires_grad:
            go_back([get_gradient_edge(self.hidden_out)], [hidden_1TD])
        for order, seam in sorted(self.seams.items(), reverse=True):
            with torch.no_grad():
                gradients = seam.gradients()
                run(order, GradientPort(gradients))
            seam.go_on(gradients)
        if self.hidden_in is None:
            return None
        return torch.zeros_like(self.hidden_in) if self.hidden_in.grad is None else self.hidden_in.grad

    def _leaves(self) -> Iterator[Tensor]:
        if self.hidden_in is not None:
            yield self.hidden_in
        for seam in self.seams.values():
            yield from seam.leaves()


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
                found[selector] = RowGradient(gradient_of(leaf), held, lambda own, dim=dim: with_rows_second(own, dim))
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
    found: Tensor = _HandedOn.apply(leaf)
    return found


def become(tensor: Tensor, leaf: Tensor, saved: SavedTensors) -> bool:
    """From now on a tensor is a leaf's for everybody who holds it. False where torch forbids that."""
    if not tensor._is_view():
        tensor.detach_()
    try:
        with saved.unchanged(tensor):
            _Become.apply(tensor, leaf)
    except RuntimeError:  # one of several views of an operation
        return False
    return True


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
