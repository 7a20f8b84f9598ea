"""Runs the nodes of one request, visit by visit, and keeps its failures to itself.

Owns a request's values on one shard from its first wave to its last. A node that fails marks the request as failed:
its later nodes do nothing and its rows go on unmodified, but what other ranks wait for (gathers of sharded sites and
parameters, calls of modules that communicate) still happens, so that every shard runs every transfer of the plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from engine.links import Links
from engine.ops import resolve, run_op
from engine.results import ResultSink
from engine.sites import port_leaves
from engine.slices import gather_whole, take_part
from engine.stage import StageRunner
from engine.views import RowView
from polytrace.description import Leaf, ParameterInfo, Rows, SiteInfo
from polytrace.graph import Call, Constant, Mask, NodeId, Op, Operand, Parameter, Read, Ref, Save, Site, Write
from polytrace.tensors import RawTensor
from scheduling.plan import Failure, Fragment, Program, ValueFacts


@dataclass(frozen=True, slots=True, kw_only=True)
class InvokeRows:
    """One invoke's rows in the pass, in both row spaces."""

    all: RowView
    kept: RowView | None


class PortValue:
    """A port's value during one visit: what was there, and what is handed on."""

    def __init__(self, value: Any) -> None:
        self.original = value
        self.tensors = port_leaves(value)[1]  # as the model made them; in-place writes land here
        self.handed_on: dict[tuple[int | str, ...], Tensor] = {}  # copies that carry assigned rows

    def current(self, selector: tuple[int | str, ...]) -> Tensor:
        """What the port hands on at the moment."""
        return self.handed_on.get(selector, self.tensors[selector])

    def for_assignment(self, selector: tuple[int | str, ...]) -> Tensor:
        """The copy that takes assigned rows; made once a visit, shared by all requests."""
        if selector not in self.handed_on:
            self.handed_on[selector] = self.tensors[selector].clone()
        return self.handed_on[selector]

    def result(self) -> Any:
        """What the hook returns: the original object when nothing was assigned."""
        value = self.original
        for selector, tensor in self.handed_on.items():
            value = _with_member(value, selector, tensor)
        return value


@dataclass(slots=True, kw_only=True)
class ShardContext:
    """What running nodes needs of the shard. One a shard, shared by all requests."""

    runner: StageRunner
    links: Links
    sites: Mapping[Site, tuple[SiteInfo, Leaf]]
    parameters: Mapping[str, Tensor]  # local parts, by path
    parameter_infos: Mapping[str, ParameterInfo]
    packed_blocks: Mapping[str, int]  # module path -> blocks of its fused output dimension
    device: torch.device


