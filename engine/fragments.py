"""Runs the nodes of one request, visit by visit, and keeps its failures to itself.

Owns a request's values on one shard from its first wave to its last. A node that fails marks the request as failed:
its later nodes do nothing and its rows go on unmodified, but what other ranks wait for (gathers of sharded sites and
parameters, calls of modules that communicate) still happens, so that every shard runs every transfer of the plan.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from engine.arguments import Selector
from engine.brought import Brought
from engine.calls import ModuleCall
from engine.constants import Constants
from engine.copies import to_device
from engine.gradient_port import GradientPort
from engine.imaged import plain_tokens
from engine.links import Links
from engine.memory import told_out_of_memory
from engine.named import NamedParameters
from engine.op_grads import ones_like, operand_gradient
from engine.ops import resolve, run_op
from engine.rank_nodes import call_gradient, placeholder, run_below, told_of
from engine.results import ResultSink
from engine.site_rows import own_what_stays, read_site, write_site
from engine.slices import gather_whole
from engine.stage import StageRunner
from engine.turns import run_turn
from engine.views import InvokeRows
from engine.writes import PortValue
from polytrace.description import Leaf, ParameterInfo, SiteInfo
from polytrace.graph import (
    Call,
    Constant,
    Last,
    Mask,
    NodeId,
    Op,
    Operand,
    OpGrad,
    Parameter,
    Read,
    Save,
    SeedGrad,
    Site,
    SiteGrad,
    Stop,
    Write,
    draw_of,
    name_at,
)
from scheduling.absence import without_absent
from scheduling.checks import ModelTable
from scheduling.levels import Levels
from scheduling.plan import Drawn, Failure, Fragment, Member, Program, SaveSlot, Stopped, ValueFacts
from scheduling.steps import GENERATE


@dataclass(slots=True, kw_only=True)
class ShardContext:
    """What running nodes needs of the shard. One a shard, shared by all requests."""

    runner: StageRunner
    links: Links
    sites: Mapping[Site, tuple[SiteInfo, Leaf]]
    parameters: NamedParameters  # local parts, by path
    parameter_infos: Mapping[str, ParameterInfo]
    table: ModelTable
    levels: Levels
    device: torch.device
    constants: Constants


class RequestState:
    """One request on one shard."""

    def __init__(self, program: Program, context: ShardContext, sink: ResultSink) -> None:
        self.program = program
        self.context = context
        self.sink = sink
        self.values: dict[NodeId, Any] = {}
        self.failure: Failure | None = None
        self.fired: list[NodeId] = []  # reads, writes and saves of this pass
        self.gathered_bytes = 0  # received from other ranks in this pass
        self.rows: dict[int, InvokeRows] = {}  # of this pass, by invoke
        self.written: dict[tuple[Selector, int], list[tuple[NodeId, Tensor]]] = {}  # at this visit, by invoke
        self.in_place_until: dict[int, int] = {}  # invoke -> order of its last in-place write in this wave
        self.brought = Brought(program, context)
        self._slots: dict[NodeId, SaveSlot] = {}
        self._writes: dict[tuple[Site, int], list[NodeId]] | None = None  # see `writes_of`
        self._reach: dict[tuple[int | None, int], dict[int, int]] = {}  # see `begin_wave`, by part and wave
        # of a generation
        self.member: Member | None = None  # what it is in this pass
        self.left: dict[NodeId, Any] = {}  # what earlier steps left, by the request's own nodes
        self.histories: dict[tuple[int, int], list[int]] = {}  # tokens of sequences that go on, as far as they are read
        self.drawn: list[Drawn] = []  # in this pass
        self.stops: list[tuple[int, Tensor]] = []  # invokes and who of them ends, in this pass
        self.shapes: dict[str, tuple[int, ...]] = {}  # of saves that came out smaller than planned, in this pass

    @property
    def has_failed(self) -> bool:
        return self.failure is not None

    def begin_wave(self, member: Member, rows: dict[int, InvokeRows]) -> None:
        """Takes the rows of this pass and notes which writes can reach a read's memory."""
        if self.member is None or self.member.step != member.step or self.member.part != member.part:
            self._begin_program(member)
        self.member = member
        self.rows = rows
        self.fired = []
        self.gathered_bytes = self.brought.loaded_bytes = 0
        self.sink.saved_bytes = 0
        self.drawn, self.stops, self.shapes = [], [], {}
        reach = self._reach.get((member.part, member.wave))
        if reach is None:
            reach = self._reach[member.part, member.wave] = _find_reach(member.program, member.wave)
        self.in_place_until = reach

    def _begin_program(self, member: Member) -> None:
        """The request's first program, or the next step of its generation."""
        self.program = member.program
        self._writes = None
        self._slots = {slot.node: slot for slot in member.program.saves}
        self.values = {node: self.left[left] for node, left in member.binds.items() if left in self.left}
        if member.part is None:
            self.histories = {
                (index, place): plain_tokens(self.context.runner.model, tokens)
                for index, invoke in enumerate(member.program.invokes)
                if invoke.generation is not None and invoke.generation.sampling.repetition_penalty != 1
                for place, tokens in enumerate(invoke.sequences)
            }

    def end_program(self, member: Member) -> None:
        """Keeps what later steps need of this one, and nothing else."""
        for node in member.drops:
            self.left.pop(node, None)
        for node, left in member.holds.items():
            if node in self.values:
                self.left[left] = self.values[node]
        self.values = {}

    def note_tokens(self, invoke: int, places: Sequence[int], tokens: Sequence[int]) -> None:
        """What sequences go on with."""
        for place, token in zip(places, tokens, strict=True):
            history = self.histories.get((invoke, place))
            if history is not None:
                history.append(token)

    def stopped(self) -> tuple[Stopped, ...]:
        """Whom the graph ends behind this pass."""
        found = []
        for invoke, value in self.stops:
            count = len(self.program.invokes[invoke].sequences)
            found.append(Stopped(invoke=invoke, is_over=tuple((value != 0).flatten().expand(count).tolist())))
        return tuple(found)

    def fail(self, node: NodeId | None, message: str, *, is_out_of_memory: bool = False) -> None:
        """Marks the request as failed; the first failure stands."""
        if self.failure is None:
            self.failure = Failure(
                request=self.program.request, node=node, message=message, is_out_of_memory=is_out_of_memory
            )

    def run(self, fragment: Fragment, port: PortValue | GradientPort | None) -> None:
        """Runs a fragment at a visit (None at the prologue), then drops what the stage no longer needs."""
        self.written = {}
        gathered = self.context.links.bytes.gathered
        absent = self.member.absent if self.member is not None else ()
        for node_id in fragment.nodes:
            if node_id in absent:
                continue
            try:
                self._run_node(node_id, fragment.order, port)
            except Exception as error:  # the edge between a user's program and the shared pass
                told = told_out_of_memory(error)
                if told is not None and self.context.links.ranks > 1:
                    raise  # other ranks have the memory, and may wait for this one inside the node
                if told is not None:
                    self.context.constants.clear()  # it may be tried once more
                self.fail(node_id, told or told_of(error), is_out_of_memory=told is not None)
        self.gathered_bytes += self.context.links.bytes.gathered - gathered
        for node_id in fragment.drops:
            self.values.pop(node_id, None)
        if isinstance(port, PortValue):
            own_what_stays(self, fragment, port)

    def held(self, node_id: NodeId, facts: ValueFacts) -> Tensor:
        """A value to carry, at its planned shape whatever happened."""
        value = self.values.get(node_id)
        if isinstance(value, Tensor) and tuple(value.shape) == facts.shape:
            return value
        if not self.has_failed and not self._is_absent(node_id):
            self.fail(node_id, f"its value to carry has shape {_shape(value)}, planned was {list(facts.shape)}")
        return torch.zeros(facts.shape, dtype=getattr(torch, facts.dtype), device=self.context.device)

    def _is_absent(self, node_id: NodeId) -> bool:
        return self.member is not None and node_id in self.member.absent

    def _run_node(self, node_id: NodeId, order: int, port: PortValue | GradientPort | None) -> None:
        node = self.program.graph.nodes[node_id]
        value: Any
        if isinstance(node, Read):
            value = read_site(self, node_id, node, order, _visited(port))
        elif isinstance(node, Parameter):
            value = self._parameter(node_id, node)
        elif isinstance(node, Call):
            value = self._call(node_id, node)
        elif isinstance(node, Op) and node_id in self.program.below:
            value = run_below(self, node_id, node)
        elif isinstance(node, SiteGrad):
            assert isinstance(port, GradientPort), "a turn was planned outside a visit on the way back"
            value = run_turn(self, node, port)
        elif isinstance(node, OpGrad) and isinstance(self.program.graph.nodes[node.op], Call):
            value = call_gradient(self, node)
        elif self.has_failed:
            return
        elif isinstance(node, OpGrad):
            value = self._op_gradient(node)
        elif isinstance(node, SeedGrad):
            value = ones_like(self.values[node.of.node])
        elif isinstance(node, Op):
            value = run_op(
                node.name,
                tuple(self.resolve(arg) for arg in node.args),
                {name: self.resolve(arg) for name, arg in node.kwargs.items()},
                seed=self._seed(draw_of(node, node_id)),
                device=self.context.device,
            )
        elif isinstance(node, Constant):
            value = self.constant(node.name)
        elif isinstance(node, Mask):
            value = self._mask(node.invoke)
        elif isinstance(node, Last):
            value = next(self.values[one.node] for one in node.values if not self._is_absent(one.node))
        elif isinstance(node, Stop):
            self.stops.append((node.invoke, self.values[node.value.node]))
            return
        elif isinstance(node, Write):
            write_site(self, node_id, node, _visited(port))
            self.fired.append(node_id)
            return
        else:
            assert isinstance(node, Save), "what earlier steps left does not run"
            self._save(node_id, self.values[node.value.node])
            self.fired.append(node_id)
            return
        if not self.has_failed:
            if value is not None:
                self.values[node_id] = value
            if isinstance(node, (Read, SiteGrad)):
                self.fired.append(node_id)

    def reads_of(self, fragment: Fragment) -> Iterator[int]:
        """Invokes of whose rows a fragment reads at its visit."""
        nodes = self.program.graph.nodes
        yield from (node.invoke for node in map(nodes.__getitem__, fragment.nodes) if isinstance(node, Read))

    def is_draw(self, fragment: Fragment) -> bool:
        """Whether a fragment at the tokens only stands for their being drawn: nobody looks at what it reads."""
        nodes = self.program.graph.nodes
        return all(isinstance(node, Read) and node.where == GENERATE for node in map(nodes.__getitem__, fragment.nodes))

    def note_draw(self, fragment: Fragment) -> None:
        """Such a fragment's tokens have been drawn."""
        if self.failure is None and self.member is not None:
            absent = self.member.absent
            self.fired += [node for node in fragment.nodes if node not in absent] if absent else fragment.nodes

    def is_in_place(self, write: NodeId) -> bool:
        """Whether a node is a write to all who hold the tensor."""
        node = self.program.graph.nodes[write]
        return isinstance(node, Write) and node.in_place

    def writes_of(self, site: Site, invoke: int) -> Sequence[NodeId]:
        """The program's writes of an invoke to a site, in order."""
        if self._writes is None:
            self._writes = {}
            for place, node in enumerate(self.program.graph.nodes):
                if isinstance(node, Write):
                    self._writes.setdefault((node.site, node.invoke), []).append(NodeId(place))
        return self._writes.get((site, invoke), ())

    # Values that come from elsewhere

    def _parameter(self, node_id: NodeId, node: Parameter) -> Tensor:
        info = self.context.parameter_infos[node.path]
        if info.is_of_whole and info.of is not None:
            return self.context.parameters.of_whole(node.path, self._whole_parameter(info.of))
        return self._local_parameter(node.path) if node_id in self.program.below else self._whole_parameter(node.path)

    def _whole_parameter(self, path: str) -> Tensor:
        """A parameter, put together from the ranks' parts where they split it."""
        info, local = self.context.parameter_infos[path], self._local_parameter(path)
        if info.sharded_dim is None:
            return local
        return gather_whole(self.context.links, local, info.sharded_dim, info.sharded_blocks, info.sharded_copies)

    def _local_parameter(self, path: str) -> Tensor:
        return self.context.parameters[path].detach().to(self.context.device)  # it may be offloaded

    def _call(self, node_id: NodeId, node: Call) -> Any:
        call = ModuleCall(self.context, node)
        if self.has_failed:
            if self.context.links.ranks == 1:
                return None
            args = tuple(placeholder(self, arg) for arg in node.args)  # other ranks wait inside the module
        else:
            args = tuple(self.resolve(arg) for arg in node.args)
        value = call.run(args)
        return value if node_id in self.program.below else call.joined(value)

    def _op_gradient(self, node: OpGrad) -> Tensor:
        """The gradient with regard to an operand of an op."""
        op = self.program.graph.nodes[node.op]
        assert isinstance(op, Op)

        def again(values: Mapping[NodeId, Any]) -> Any:
            return run_op(
                op.name,
                tuple(resolve(arg, values) for arg in op.args),
                {name: resolve(arg, values) for name, arg in op.kwargs.items()},
                seed=self._seed(draw_of(op, node.op)),
                device=self.context.device,
            )

        return operand_gradient(node, self.values, again)

    def constant(self, name: str) -> Tensor:
        """One that the program names. The caller changes nothing in it."""
        return self.brought.constant(self.program, name)

    def _mask(self, invoke: int) -> Tensor:
        sequences = self.program.invokes[invoke].sequences
        longest = self.program.invokes[invoke].longest
        pads = to_device([longest - len(sequence) for sequence in sequences], self.context.device)
        return torch.arange(longest, device=self.context.device)[None] >= pads[:, None]

    def save(self, node_id: NodeId, value: Tensor | None) -> None:
        """Saves a value that was made beside others' (None: one that it has)."""
        try:
            node = self.program.graph.nodes[node_id]
            assert isinstance(node, Save)
            self._save(node_id, self.values[node.value.node] if value is None else value)
        except Exception as error:  # noqa: BLE001  the edge between a user's program and the shared pass
            self.fail(node_id, told_of(error))

    def _save(self, node_id: NodeId, value: Any) -> None:
        if self.context.links.rank == 0:
            slot = self._slots[node_id]
            member = self.member
            if member is not None and (slot.is_of_step or member.part is not None):
                slot = self._slot_now(slot, value, member)
            self.sink.put(slot, value)

    def _slot_now(self, slot: SaveSlot, value: Any, member: Member) -> SaveSlot:
        """Where a save goes at this step. Behind a loop that ended early lists are shorter than was planned."""
        name = name_at(slot.name, member.step) if slot.is_of_step else slot.name
        offset = slot.offset + member.offset if slot.keep is None else slot.offset
        facts = slot.facts
        if member.absent and isinstance(value, Tensor) and value.nbytes <= facts.num_bytes:
            facts = replace(facts, shape=tuple(value.shape), num_bytes=value.nbytes)
            if facts.shape != slot.facts.shape:
                self.shapes[name] = facts.shape
        return replace(slot, name=name, offset=offset, facts=facts)

    def _seed(self, draw: int) -> tuple[int, ...]:
        """Of a random op."""
        step = 0 if self.member is None else self.member.step
        return (self.program.seed, draw, step) if step else (self.program.seed, draw)

    def resolve(self, operand: Operand) -> Any:
        """An operand with values in the place of nodes."""
        if self.member is not None and self.member.absent:
            operand = without_absent(operand, self.member.absent)
        return resolve(operand, self.values)


def _find_reach(program: Program, wave: int) -> dict[int, int]:
    """Invoke -> the order of its last in-place write in a wave."""
    found: dict[int, int] = {}
    for work in program.waves[wave].stages:
        for fragment in work.fragments:
            for node_id in fragment.nodes:
                node = program.graph.nodes[node_id]
                if isinstance(node, Write) and node.in_place:
                    found[node.invoke] = max(found.get(node.invoke, fragment.order), fragment.order)
    return found


def _visited(port: PortValue | GradientPort | None) -> PortValue:
    assert isinstance(port, PortValue), "a read or write was planned outside a visit"
    return port


def _shape(value: Any) -> str:
    return str(list(value.shape)) if isinstance(value, Tensor) else type(value).__name__
