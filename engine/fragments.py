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
from safetensors import safe_open
from torch import Tensor

from engine.arguments import Selector
from engine.below import finish, prepare, run_apart, travel, travels, with_parts
from engine.calls import ModuleCall
from engine.constants import Constants
from engine.copies import to_device
from engine.gradient_port import GradientPort
from engine.image_positions import PromptPositions, positions_of
from engine.imaged import plain_tokens
from engine.links import Links
from engine.memory import told_out_of_memory
from engine.named import NamedParameters
from engine.op_grads import ones_like, operand_gradient
from engine.ops import resolve, run_op
from engine.pair_views import check_pairs, pairs_of, read_pairs
from engine.results import ResultSink
from engine.slices import gather_whole, take_part
from engine.stage import StageRunner
from engine.turns import run_turn
from engine.views import InvokeRows, RowView
from engine.writes import PortValue, RowWrite
from polytrace.description import Leaf, ParameterInfo, Rows, SiteInfo
from polytrace.graph import (
    Call,
    Constant,
    Invoke,
    Last,
    Mask,
    NodeId,
    Op,
    Operand,
    OpGrad,
    Parameter,
    Port,
    Read,
    Ref,
    Save,
    SeedGrad,
    Site,
    SiteGrad,
    Stop,
    Write,
    draw_of,
    name_at,
)
from polytrace.images import images_by_digest
from polytrace.tensors import RawTensor
from scheduling.absence import without_absent
from scheduling.checks import ModelTable
from scheduling.columns import columns_of
from scheduling.levels import Levels
from scheduling.plan import Cut, Drawn, Failure, Fragment, Member, Program, SaveSlot, Stopped, ValueFacts
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
        self.loaded_bytes = 0  # of contents that were read in this pass
        self.rows: dict[int, InvokeRows] = {}  # of this pass, by invoke
        self._written: dict[tuple[Selector, int], list[tuple[NodeId, Tensor]]] = {}  # at this visit, by invoke
        self._in_place_until: dict[int, int] = {}  # invoke -> order of its last in-place write in this wave
        self._constants: dict[str, Tensor] = {}
        self.images = images_by_digest(program.invokes)  # in its prompts
        self._prompts = program.invokes if self.images else ()
        self._positions: dict[tuple[int, int], PromptPositions] = {}  # of these, by invoke and sequence
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
        self.gathered_bytes = self.loaded_bytes = 0
        self.sink.saved_bytes = 0
        self.drawn, self.stops, self.shapes = [], [], {}
        reach = self._reach.get((member.part, member.wave))
        if reach is None:
            reach = self._reach[member.part, member.wave] = _find_reach(member.program, member.wave)
        self._in_place_until = reach

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
        self._written = {}
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
                self.fail(node_id, told or _told(error), is_out_of_memory=told is not None)
        self.gathered_bytes += self.context.links.bytes.gathered - gathered
        for node_id in fragment.drops:
            self.values.pop(node_id, None)
        if isinstance(port, PortValue):
            self._own_what_stays(fragment, port)

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
            value = self._read(node_id, node, order, _visited(port))
        elif isinstance(node, Parameter):
            value = self._parameter(node_id, node)
        elif isinstance(node, Call):
            value = self._call(node_id, node)
        elif isinstance(node, Op) and node_id in self.program.below:
            value = self._below(node_id, node)
        elif isinstance(node, SiteGrad):
            assert isinstance(port, GradientPort), "a turn was planned outside a visit on the way back"
            value = run_turn(self, node, port)
        elif isinstance(node, OpGrad) and isinstance(self.program.graph.nodes[node.op], Call):
            value = self._call_gradient(node)
        elif self.has_failed:
            return
        elif isinstance(node, OpGrad):
            value = self._op_gradient(node)
        elif isinstance(node, SeedGrad):
            value = ones_like(self.values[node.of.node])
        elif isinstance(node, Op):
            value = run_op(
                node.name,
                tuple(self._resolve(arg) for arg in node.args),
                {name: self._resolve(arg) for name, arg in node.kwargs.items()},
                seed=self._seed(draw_of(node, node_id)),
                device=self.context.device,
            )
        elif isinstance(node, Constant):
            value = self._constant(node.name)
        elif isinstance(node, Mask):
            value = self._mask(node.invoke)
        elif isinstance(node, Last):
            value = next(self.values[one.node] for one in node.values if not self._is_absent(one.node))
        elif isinstance(node, Stop):
            self.stops.append((node.invoke, self.values[node.value.node]))
            return
        elif isinstance(node, Write):
            self._write(node_id, node, _visited(port))
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

    # Reading and writing

    def _read(self, node_id: NodeId, node: Read, order: int, port: PortValue) -> Tensor:
        leaf = self.context.sites[node.site][1]
        rows = self.rows_of(node_id, node)
        if port.pairs is not None:
            before = self.program.invokes[node.invoke].before
            value = read_pairs(port.pairs, rows, self.rows[node.invoke].view, before)
        elif port.attended is not None and self.program.invokes[node.invoke].before:
            value = port.attended.read(self.rows[node.invoke].view, self.program.invokes[node.invoke].before)
        elif port.heads is not None:
            value = port.heads.read(rows)
        else:
            # In one layout wherever its rows lie: torch adds up in another order over other strides.
            value = rows.read(port.tensors[node.site.selector], port.outputs).contiguous()
            if leaf.row_dim != 1:
                value = value.movedim(1, leaf.row_dim)
        if leaf.sharded_view_dim is not None and node_id not in self.program.below:
            blocks, copies = leaf.sharded_blocks, leaf.sharded_copies
            value = gather_whole(self.context.links, value, leaf.sharded_view_dim, blocks, copies)
        elif rows.is_run and (leaf.mutated or self._in_place_until.get(node.invoke, -1) >= order):
            value = value.clone()  # a snapshot: something may still write to this memory
        written = self._written.get((node.site.selector, node.invoke), ())
        if not written:
            return value
        return self._with_own_writes(node_id, value, written, self.program.invokes[node.invoke], rows, leaf.column_dim)

    def _with_own_writes(
        self,
        node_id: NodeId,
        value: Tensor,
        written: list[tuple[NodeId, Tensor]],
        invoke: Invoke,
        rows: RowView,
        column_dim: int,
    ) -> Tensor:
        """What a read of this visit sees behind its own invoke's writes of the same visit."""
        value = value.clone()
        columns = columns_of(self.program.narrowed, node_id, invoke)
        seen = value.movedim(column_dim, 1)  # views: what is put there is in the value
        for write, given in written:
            theirs = {column: place for place, column in enumerate(columns_of(self.program.narrowed, write, invoke))}
            common = [(place, theirs[column]) for place, column in enumerate(columns) if column in theirs]
            if common:
                here, there = to_device(common, value.device).T
                seen.index_copy_(1, here, given.movedim(column_dim, 1).index_select(1, there))
        if not rows.is_whole:
            real = torch.zeros(rows.shape, dtype=torch.bool, device=value.device)
            real.view(-1).index_fill_(0, rows.cells, True)
            seen.masked_fill_(~real.view(*rows.shape, *[1] * (value.ndim - 2)), 0)
        return value

    def _write(self, node_id: NodeId, node: Write, port: PortValue) -> None:
        leaf = self.context.sites[node.site][1]
        rows = self.rows_of(node_id, node)
        selector = node.site.selector
        value: Tensor = self.values[node.value.node]
        num_sequences, num_columns = rows.shape
        invoke = self.program.invokes[node.invoke]
        planned = leaf.view_shape(num_sequences, invoke.longest, num_columns, before=invoke.before)
        below = self.program.below.get(node_id)
        if below is not None:
            planned = self._local_shape(planned, below.cut)
        if tuple(value.shape) != planned:
            raise ValueError(f"the value has shape {list(value.shape)}, the site {list(planned)}")
        if port.pairs is None:
            value = value.to(port.tensors[selector].dtype)
        else:
            value = value.float()
            columns = columns_of(self.program.narrowed, node_id, invoke)
            check_pairs(value, columns, self.rows[node.invoke].view, port.pairs, invoke.before)
        written = self._written.setdefault((selector, node.invoke), [])
        is_assigned = any(not self.is_in_place(other) for other, _ in written)
        turn = len(written)
        written.append((node_id, value))
        if leaf.sharded_view_dim is not None and below is None:
            blocks, copies = leaf.sharded_blocks, leaf.sharded_copies
            value = take_part(self.context.links, value, leaf.sharded_view_dim, blocks, copies)
        if port.pairs is not None:
            value = pairs_of(value, rows, self.rows[node.invoke].view, port.pairs, invoke.before)
        if leaf.row_dim != 1:
            value = value.movedim(leaf.row_dim, 1)
        in_place = node.in_place and not is_assigned
        port.write(selector, RowWrite(rows=rows, value=value, in_place=in_place, turn=turn))

    def rows_of(self, node_id: NodeId, node: Read | Write) -> RowView:
        """The rows that a read gives, or that a write changes."""
        info, leaf = self.context.sites[node.site]
        levels = self.context.levels
        level = levels.of(info.order)
        if isinstance(node, Write):
            return self._rows(node_id, node, info, level if self._is_taped else levels.acts_from(info.order))
        if leaf.num_columns is None and levels.is_output(info.order) and node.site.selector in ((), (0,)):
            return self.rows[node.invoke].behind(level, self.program.narrowed.get(node_id))
        return self._rows(node_id, node, info, level)

    @property
    def _is_taped(self) -> bool:
        """Whether gradients are run through this pass: what is written behind a layer is written right there."""
        wave = None if self.member is None else self.program.waves[self.member.wave]
        return wave is not None and (wave.is_taped or wave.of is not None)

    def rows_at(self, fragment: Fragment) -> Iterator[int]:
        """Rows of the stream that a fragment reads or writes at a visit inside of a layer."""
        for node_id in fragment.nodes:
            node = self.program.graph.nodes[node_id]
            if isinstance(node, (Read, Write)):
                info = self.context.sites[node.site][0]
                yield from self._rows(node_id, node, info, self.context.levels.of(info.order)).numbers

    def rows_back(self, order: int) -> Iterator[int]:
        """Rows of the stream whose gradients are seen or changed at a visit, once this wave is run backwards."""
        assert self.member is not None
        for wave in self.program.waves:
            works = wave.stages if wave.of == self.member.wave else ()
            fragments = [fragment for work in works for fragment in work.fragments if fragment.order == order]
            for node in [self.program.graph.nodes[node_id] for fragment in fragments for node_id in fragment.nodes]:
                at = self.program.graph.nodes[node.at] if isinstance(node, SiteGrad) else None
                if isinstance(node, SiteGrad) and isinstance(at, (Read, Write)):
                    yield from self.rows_of(node.at, at).numbers

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

    def _rows(self, node_id: NodeId, node: Read | Write, info: SiteInfo, level: int) -> RowView:
        columns = self.program.narrowed.get(node_id)
        rows = self.rows[node.invoke]
        if node.site.port is Port.TOKEN:
            return rows.tokens(columns)
        if info.rows is Rows.DECODER:
            return rows.decoder
        if info.rows is not Rows.ALL:
            return rows.kept(columns)
        is_inside = self.context.levels.is_inside(info.order)
        return rows.inside(level, columns) if is_inside else rows.at(level, columns)

    def _own_what_stays(self, fragment: Fragment, port: PortValue) -> None:
        """Copies values that outlive the visit out of the stream, so that they do not keep all its rows alive."""
        packed = {tensor.untyped_storage().data_ptr() for tensor in port.tensors.values()}
        for node_id in fragment.nodes:
            value = self.values.get(node_id)
            if isinstance(value, Tensor) and value.untyped_storage().data_ptr() in packed:
                self.values[node_id] = value.clone()

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
            args = tuple(self._placeholder(arg) for arg in node.args)  # other ranks wait inside the module
        else:
            args = tuple(self._resolve(arg) for arg in node.args)
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

    def _call_gradient(self, node: OpGrad) -> Tensor | None:
        """The gradient with regard to what a module was called on."""
        call = self.program.graph.nodes[node.op]
        assert isinstance(call, Call)
        if self.has_failed and self.context.links.ranks == 1:
            return None
        needed = {ref.node for ref in (*node.needs, *node.gradients) if ref is not None}
        values = {part: self._placeholder(Ref(part)) if self.has_failed else self.values[part] for part in needed}
        given = [None if ref is None else values[ref.node] for ref in node.gradients]
        found = ModuleCall(self.context, call).gradient(call, node.needs[node.operand].node, values, given)
        return None if self.has_failed else found

    def _below(self, node_id: NodeId, node: Op) -> Any:
        """An op on this rank's part of a value, in two halves with what travels between them."""
        below, links = self.program.below[node_id], self.context.links
        if self.has_failed and not travels(below):
            return None
        kwargs = {name: self._resolve(arg) for name, arg in node.kwargs.items()}
        args: tuple[Any, ...] = ()
        sent = None
        if not self.has_failed:
            try:
                args = tuple(self._resolve(arg) for arg in node.args)
                if not travels(below):
                    return run_apart(below, node.name, args, kwargs, links)
                args = with_parts(below, args, links)
                sent = prepare(below, node.name, args, kwargs, links)
            except Exception as error:  # the user's, and other ranks wait for what is to travel
                if told_out_of_memory(error) is not None:
                    raise
                self.fail(node_id, _told(error))
        if sent is None and travels(below):
            args = with_parts(below, tuple(self._placeholder(arg) for arg in node.args), links)
            sent = prepare(below, node.name, args, kwargs, links)
        if sent is None:
            return None
        received = travel(below, sent, links)
        return None if self.has_failed else finish(below, node.name, args, kwargs, received, links)

    def _placeholder(self, operand: Operand) -> Any:
        facts = self.program.facts[operand.node] if isinstance(operand, Ref) else None
        if facts is None:
            return operand if not isinstance(operand, Ref) else self._resolve(operand)
        assert isinstance(operand, Ref)
        below = self.program.below.get(operand.node)
        cut = None if below is None else below.result
        shape = facts.shape if cut is None else self._local_shape(facts.shape, cut)
        return torch.zeros(shape, dtype=getattr(torch, facts.dtype), device=self.context.device)

    def _local_shape(self, shape: tuple[int, ...], cut: Cut) -> tuple[int, ...]:
        """The shape of this rank's part."""
        return (*shape[: cut.dim], cut.size // self.context.links.ranks, *shape[cut.dim + 1 :])

    def _constant(self, name: str) -> Tensor:
        if name not in self._constants:
            if name in self.program.contents:
                before = self.context.constants.read_bytes
                self._constants[name] = self.context.constants.get(self.program.contents[name])
                self.loaded_bytes += self.context.constants.read_bytes - before
                return self._constants[name]
            if self.program.request_file is None:
                constant = from_raw(self.program.constants[name])
            else:
                with safe_open(self.program.request_file, framework="pt") as stored:
                    constant = stored.get_tensor(name)
            self._constants[name] = to_device(constant, self.context.device)
        return self._constants[name]

    def positions(self, invoke: int, place: int) -> PromptPositions:
        """Of a sequence's tokens, where they follow from images."""
        if (invoke, place) not in self._positions:
            model = self.context.runner.model
            self._positions[invoke, place] = positions_of(model, self._prompts[invoke], place)
        return self._positions[invoke, place]

    def image(self, name: str) -> Tensor:
        """The pixels of an image in its prompts, which are not needed again."""
        pixels = self._constant(name)
        del self._constants[name]
        return pixels

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
            self.fail(node_id, _told(error))

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

    def _resolve(self, operand: Operand) -> Any:
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


def from_raw(raw: RawTensor) -> Tensor:
    """A tensor over the raw bytes, or over a copy where they are read-only. The caller changes nothing in it."""
    dtype = getattr(torch, raw.dtype)
    if len(raw.data) == 0:
        return torch.empty(raw.shape, dtype=dtype)
    data = bytearray(raw.data) if raw.data.readonly else raw.data
    return torch.frombuffer(data, dtype=torch.uint8).view(dtype).reshape(raw.shape)


def _visited(port: PortValue | GradientPort | None) -> PortValue:
    assert isinstance(port, PortValue), "a read or write was planned outside a visit"
    return port


def _shape(value: Any) -> str:
    return str(list(value.shape)) if isinstance(value, Tensor) else type(value).__name__


def _told(error: Exception) -> str:
    """The first lines of an error, for its user."""
    if isinstance(error, KeyError):
        return f"a value it needs is missing: {error}"
    return str(error).strip().split("\n")[0][:500] or type(error).__name__