class RequestState:
    """One request on one shard."""

    def __init__(self, program: Program, context: ShardContext, sink: ResultSink) -> None:
        self.program = program
        self.context = context
        self.sink = sink
        self.values: dict[NodeId, Any] = {}
        self.failure: Failure | None = None
        self.fired: list[NodeId] = []  # reads, writes and saves of this pass
        self.rows: dict[int, InvokeRows] = {}  # of this pass, by invoke
        self._assigned: set[tuple[str, str, int]] = set()  # (port, selector, invoke) assigned at this visit
        self._in_place_until: dict[int, int] = {}  # invoke -> order of its last in-place write in this wave
        self._assigns: set[tuple[int, int]] = set()  # (invoke, order) of this wave's assignments
        self._constants: dict[str, Tensor] = {}

    @property
    def has_failed(self) -> bool:
        return self.failure is not None

    def begin_wave(self, wave: int, rows: dict[int, InvokeRows]) -> None:
        """Takes the rows of this pass and notes which writes can reach a read's memory."""
        self.rows = rows
        self.fired = []
        self._in_place_until, self._assigns = {}, set()
        for work in self.program.waves[wave].stages:
            for fragment in work.fragments:
                for node_id in fragment.nodes:
                    node = self.program.graph.nodes[node_id]
                    if isinstance(node, Write) and node.in_place:
                        reach = max(self._in_place_until.get(node.invoke, fragment.order), fragment.order)
                        self._in_place_until[node.invoke] = reach
                    elif isinstance(node, Write):
                        self._assigns.add((node.invoke, fragment.order))

    def fail(self, node: NodeId | None, message: str) -> None:
        """Marks the request as failed; the first failure stands."""
        if self.failure is None:
            self.failure = Failure(request=self.program.request, node=node, message=message)

    def run(self, fragment: Fragment, port: PortValue | None) -> None:
        """Runs a fragment at a visit (None at the prologue), then drops what the stage no longer needs."""
        self._assigned = set()
        for node_id in fragment.nodes:
            try:
                self._run_node(node_id, fragment.order, port)
            except Exception as error:  # noqa: BLE001 - the edge between a user's program and the shared pass
                self.fail(node_id, _told(error))
        for node_id in fragment.drops:
            self.values.pop(node_id, None)
        if port is not None:
            self._own_what_stays(fragment, port)

    def held(self, node_id: NodeId, facts: ValueFacts) -> Tensor:
        """A value to carry, at its planned shape whatever happened."""
        value = self.values.get(node_id)
        if isinstance(value, Tensor) and tuple(value.shape) == facts.shape:
            return value
        if not self.has_failed:
            self.fail(node_id, f"its value to carry has shape {_shape(value)}, planned was {list(facts.shape)}")
        return torch.zeros(facts.shape, dtype=getattr(torch, facts.dtype), device=self.context.device)

    def _run_node(self, node_id: NodeId, order: int, port: PortValue | None) -> None:
        node = self.program.graph.nodes[node_id]
        if isinstance(node, Read):
            value = self._read(node, order, _visited(port))
        elif isinstance(node, Parameter):
            value = self._parameter(node)
        elif isinstance(node, Call):
            value = self._call(node_id, node)
        elif self.has_failed:
            return
        elif isinstance(node, Op):
            value = run_op(
                node.name,
                tuple(self._resolve(arg) for arg in node.args),
                {name: self._resolve(arg) for name, arg in node.kwargs.items()},
                seed=(self.program.seed, node_id),
            )
        elif isinstance(node, Constant):
            value = self._constant(node.name)
        elif isinstance(node, Mask):
            value = self._mask(node.invoke)
        elif isinstance(node, Write):
            self._write(node, _visited(port))
            self.fired.append(node_id)
            return
        else:
            self._save(node_id, node)
            self.fired.append(node_id)
            return
        if not self.has_failed:
            self.values[node_id] = value
            if isinstance(node, Read):
                self.fired.append(node_id)

    # Reading and writing

    def _read(self, node: Read, order: int, port: PortValue) -> Tensor:
        leaf, rows = self._leaf(node)
        value = rows.read(port.current(node.site.selector))
        if leaf.sharded_dim is not None:
            return gather_whole(self.context.links, value, 2 + leaf.sharded_dim, leaf.sharded_blocks)
        is_written_later = self._in_place_until.get(node.invoke, -1) >= order or (node.invoke, order) in self._assigns
        if rows.rows is None and (leaf.mutated or is_written_later):
            return value.clone()  # a snapshot: something may still write to this memory
        return value

    def _write(self, node: Write, port: PortValue) -> None:
        leaf, rows = self._leaf(node)
        selector = node.site.selector
        value: Tensor = self.values[node.value.node]
        planned = (rows.num_sequences, rows.num_columns, *leaf.tail)
        if tuple(value.shape) != planned:
            raise ValueError(f"the value has shape {list(value.shape)}, the site {list(planned)}")
        value = value.to(port.tensors[selector].dtype)
        if leaf.sharded_dim is not None:
            value = take_part(self.context.links, value, 2 + leaf.sharded_dim, leaf.sharded_blocks)
        key = (node.site.port.value, repr(selector), node.invoke)
        if node.in_place and key not in self._assigned:
            rows.write(port.tensors[selector], value)
            if selector in port.handed_on:
                rows.write(port.handed_on[selector], value)
            return
        rows.write(port.for_assignment(selector), value)
        self._assigned.add(key)

    def _leaf(self, node: Read | Write) -> tuple[Leaf, RowView]:
        info, leaf = self.context.sites[node.site]
        rows = self.rows[node.invoke]
        view = rows.all if info.rows is Rows.ALL else rows.kept
        if view is None:
            raise ValueError(f"no rows were kept for {node.site}")
        return leaf, view

    def _own_what_stays(self, fragment: Fragment, port: PortValue) -> None:
        """Copies values that outlive the visit out of the stream, so that they do not keep all its rows alive."""
        packed = {tensor.untyped_storage().data_ptr() for tensor in (*port.tensors.values(), *port.handed_on.values())}
        for node_id in fragment.nodes:
            value = self.values.get(node_id)
            if isinstance(value, Tensor) and value.untyped_storage().data_ptr() in packed:
                self.values[node_id] = value.clone()

    # Values that come from elsewhere

    def _parameter(self, node: Parameter) -> Tensor:
        local = self.context.parameters[node.path]
        info = self.context.parameter_infos[node.path]
        if info.sharded_dim is None:
            return local.detach()
        blocks = self.context.packed_blocks.get(node.path.rpartition(".")[0], 1)
        return gather_whole(self.context.links, local.detach(), info.sharded_dim, blocks)

    def _call(self, node_id: NodeId, node: Call) -> Any:
        module = self.context.runner.model.get_submodule(node.module)
        if self.has_failed:
            if self.context.links.ranks == 1:
                return None
            args = tuple(self._placeholder(arg) for arg in node.args)  # other ranks wait inside the module
        else:
            args = tuple(self._resolve(arg) for arg in node.args)
        if isinstance(module, nn.Embedding):
            _check_ids(module, args)
        with self.context.runner.calling(), torch.no_grad():
            return module(*args)

    def _placeholder(self, operand: Operand) -> Any:
        facts = self.program.facts[operand.node] if isinstance(operand, Ref) else None
        if facts is None:
            return self._resolve(operand)
        return torch.zeros(facts.shape, dtype=getattr(torch, facts.dtype), device=self.context.device)

    def _constant(self, name: str) -> Tensor:
        if name not in self._constants:
            if self.program.request_file is None:
                self._constants[name] = from_raw(self.program.constants[name]).to(self.context.device)
            else:
                with safe_open(self.program.request_file, framework="pt", device=str(self.context.device)) as stored:
                    self._constants[name] = stored.get_tensor(name)
        return self._constants[name]

    def _mask(self, invoke: int) -> Tensor:
        sequences = self.program.invokes[invoke].sequences
        longest = self.program.invokes[invoke].longest
        pads = torch.tensor([longest - len(sequence) for sequence in sequences], device=self.context.device)
        return torch.arange(longest, device=self.context.device)[None] >= pads[:, None]

    def _save(self, node_id: NodeId, node: Save) -> None:
        if self.context.links.rank == 0:
            slot = next(slot for slot in self.program.saves if slot.node == node_id)
            self.sink.put(slot, self.values[node.value.node])

    def _resolve(self, operand: Operand) -> Any:
        return resolve(operand, self.values)


