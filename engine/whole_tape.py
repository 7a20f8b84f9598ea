"""The tape of one call of a model as it is: where its gradient stops, and the way back (as `engine.tape` of a pass).

A call has rows of nobody else, so a seam is through whole tensors, and only where the call's own request has a turn.

Invariants
- The module is left as it is: gradients are gathered at the tape's leaves alone, so its weights need not be frozen and
  get none; and a tensor that is the module's own (a parameter, or memory of one) is never made a leaf in place.
- A tensor that cannot be cut for all who hold it is an error of its request: its gradient would lack something.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from engine.arguments import Selector
from engine.recorder import memory_of
from engine.saved import SavedTensors
from engine.seams import become, gradient_of, handed_on
from engine.writes import with_member
from polytrace.graph import NodeId, SiteGrad, Turn
from scheduling.plan import Program


class WholeGradient:
    """What has come to one tensor of a port."""

    def __init__(self, handed: Came, held: Came | None) -> None:
        """`handed`: to who got it from the port. `held`: to who had it before another was assigned, if it was."""
        self.handed, self.held = handed, held

    def parts(self) -> list[Tensor]:
        """All of it."""
        return [self.handed.total] if self.held is None else [self.held.total, self.handed.total]

    def has_come(self, *, is_behind: bool) -> bool:
        """Whether there is any, be it zeros."""
        return self.handed.is_there or (not is_behind and self.held is not None and self.held.is_there)

    def take(self, *, is_assigned: bool) -> Tensor:
        """As of `engine.gradient_port.Gradient`, of the whole tensor."""
        value = self.handed.take()
        if self.held is not None and not is_assigned:
            value += self.held.take()
        return value

    def add(self, value: Tensor, *, is_behind: bool) -> None:
        """`is_behind`: what was read was assigned before, at the same visit."""
        where = self.handed if is_behind or self.held is None else self.held
        where.add(value)

    def look(self, *, is_behind: bool) -> Tensor:
        """The total with regard to what was read."""
        if is_behind or self.held is None:
            return self.handed.total.clone()
        return self.held.total + self.handed.total

    def set(self, value: Tensor, *, is_behind: bool) -> None:
        """The total becomes another."""
        if self.held is not None and not is_behind:
            self.held.take()
        self.handed.take()
        self.handed.add(value)


class Came:
    """What has come to one leaf."""

    def __init__(self, leaf: Tensor) -> None:
        self.total = gradient_of(leaf)
        self.is_there = leaf.grad is not None

    def take(self) -> Tensor:
        """All of it; nothing is left."""
        value = self.total.clone()
        self.total.zero_()
        self.is_there = False
        return value

    def add(self, value: Tensor) -> None:
        """More comes."""
        self.total += value.to(self.total.device)
        self.is_there = True


class NoGradientError(Exception):
    """A tensor of a call has no gradient that could be told. `node` is the read or write that is there."""

    def __init__(self, node: NodeId, message: str) -> None:
        super().__init__(message)
        self.node = node


@dataclass(slots=True, kw_only=True)
class _Joint:
    """One tensor of a seam."""

    tensor: Tensor | None  # None once the call is over
    edge: GradientEdge | None  # further back; None: nobody is there
    held: Tensor | None  # the leaf of all who hold it; None where it is the module's own
    handed: dict[Selector, Tensor | None]  # ways to it -> leaves of what is handed on; None: it is, itself


class WholeSeam:
    """Where the gradient stops at one visit of a call."""

    def __init__(self, tape: WholeTape) -> None:
        self._earlier = tuple(tape.leaves)  # that gradients can go on to
        self._tape = tape
        self._joints: list[_Joint] = []

    def cut(self, selector: Selector, tensor: Tensor, handed: Tensor, node: NodeId) -> Tensor:
        """Cuts at a tensor, in whose place `handed` is handed on; returns what is to be handed on now."""
        joint = next((one for one in self._joints if one.tensor is tensor), None)
        if joint is None:
            joint = self._joint(tensor, node)
            self._joints.append(joint)
        if handed is tensor and joint.held is not None:
            joint.handed[selector] = None
            return tensor
        leaf = joint.handed[selector] = handed.detach().requires_grad_()
        self._tape.leaves.append(leaf)
        return handed_on(leaf)

    def _joint(self, tensor: Tensor, node: NodeId) -> _Joint:
        _check(tensor, [joint.tensor for joint in self._joints], node)
        edge = get_gradient_edge(tensor) if tensor.requires_grad and self._earlier else None
        joint = _Joint(tensor=tensor, edge=edge, held=None, handed={})
        if memory_of(tensor) not in self._tape.own:
            joint.held = tensor.detach().requires_grad_()
            if not become(tensor, joint.held, self._tape.saved):
                raise NoGradientError(node, _SEVERAL_VIEWS)
            self._tape.leaves.append(joint.held)
        return joint

    def release(self) -> None:
        """Behind the call: who keeps one of its tensors has it as it is without gradients."""
        for joint in self._joints:
            if joint.tensor is not None and joint.held is not None:
                base = joint.tensor._base if joint.tensor._is_view() else joint.tensor
                if base is not None and base.grad_fn is not None:
                    base.detach_()
            joint.tensor = None

    def gradients(self) -> dict[Selector, WholeGradient]:
        """What has come to its leaves, for graphs to see and change; of one tensor it is one."""
        found: dict[Selector, WholeGradient] = {}
        for joint in self._joints:
            held = None if joint.held is None else Came(joint.held)
            for selector, leaf in joint.handed.items():
                if leaf is not None:
                    found[selector] = WholeGradient(Came(leaf), held)
                else:
                    assert held is not None, "it was cut for all who hold it"
                    found[selector] = WholeGradient(held, None)
        return found

    def go_on(self, gradients: Mapping[Selector, WholeGradient]) -> None:
        """Takes what graphs have left of it further back."""
        edges, totals = [], []
        for joint in self._joints:
            if joint.edge is None:
                continue
            parts = {id(part): part for way in joint.handed for part in gradients[way].parts()}
            edges.append(joint.edge)
            totals.append(sum(list(parts.values())[1:], start=next(iter(parts.values()))))
        if edges:
            torch.autograd.backward(edges, totals, retain_graph=True, inputs=self._earlier)


@dataclass(slots=True, kw_only=True)
class WholeTape:
    """One call."""

    cuts: Mapping[int, Mapping[Selector, NodeId]]  # order -> tensors with a turn, each with a read or write of it
    own: frozenset[int]  # memory of the module's parameters and buffers
    saved: SavedTensors = field(default_factory=SavedTensors)
    seams: dict[int, WholeSeam] = field(default_factory=dict)  # by order, as the call came to them
    leaves: list[Tensor] = field(default_factory=list)  # of all seams so far

    @property
    def num_bytes(self) -> int:
        """Of the memory that is kept once the call is over: by operations, and by leaves."""
        return self.saved.num_bytes_with(self.leaves)

    @property
    def gradient_bytes(self) -> int:
        """What comes to the leaves on the way back."""
        return sum(leaf.numel() * leaf.itemsize for leaf in self.leaves)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """The call goes inside."""
        try:
            with torch.enable_grad(), self.saved.keeping():
                yield
        finally:
            for seam in self.seams.values():
                seam.release()

    def cut(self, order: int, before: Any, after: Any) -> Any:
        """What goes on behind a visit: a seam is there when one is planned. `before` is what the module gave."""
        selectors = self.cuts.get(order)
        if selectors is None:
            return after
        seam = self.seams[order] = WholeSeam(self)
        for selector, node in selectors.items():
            tensor, handed = member_of(before, selector), member_of(after, selector)
            if tensor is not None and handed is not None:  # whose turn it is says where there is none
                goes_on = seam.cut(selector, tensor, handed, node)
                after = after if goes_on is handed else with_member(after, selector, goes_on)
        return after


_HERE = "no gradient can be told here: in this call the tensor"
_SEVERAL_VIEWS = (
    f"{_HERE} is one of several parts of another (chunk, split, unbind), which torch lets nobody change alone: "
    "take the gradient of what it is a part of, or of what is made of it"
)


def _check(tensor: Tensor, others: Sequence[Tensor | None], node: NodeId) -> None:
    """NoGradientError for a tensor that cannot be told from others of its port, or is of torch's that have none."""
    if any(other is not None and memory_of(tensor) == memory_of(other) for other in others):
        raise NoGradientError(node, f"{_HERE} shares its memory with another one of this port; take one's alone")
    if tensor.is_inference():
        raise NoGradientError(node, f"{_HERE} was made in inference mode, which has no gradients")
    if any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
        raise NoGradientError(node, f"{_HERE} has several elements that are one in memory; take another's")


