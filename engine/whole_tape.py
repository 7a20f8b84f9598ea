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
from torch._C import _is_alias_of

from engine.arguments import Selector
from engine.gradient_port import Joined
from engine.recorder import memory_of
from engine.saved import SavedTensors
from engine.seams import TensorSeam, gradient_of
from engine.writes import with_member
from polytrace.graph import NodeId, SiteGrad, Turn
from scheduling.plan import Program


class WholeGradient(Joined):
    """What has come to one tensor of a port."""

    def take(self, *, is_assigned: bool) -> Tensor:
        """As of `engine.gradient_port.Gradient`, of the whole tensor."""
        value = self.handed.clone()
        self.handed.zero_()
        if self.held is not None and not is_assigned:
            value += self.held
            self.held.zero_()
        return value

    def add(self, value: Tensor, *, is_behind: bool) -> None:
        """`is_behind`: what was read was assigned before, at the same visit."""
        where = self.handed if is_behind or self.held is None else self.held
        where += value.to(where.device)

    def look(self, *, is_behind: bool) -> Tensor:
        """The total with regard to what was read."""
        return self.handed.clone() if is_behind or self.held is None else self.held + self.handed

    def set(self, value: Tensor, *, is_behind: bool) -> None:
        """The total becomes another."""
        if self.held is not None and not is_behind:
            self.held.zero_()
        self.handed.copy_(value)


class NoGradientError(Exception):
    """A tensor of a call has no gradient that could be told. `node` is the read or write that is there."""

    def __init__(self, node: NodeId, message: str) -> None:
        super().__init__(message)
        self.node = node


class WholeSeam(TensorSeam):
    """Where the gradient stops at one visit of a call."""

    def __init__(self, earlier: Sequence[Tensor]) -> None:
        """`earlier` are the leaves that gradients can go on to."""
        super().__init__({})
        self._earlier = earlier

    def end(self) -> None:
        """Behind its last cut: where nothing lies before it that gradients go on to, nothing is kept of that."""
        if not self._earlier:
            for joint in self._joints.values():
                joint.edge = None

    def release(self) -> None:
        """Behind the call: who keeps one of its tensors has it as it is without gradients."""
        for tensor in self._tensors:
            base = tensor._base if tensor._is_view() and tensor._base is not None else tensor
            if base.grad_fn is not None:
                base.detach_()
        self._tensors.clear()

    def parts(self) -> dict[Selector, WholeGradient]:
        """What has come to its leaves."""
        return {
            selector: WholeGradient(gradient_of(leaf), None if joint.held is None else gradient_of(joint.held))
            for joint in self._joints.values()
            for selector, leaf in joint.handed.items()
        }

    def leave(self, parts: Mapping[Selector, WholeGradient]) -> None:
        """Takes what graphs have left of it further back."""
        edges, totals = self.totals(parts)
        if edges:
            torch.autograd.backward(edges, totals, retain_graph=True, inputs=list(self._earlier))


@dataclass(slots=True, kw_only=True)
class WholeTape:
    """One call."""

    cuts: Mapping[int, Mapping[Selector, NodeId]]  # order -> tensors with a turn, each with a read or write of it
    own: frozenset[int]  # memory of the module's parameters and buffers
    saved: SavedTensors = field(default_factory=SavedTensors)
    seams: dict[int, WholeSeam] = field(default_factory=dict)  # by order, as the call came to them
    leaves: list[Tensor] = field(default_factory=list)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """The call goes inside."""
        try:
            with torch.inference_mode(False), torch.enable_grad(), self.saved.keeping():
                yield
        finally:
            for seam in self.seams.values():
                seam.release()

    def cut(self, order: int, before: Any, after: Any) -> Any:
        """What goes on behind a visit: a seam is there when one is planned. `before` is what the module gave."""
        selectors = self.cuts.get(order)
        if selectors is None:
            return after
        seam = WholeSeam(tuple(self.leaves))
        cut: list[Tensor] = []
        for selector, node in selectors.items():
            tensor, handed = member_of(before, selector), member_of(after, selector)
            if tensor is None or handed is None:
                continue  # whose turn it is says so
            if any(tensor is not other and _is_alias_of(tensor, other) for other in cut):
                raise NoGradientError(node, f"{_HERE} shares its memory with another tensor of this port: take one's")
            cut.append(tensor)
            self._check(node, tensor)
            is_held = memory_of(tensor) not in self.own
            after = with_member(after, selector, seam.cut(selector, tensor, handed, self.saved, is_held))
            if is_held and not seam.is_held(tensor):
                raise NoGradientError(node, _SEVERAL_VIEWS)
        seam.end()
        self.seams[order] = seam
        self.leaves.extend(seam.leaves())
        return after

    def _check(self, node: NodeId, tensor: Tensor) -> None:
        if tensor.is_inference():
            raise NoGradientError(node, f"{_HERE} was made in inference mode, which has no gradients")
        if any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
            raise NoGradientError(
                node, f"{_HERE} has several elements that are one in memory: take that of what made it"
            )


_HERE = "no gradient can be told here: in this call the tensor"
_SEVERAL_VIEWS = (
    f"{_HERE} is one of several parts of another (chunk, split, unbind), which torch lets nobody change alone: "
    "take the gradient of what it is a part of, or of what is made of it"
)


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
        ports = {invoke: seam.parts() for invoke, seam in seams.items()}
        with torch.no_grad():
            run(order, ports)
        for invoke, seam in seams.items():
            seam.leave(ports[invoke])