def from_raw(raw: RawTensor) -> Tensor:
    """A tensor over a copy of the raw bytes (they may be read-only or unaligned)."""
    dtype = getattr(torch, raw.dtype)
    if raw.data.nbytes == 0:
        return torch.empty(raw.shape, dtype=dtype)
    return torch.frombuffer(bytearray(raw.data), dtype=torch.uint8).view(dtype).reshape(raw.shape)


def _check_ids(module: nn.Embedding, args: tuple[Any, ...]) -> None:
    """An id out of range must fail its request here: on a GPU it would take the whole shard down."""
    for ids in args:
        if (
            isinstance(ids, Tensor)
            and ids.numel()
            and not 0 <= int(ids.min()) <= int(ids.max()) < module.num_embeddings
        ):
            raise IndexError(
                f"ids from {int(ids.min())} to {int(ids.max())}, the embedding has {module.num_embeddings}"
            )


def _visited(port: PortValue | None) -> PortValue:
    assert port is not None, "a read or write was planned outside a visit"
    return port


def _with_member(container: Any, selector: tuple[int | str, ...], tensor: Tensor) -> Any:
    """The container with one member replaced; tuples are rebuilt, mappings are copied."""
    if not selector:
        return tensor
    key, *rest = selector
    member = _with_member(container[key], tuple(rest), tensor)
    if isinstance(container, Mapping):
        changed: Any = container.copy()  # type: ignore[attr-defined]
        changed[key] = member
        return changed
    members = [member if place == key else old for place, old in enumerate(container)]
    if isinstance(container, list):
        return members
    return type(container)(*members) if hasattr(container, "_fields") else tuple(members)


def _shape(value: Any) -> str:
    return str(list(value.shape)) if isinstance(value, Tensor) else type(value).__name__


def _told(error: Exception) -> str:
    """The first lines of an error, for its user."""
    if isinstance(error, KeyError):
        return f"a value it needs is missing: {error}"
    return str(error).strip().split("\n")[0][:500] or type(error).__name__
