"""One request of many prompts: the body's graph for each of them, and what combines their values where the model is.

Every prompt is an invoke of its own, so its rows have the bits that they have alone, whatever the cut: prompts share a
pass, and no op sees two of them. What is saved: each prompt's own value, and of combined values what the client needs
of this request's prompts together (`polytrace.maps.running` goes on from there).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from polytrace.graph import (
    Constant,
    DType,
    Graph,
    Invoke,
    Node,
    NodeId,
    Op,
    Operand,
    Options,
    Parameter,
    Ref,
    Request,
    Save,
)
from polytrace.maps.bodies import Measured, Output, Recorded
from polytrace.maps.combining import Combined, Way
from polytrace.pruning import moved
from polytrace.tensors import RawTensor, itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One prompt of the dataset."""

    number: int  # in the dataset
    sequence: tuple[int, ...]
    recorded: Recorded


def request_of(members: Sequence[Member], measured: Measured, options: Options) -> Request:
    """Saves: `value/place` for each prompt's own, `value:part` for what combined values need."""
    build = _Build()
    places = [build.body(place, member.recorded) for place, member in enumerate(members)]
    for name, output in members[0].recorded.outputs.items():
        values = [own[member.recorded.outputs[name].node] for own, member in zip(places, members, strict=True)]
        combine(build, name, output, values, measured, [len(member.sequence) for member in members])
    constants: dict[str, RawTensor] = {}
    for member in members:
        constants.update(member.recorded.constants)
    return Request(
        graph=Graph(nodes=tuple(build.nodes)),
        invokes=tuple(Invoke(sequences=(member.sequence,)) for member in members),
        constants=constants,
        options=options,
    )


def request_of_all(
    recorded: Recorded, prompts: Sequence[tuple[int, ...]], measured: Measured, options: Options
) -> Request:
    """The prompts as one view, for a body that mixes them. Saves `value/0`, the value of all, and `value:part`."""
    build = _Build()
    places = build.body(0, recorded)
    for name, output in recorded.outputs.items():
        value = places[output.node]
        if output.combined is None:
            build.where = output.where
            build.save(f"{name}/0", value)
        else:
            rows = [build.op("getitem", value, slice(place, place + 1)) for place in range(len(prompts))]
            combine(build, name, output, rows, measured, [len(prompt) for prompt in prompts])
    return Request(
        graph=Graph(nodes=tuple(build.nodes)),
        invokes=(Invoke(sequences=tuple(prompts)),),
        constants=recorded.constants,
        options=options,
    )


def combine(
    build: _Build, name: str, output: Output, values: list[NodeId], measured: Measured, lengths: Sequence[int]
) -> None:
    """Saves what becomes of one value of the body."""
    build.where = output.where
    combined = output.combined
    if combined is None:
        for place, value in enumerate(values):
            build.save(f"{name}/{place}", value)
        return
    dtype = measured.shapes[name].dtype
    if combined.way is Way.TOP_K:
        _save_top(build, name, combined, values, dtype)
        return
    if combined.is_of_tokens:
        values = [build.op("flatten", value, 0, 1) for value in values]
    rows = build.op("cat", [Ref(value) for value in values], 0) if len(values) > 1 else values[0]
    rank = len(measured.shapes[name].shape) - combined.is_of_tokens
    if combined.way is Way.COVARIANCE:
        num_rows = sum(lengths) if combined.is_of_tokens else len(lengths)
        features = measured.shapes[name].shape[-1]
        is_tall = num_rows * itemsize(dtype) > (features + 1) * 8
        _save_moments(build, name, rows, rank) if is_tall else build.save(f"{name}:rows", build.exact(rows, dtype))
    else:
        _SAVED[combined.way](build, name, rows, dtype)
        if combined.way is Way.MEAN:
            _save_count(build, name, rows, rank)


def _save_sum(build: _Build, name: str, rows: NodeId, dtype: str) -> None:
    wide = build.cast(rows, "float64" if "float" in dtype else "int64")
    build.save(f"{name}:sum", build.op("sum", wide, dim=0))


def _save_max(build: _Build, name: str, rows: NodeId, dtype: str) -> None:
    build.save(f"{name}:max", build.op("amax", build.exact(rows, dtype), dim=0))


