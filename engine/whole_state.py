"""One request to a model that is called as it is, where its calls go: its values, its tapes, its turns at gradients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.fragments import RequestState, ShardContext
from engine.ops import DTYPE_NAMES, TORCH_DTYPES
from engine.results import ResultSink
from engine.turns import earlier
from engine.whole_places import offloaded_weight
from engine.whole_side import Side
from engine.whole_sites import arguments_of
from engine.whole_tape import Ports, WholeTape, cuts_of
from polytrace.given import given_names, structure_of, with_given
from polytrace.graph import Call, Given, Inputs, Node, NodeId, Op, Read, SiteGrad, Write, operands
from polytrace.graph import Turn as GradientTurn
from polytrace.tensors import RawTensor
from scheduling.plan import Fragment, Program, Wave

_NOTHING = (
    "nothing of the loss comes back to here: behind this place the call does not make it of this value, or does so "
    "without gradients (torch.no_grad(), detach())"
)
_CUTS = (
    "this model takes gradients inside its own forward, which this write would cut: its value comes from what was made "
    "with them on, by way of a place where they are off or of a call of a module; write what is worked out where they "
    "are on"
)


@dataclass(frozen=True, slots=True)
class Moment:
    """A request between two calls, none of which has failed."""

    values: dict[NodeId, Any]
    fired: list[NodeId]
    saved_bytes: int
    loaded_bytes: int
    cut_off: frozenset[NodeId]


class CallState(RequestState):
    """One request, whose reads and writes are of whole tensors."""

    def __init__(self, program: Program, context: ShardContext, sink: ResultSink) -> None:
        super().__init__(program, context, sink)
        self.tapes: dict[int, dict[int, WholeTape]] = {}  # of waves that are run backwards later, by invoke
        self._cut_off: set[NodeId] = set()  # values of what the model had gradients on for, which came without

    def begin_tapes(self, wave: int, own: frozenset[int]) -> None:
        """The calls of a wave are recorded. `own` is the memory of the model's tensors."""
        cuts = cuts_of(self.program, wave)
        self.tapes[wave] = {invoke: WholeTape(cuts=orders, own=own) for invoke, orders in cuts.items()}

    def tape_of(self, invoke: int) -> WholeTape | None:
        """That of a call of this wave."""
        assert self.member is not None, "a wave has begun"
        return self.tapes.get(self.member.wave, {}).get(invoke)

    def end_wave(self, wave: Wave) -> None:
        """Tapes that nobody runs back any more are forgotten; all of them when the request has failed."""
        for freed in self.tapes.copy() if self.has_failed else wave.frees:
            self.tapes.pop(freed, None)

    def moment(self) -> Moment:
        """What it has now."""
        saved, loaded = self.sink.saved_bytes, self.brought.loaded_bytes
        return Moment(dict(self.values), list(self.fired), saved, loaded, frozenset(self._cut_off))

    def back_to(self, moment: Moment) -> None:
        """As if nothing had happened since then; what was saved is saved again."""
        self.values, self.fired = dict(moment.values), list(moment.fired)
        self.sink.saved_bytes, self.brought.loaded_bytes = moment.saved_bytes, moment.loaded_bytes
        self._cut_off = set(moment.cut_off)
        self.failure = None

    def structure(self, invoke: int) -> Inputs:
        """The arguments of a call with dtype and shape in the place of tensors."""
        inputs = self.program.invokes[invoke].inputs
        assert inputs is not None, "the request was checked"
        return structure_of(inputs, {name: _outline(self.constant(name)) for name in given_names(inputs)})

    def arguments(self, invoke: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What a call is given: tensors of its own, so that code of the model may change them in place."""
        inputs = self.program.invokes[invoke].inputs
        assert inputs is not None, "the request was checked"
        return arguments_of(with_given(inputs, self._given))

    def _local_parameter(self, path: str) -> Tensor:
        if not self.context.parameters[path].is_meta:
            return super()._local_parameter(path)
        kept = offloaded_weight(self.context.runner.model, path)
        if kept is None:
            raise ValueError(f"{path} is not there: the model has it without data")
        return kept.detach().to(self.context.device)

    def _given(self, given: Given) -> Tensor:
        return self.constant(given.name).clone()

    def run_at(self, fragment: Fragment, sides: Mapping[int, Side]) -> None:
        """Runs a fragment at a visit that calls have come to, each with its side of the module, by invoke."""
        self._sides = sides
        self.run(fragment, None)
        self._sides = {}  # what the model gives is its own again: a tape would keep all of it

    def _is_only(self, look: SiteGrad) -> bool:
        """Whether no other run of its call gives the same read a gradient."""
        nodes = self.program.graph.nodes
        return sum(isinstance(one, SiteGrad) and (one.turn, one.at) == (look.turn, look.at) for one in nodes) == 1

    def begin_sweep(self) -> None:
        """A wave is run back."""
        self._gives: dict[NodeId, bool] = {}  # reads and writes that took a gradient -> whether there was any

    def end_sweep(self) -> None:
        """Fails the request where nothing has come to anybody: plain torch has no gradients there, and not zeros."""
        if self._gives and not any(self._gives.values()):
            self.fail(next(iter(self._gives)), _NOTHING)

    def run_back_at(self, fragment: Fragment, ports: Ports) -> None:
        """Runs a fragment where the gradients of calls have come to a visit, by invoke."""
        self._ports = ports
        self.run(fragment, None)
        self._ports = {}

    def _turn(self, node: SiteGrad) -> Tensor | None:
        """Takes a graph's turn at the gradient of a site; its value, None where it has none."""
        at = self.program.graph.nodes[node.at]
        assert isinstance(at, (Read, Write))
        gradient = self._ports.get(at.invoke, {}).get(at.site.selector)
        if gradient is None:
            raise LookupError(f"this call did not come to {at.site}: what it visits depends on its values")
        is_behind = any(not self.is_in_place(write) for write in earlier(self, node.at, at))
        if node.turn is GradientTurn.TAKE:
            is_assigned = is_behind or not self.is_in_place(node.at)
            self._gives[node.at] = gradient.has_come(is_behind=is_assigned)
            return gradient.take(is_assigned=is_assigned).to(self.context.device)
        if node.turn is GradientTurn.LOOK:
            self._gives[node.at] = gradient.has_come(is_behind=is_behind)
            if not self._gives[node.at] and self._is_only(node):
                raise LookupError(_NOTHING)
            return gradient.look(is_behind=is_behind).to(self.context.device)
        assert node.value is not None
        value = self.values[node.value.node]
        if node.turn is GradientTurn.ADD:
            gradient.add(value, is_behind=is_behind)
        else:
            gradient.set(value, is_behind=is_behind)
        return None

    def _run_node(self, node_id: NodeId, order: int, port: Any) -> None:
        node = self.program.graph.nodes[node_id]
        if isinstance(node, SiteGrad):
            if not self.has_failed:
                value = self._turn(node)
                if value is not None:
                    self.values[node_id] = value
                self.fired.append(node_id)
            return
        if not isinstance(node, (Read, Write)):
            super()._run_node(node_id, order, port)
            self._note_past(node_id, node)
            return
        if self.has_failed:
            return
        side = self._sides.get(node.invoke)
        if side is None:
            raise LookupError(f"this call did not come to {node.site}: what it visits depends on its values")
        if isinstance(node, Read):
            value = side.read(node.site.selector)
            if side.has_past(node.site.selector) and not value.requires_grad:
                self._cut_off.add(node_id)
            facts = self.program.facts[node_id]
            if facts is not None and (tuple(value.shape), value.dtype) != (facts.shape, TORCH_DTYPES[facts.dtype]):
                told = f"{node.site} is {value.dtype} {list(value.shape)} in this call"
                planned = f"planned was {facts.dtype} {list(facts.shape)}"
                raise LookupError(f"{told}, {planned}: it depends on more than the arguments")
            self.values[node_id] = value.to(self.context.device)
        else:
            if side.is_graded and self._would_cut(node, side):
                raise ValueError(_CUTS)
            side.write(node.site.selector, self.values[node.value.node], in_place=node.in_place)
        self.fired.append(node_id)

    def _note_past(self, node_id: NodeId, node: Node) -> None:
        """Notes a value that lacks the past of what it was made of. What was detached is to have none."""
        if isinstance(node, Op) and node.name == "detach":
            return
        is_without = isinstance(node, Call) or not torch.is_grad_enabled()
        for part in operands(node):
            if part in self._cut_off or (is_without and _has_past(self.values.get(part))):
                self._cut_off.add(node_id)

    def _would_cut(self, node: Write, side: Side) -> bool:
        """Whether a hook's write would let gradients of the model's own through that this one does not."""
        is_off = not torch.is_grad_enabled()  # where calls go at each other's pace and another has them off
        has_past = _has_past(self.values[node.value.node]) or (node.in_place and side.has_past(node.site.selector))
        return node.value.node in self._cut_off or (is_off and has_past)


def _has_past(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return any(map(_has_past, value))
    return isinstance(value, Tensor) and value.requires_grad


def _outline(tensor: Tensor) -> RawTensor:
    return RawTensor(dtype=DTYPE_NAMES[tensor.dtype], shape=tuple(tensor.shape), data=memoryview(b""))