def member_of(value: Any, selector: Selector) -> Tensor | None:
    """The tensor at a way into what a module takes or gives; None where there is none."""
    try:
        for key in selector:
            value = value[key]
    except (LookupError, TypeError):
        return None
    return value if isinstance(value, Tensor) else None


Cuts = dict[int, dict[int, dict[Selector, NodeId]]]  # invoke -> order -> tensor -> a read or write of it


def cuts_of(program: Program, wave: int) -> Cuts:
    """Where the calls of a wave are cut: where anybody has a turn who runs it backwards."""
    found: Cuts = {}
    nodes = program.graph.nodes
    for back in program.waves:
        if back.of != wave:
            continue
        for fragment in back.stages[0].fragments:
            for node_id in fragment.nodes:
                node = nodes[node_id]
                if isinstance(node, SiteGrad):
                    at: Any = nodes[node.at]
                    own = found.setdefault(at.invoke, {}).setdefault(fragment.order, {})
                    if node.turn is not Turn.TAKE or at.site.selector not in own:
                        own[at.site.selector] = node.at
    return found


Ports = dict[int, dict[Selector, WholeGradient]]  # by invoke


def sweep(tapes: Mapping[int, WholeTape], orders: Sequence[int], run: Callable[[int, Ports], None]) -> None:
    """Runs the gradients of a wave's calls back together; `run` runs the fragments of an order, the last first.

    `tapes` are by invoke; `orders` those of the fragments.
    """
    for tape in tapes.values():
        for leaf in tape.leaves:
            leaf.grad = None
    for order in sorted({*orders, *(order for tape in tapes.values() for order in tape.seams)}, reverse=True):
        seams = {invoke: tape.seams[order] for invoke, tape in tapes.items() if order in tape.seams}
        ports = {invoke: seam.gradients() for invoke, seam in seams.items()}
        with torch.no_grad():
            run(order, ports)
        for invoke, seam in seams.items():
            seam.go_on(ports[invoke])
