"""The tape of one call of a model as it is: where its gradient stops, and the way back (as `engine.tape` of a pass).

A call has rows of nobody else, so a seam is through whole tensors, and only where the call's own request has a turn.

Invariants
- The module is left as it is: gradients are gathered at the tape's leaves alone, so its weights need not be frozen and
  get none; and a tensor that is the module's own (a parameter, or memory of one) is never made a leaf in place.
- A tensor that cannot be cut for all who hold it is an error of its request: its gradient would lack something.
- So is a written module that runs again on the way back (gradient checkpointing): it would run without the write.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from engine.arguments import Selector
from engine.recorder import memory_of
from engine.saved import SavedTensors
from engine.seams import become, gradient_of, handed_on
from engine.whole_sites import overlaps
from engine.writes import member_of, with_member
from polytrace.graph import NodeId, Port, Site, SiteGrad, Turn, Write
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
    held: Tensor | None  # the leaf of all who hold it; None where they are not cut off
    # ways to it -> leaves of what is handed on, None: it is, itself; without a past and a gradient: nobody is cut off
    handed: dict[Selector, Tensor | None]


class WholeSeam:
    """Where the gradient stops at one visit of a call."""

    def __init__(self, tape: WholeTape) -> None:
        self._earlier = tuple(tape.leaves)  # that gradients can go on to
        self._tape = tape
        self._joints: list[_Joint] = []

    @torch.enable_grad()  # also where the model has them off: who holds the tensor behind here has its gradient
    def cut(self, selector: Selector, tensor: Tensor, handed: Tensor, cut: Cut) -> Tensor:
        """Cuts at a tensor, in whose place `handed` is handed on; returns what is to be handed on now."""
        joint = next((one for one in self._joints if one.tensor is tensor), None)
        if joint is None:
            joint = self._joint(tensor, cut)
            self._joints.append(joint)
        if handed is tensor and joint.held is not None:
            joint.handed[selector] = None
            return tensor
        if handed is tensor and not cut.is_of_holders:
            joint.handed[selector] = blank = tensor.new_zeros(()).expand(tensor.shape)
            self._tape.blanks.append(blank)
            return tensor
        leaf = joint.handed[selector] = handed.detach().requires_grad_()
        self._tape.leaves.append(leaf)
        return handed_on(leaf)

    def _joint(self, tensor: Tensor, cut: Cut) -> _Joint:
        if tensor.is_inference():
            raise NoGradientError(cut.node, f"{_HERE} was made in inference mode, which has no gradients")
        is_held = cut.is_of_holders and memory_of(tensor) not in self._tape.own
        if is_held:
            _check(tensor, [joint.tensor for joint in self._joints if joint.held is not None], cut.node)
        has_edge = tensor.requires_grad and bool(self._earlier) and not _is_ungraded(tensor)
        joint = _Joint(tensor=tensor, edge=get_gradient_edge(tensor) if has_edge else None, held=None, handed={})
        if is_held:
            joint.held = tensor.detach().requires_grad_()
            if not become(tensor, joint.held, self._tape.saved):
                raise NoGradientError(cut.node, _SEVERAL_VIEWS)
            self._tape.leaves.append(joint.held)
        return joint

    def release(self) -> None:
        """Behind the call: who keeps one of its tensors has it as it is without gradients. Views stay as they are where
        torch cannot exchange one (something has a weak reference to it).
        """
        for joint in self._joints:
            if joint.tensor is not None and joint.held is not None:
                base = joint.tensor._base if joint.tensor._is_view() else joint.tensor
                if base is not None and base.grad_fn is not None:
                    base.detach_()
                if base is not joint.tensor:  # torch detaches no view in place
                    with suppress(RuntimeError):
                        torch.utils.swap_tensors(joint.tensor, joint.tensor.detach())
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

    cuts: Mapping[int, Mapping[Selector, Cut]]  # order -> tensors with a turn
    own: frozenset[int]  # memory of the module's parameters and buffers
    saved: SavedTensors = field(default_factory=SavedTensors)
    seams: dict[int, WholeSeam] = field(default_factory=dict)  # by order, as the call came to them
    leaves: list[Tensor] = field(default_factory=list)  # of all seams so far
    blanks: list[Tensor] = field(default_factory=list)  # as large as what gradients are only added to, without memory
    written: dict[tuple[str, Port], NodeId] = field(default_factory=dict)  # sides of modules -> a write there
    is_going_back: bool = False

    @property
    def first(self) -> NodeId:
        """A read or write where it is asked for, the first of the call."""
        return next(iter(self.cuts[min(self.cuts)].values())).node

    @property
    def num_bytes(self) -> int:
        """Of the memory that is kept once the call is over: by operations, and by leaves."""
        return self.saved.num_bytes_with(self.leaves)

    @property
    def gradient_bytes(self) -> int:
        """What comes to the leaves on the way back, and is added elsewhere."""
        return sum(tensor.numel() * tensor.itemsize for tensor in (*self.leaves, *self.blanks))

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
        # holders first: one tensor may be both
        for selector, cut in sorted(selectors.items(), key=lambda one: not one[1].is_of_holders):
            tensor, handed = _tensor_at(before, selector), _tensor_at(after, selector)
            if tensor is not None and handed is not None:  # whose turn it is says where there is none
                goes_on = seam.cut(selector, tensor, handed, cut)
                after = after if goes_on is handed else with_member(after, selector, goes_on)
        return after


_HERE = "no gradient can be told here: in this call the tensor"
_ASSIGN = "write `value = site * 1.0; site = value` and take that of the value, which counts who gets it from there"
_SEVERAL_VIEWS = (
    f"{_HERE} is one of several parts of another (chunk, split, unbind), which torch lets nobody change alone: "
    f"take the gradient of what it is a part of, or {_ASSIGN}"
)
_UNGRADED_VIEW = f"{_HERE} is a part of another that has gradients, taken under torch.no_grad(): {_ASSIGN}"


def _check(tensor: Tensor, others: Sequence[Tensor | None], node: NodeId) -> None:
    """NoGradientError for a tensor that cannot be told from others of its port, or of which parts are one."""
    if any(other is not None and memory_of(tensor) == memory_of(other) for other in others):
        raise NoGradientError(node, f"{_HERE} shares its memory with another one of this port; take one's alone")
    if _is_ungraded(tensor):
        assert tensor._base is not None, "it is a view"
        if tensor._base.requires_grad:
            raise NoGradientError(node, _UNGRADED_VIEW)
        # nothing is before it, so it may change its past like any other
        _autograd._set_creation_meta(tensor, _autograd.CreationMeta.DEFAULT)
    if overlaps(tensor):
        raise NoGradientError(node, f"{_HERE} has several elements that are one in memory (expand, unfold): {_ASSIGN}")


_autograd: Any = torch._C._autograd


def _is_ungraded(tensor: Tensor) -> bool:
    """Whether it is a view that was made without gradients, though what it is a part of may have some."""
    return tensor._is_view() and bool(
        _autograd._get_creation_meta(tensor) == _autograd.CreationMeta.NO_GRAD_MODE  # `is` is never so
    )


def _tensor_at(value: Any, selector: Selector) -> Tensor | None:
    """The tensor at a way into what a module takes or gives; None where there is none."""
    try:
        for key in selector:
            value = member_of(value, key)
    except (LookupError, TypeError, AttributeError):
        return None
    return value if isinstance(value, Tensor) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """One tensor of a visit that somebody has a turn at."""

    node: NodeId  # a read or write of it
    is_of_holders: bool  # a turn is about what comes to all who hold it, and not to who got another in its place


Cuts = dict[int, dict[int, dict[Selector, Cut]]]  # invoke -> order -> tensor


def cuts_of(program: Program, wave: int) -> Cuts:
    """Where the calls of a wave are cut: where anybody has a turn who runs it backwards."""
    found: Cuts = {}
    nodes = program.graph.nodes
    assigned: dict[tuple[int, Site], int] = {}  # the first that is put in a tensor's place
    for place, event in enumerate(nodes):
        if isinstance(event, Write) and not event.in_place:
            assigned.setdefault((event.invoke, event.site), place)
    for back in program.waves:
        if back.of != wave:
            continue
        for fragment in back.stages[0].fragments:
            for node_id in fragment.nodes:
                node = nodes[node_id]
                if isinstance(node, SiteGrad):
                    at: Any = nodes[node.at]
                    own = found.setdefault(at.invoke, {}).setdefault(fragment.order, {})
                    before = own.get(at.site.selector)
                    is_behind = assigned.get((at.invoke, at.site), len(nodes)) <= node.at
                    is_of_holders = not is_behind and node.turn is not Turn.ADD
                    own[at.site.selector] = Cut(
                        node=before.node if before is not None and node.turn is Turn.TAKE else node.at,
                        is_of_holders=is_of_holders or (before is not None and before.is_of_holders),
                    )
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
            tapes[invoke].is_going_back = True
            try:
                seam.go_on(ports[invoke])
            finally:
                tapes[invoke].is_going_back = False


_AGAIN = (
    "no gradient can be told here: {name} runs again on the way back (gradient checkpointing), and would do so without "
    "what was written: call `model.gradient_checkpointing_disable()`, or write outside of what is checkpointed"
)


@contextmanager
def nothing_written_runs_again(model: nn.Module, tapes: Collection[WholeTape]) -> Iterator[None]:
    """The way back of calls goes inside. NoGradientError where a model works out anew, from what it was given, what
    somebody has written to.
    """

    def look(key: tuple[str, Port], *_called: Any) -> None:
        if torch._C._current_graph_task_id() == -1:
            return  # somebody else's call, in another thread
        for tape in tapes:
            if tape.is_going_back and key in tape.written:
                raise NoGradientError(tape.written[key], _AGAIN.format(name=key[0] or "the model"))

    with ExitStack() as hooks:
        for key in {key for tape in tapes for key in tape.written}:
            module = model.get_submodule(key[0])
            is_behind = key[1] is Port.OUTPUT
            register = module.register_forward_hook if is_behind else module.register_forward_pre_hook
            hooks.callback(register(partial(look, key)).remove)
        yield