def _save_min(build: _Build, name: str, rows: NodeId, dtype: str) -> None:
    build.save(f"{name}:min", build.op("amin", build.exact(rows, dtype), dim=0))


def _save_times(build: _Build, name: str, rows: NodeId, dtype: str) -> None:
    build.save(f"{name}:times", build.op("sum", build.cast(build.op("ne", rows, 0), "int64"), dim=0))


_SAVED: Mapping[Way, Callable[[_Build, str, NodeId, str], None]] = {
    Way.SUM: _save_sum,
    Way.MEAN: _save_sum,
    Way.MAX: _save_max,
    Way.MIN: _save_min,
    Way.COUNT: _save_times,
}


def _save_count(build: _Build, name: str, rows: NodeId, rank: int) -> None:
    """How many rows there are: one 1 for each, added."""
    column = build.op("getitem", rows, (slice(None), *[0] * (rank - 1))) if rank > 1 else rows
    ones = build.op("ones_like", column, dtype=DType("int64"))
    build.save(f"{name}:count", build.op("sum", ones, dim=0))


def _save_moments(build: _Build, name: str, rows: NodeId, rank: int) -> None:
    """Rows, their mean, and the sum of products of what differs from it, in two steps that lose nothing."""
    wide = build.cast(rows, "float64")
    mean = build.op("mean", wide, dim=0)
    rest = build.op("sub", wide, Ref(mean))
    build.save(f"{name}:mean", mean)
    build.save(f"{name}:products", build.op("matmul", build.op("t", rest), Ref(rest)))
    _save_count(build, name, rows, rank)


def _save_top(build: _Build, name: str, combined: Combined, values: list[NodeId], dtype: str) -> None:
    """Each prompt's k largest, in an order that does not depend on how a kernel treats equal ones."""
    for place, value in enumerate(values):
        flat = build.op("flatten", build.exact(value, dtype))
        order = build.op("sort", flat, stable=True, descending=True)
        for member, part in enumerate(("values", "places")):
            one = build.op("item", order, member)
            build.save(f"{name}:{part}/{place}", build.op("getitem", one, slice(None, combined.number)))


class _Build:
    """The nodes of a request while it is put together."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.where = ""  # the user's line that the next nodes belong to
        self._shared: dict[tuple[int | type, int | str], NodeId] = {}

    def body(self, invoke: int, recorded: Recorded) -> dict[NodeId, NodeId]:
        """Adds the body for one invoke; where each of its nodes went."""
        places: dict[NodeId, NodeId] = {}
        for position, (node, is_shared) in enumerate(zip(recorded.nodes, recorded.is_shared, strict=True)):
            key = _key(node, recorded, position) if is_shared else None
            if key is not None and key in self._shared:
                places[NodeId(position)] = self._shared[key]
                continue
            own: Any = moved(node, places)
            if invoke and hasattr(own, "invoke"):
                own = replace(own, invoke=invoke)
            places[NodeId(position)] = place = self.add(own)
            if key is not None:
                self._shared[key] = place
        return places

    def add(self, node: Node) -> NodeId:
        self.nodes.append(node)
        return NodeId(len(self.nodes) - 1)

    def op(self, name: str, first: NodeId | list[Operand], *args: Any, **kwargs: Any) -> NodeId:
        base: Operand = first if isinstance(first, list) else Ref(first)
        return self.add(Op(name=name, args=(base, *args), kwargs=kwargs, where=self.where))

    def cast(self, value: NodeId, dtype: str) -> NodeId:
        return self.op("to", value, DType(dtype))

    def exact(self, value: NodeId, dtype: str) -> NodeId:
        """In a dtype that numpy has, with no bit lost."""
        return self.cast(value, "float32") if dtype in ("bfloat16", "float16") else value

    def save(self, name: str, value: NodeId) -> None:
        self.add(Save(name=name, value=Ref(value), where=self.where))


def _key(node: Node, recorded: Recorded, position: int) -> tuple[int | type, int | str]:
    """What is the same for all prompts: constants and parameters by name, the rest within one recording."""
    if isinstance(node, Constant):
        return (Constant, node.name)
    if isinstance(node, Parameter):
        return (Parameter, node.path)
    return (id(recorded), position)
