"""Plans as values: all that a shard needs to know of a pass before it starts, and what it answers.

Two layers. A `Program` is one request worked out once, at admission: where each node runs, what is carried, in which
wave. A `Plan` is one merged pass: which programs' waves share it and which rows each has in the packed stream.

Words: a *point* is (wave, stage, order); order `PROLOGUE` is the start of the stage's visit, before any module ran.
Within a pass values flow only forward in (stage, order); a value needed at an earlier point opens a later wave.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NewType

from polytrace.graph import Graph, Invoke, NodeId
from polytrace.tensors import RawTensor

RequestId = NewType("RequestId", str)
PassId = NewType("PassId", int)

PROLOGUE = -1  # order of the nodes that run at the start of a stage's visit

# Matrix kernels take another path for very few rows; from this many on, a row's bits do not depend on its neighbours.
# `ModelDescription.row_multiple` says what number of rows element-wise kernels need besides.
MIN_ROWS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueFacts:
    """What is known of a value before it exists."""

    shape: tuple[int, ...]
    dtype: str
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Fragment:
    """The nodes of one graph that run at one site visit, on every rank of the stage."""

    order: int  # the visit's place in the model's order, or PROLOGUE
    nodes: tuple[NodeId, ...]  # in program order
    drops: tuple[NodeId, ...]  # values this stage no longer needs after the fragment, in this wave or later


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """A carried value: goes point to point from each rank of one stage to the same rank of another."""

    node: NodeId
    source: int  # stage
    target: int  # stage
    facts: ValueFacts  # planned shape: what travels even when the graph has failed


@dataclass(frozen=True, slots=True, kw_only=True)
class StageWork:
    """What one wave asks of one stage, in the order it happens."""

    held: tuple[Transfer, ...]  # values of earlier waves, moved before any stage starts; as source or as target
    arriving: tuple[Transfer, ...]  # values of this wave from earlier stages, received before the prologue
    fragments: tuple[Fragment, ...]  # by order, prologue first
    leaving: tuple[Transfer, ...]  # values of this wave for later stages, sent after the last fragment
    drops: tuple[NodeId, ...]  # values to drop once `leaving` has gone, and every value when the wave is the last


@dataclass(frozen=True, slots=True, kw_only=True)
class Wave:
    """One pass's share of a request."""

    invokes: tuple[int, ...]  # those that have rows in this wave, ascending
    kept: tuple[tuple[int, ...], ...]  # per invoke above: columns of its view that the head runs on, ascending
    until: int  # order of the last visit that this wave needs; PROLOGUE when it has no rows
    stages: tuple[StageWork, ...]  # one per stage of the deployment


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveSlot:
    """Where a saved value goes. Slots lie without holes, larger elements first, so each is aligned to its own size."""

    name: str
    node: NodeId  # of the Save
    stage: int  # whose rank 0 writes it
    facts: ValueFacts
    offset: int  # bytes from the start of the result's data section


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """One request, worked out: sent to every shard with each of its waves."""

    request: RequestId
    graph: Graph  # indices into kept sites are rewritten to the compact view `[sequences, kept, *tail]`
    invokes: tuple[Invoke, ...]
    seed: int
    facts: tuple[ValueFacts | None, ...]  # per node; None for writes and saves
    waves: tuple[Wave, ...]
    saves: tuple[SaveSlot, ...]
    constants: Mapping[str, RawTensor] = field(default_factory=dict)  # in process; empty when `request_file` is set
    request_file: str | None = None  # the stored request: shards map its constants from here
    result_file: str | None = None  # shards write saves at `result_start + offset`; None: they return them
    result_start: int = 0  # bytes before the data section of the result file


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Rows of the key/value store that a segment attends to."""

    block: PassId  # the pass that put them there
    start: int  # row
    stop: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """The contiguous rows of one sequence in the packed stream."""

    member: int  # index into Plan.members
    invoke: int
    sequence: int
    start: int  # row
    stop: int
    spans: tuple[Span, ...]  # keys and values in token order; the last one is the segment's own rows


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """One invoke's rows in this pass: its sequences lie one after another from `start`."""

    member: int
    invoke: int
    start: int  # first row in the stream
    lengths: tuple[int, ...]  # tokens per sequence
    kept_columns: tuple[int, ...]  # columns of the left-padded view that kept sites have, ascending
    kept_start: int  # first index into Plan.kept; a sequence has the kept columns that are not pads


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One request's wave in a pass."""

    program: Program
    wave: int
    is_last_wave: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One merged pass. Every shard gets the same plan and does its own part of it."""

    pass_id: PassId
    tokens: tuple[int, ...]  # the packed stream, padded with token 0; empty when no member has rows
    positions: tuple[int, ...]  # per row, as if its sequence ran alone; pads 0
    segments: tuple[Segment, ...]  # by start; pad rows belong to one segment of no member, which is not listed
    kept: tuple[int, ...]  # rows the head runs on, padded with row 0; empty: no head needed
    views: tuple[View, ...]  # by start
    members: tuple[Member, ...]
    until: int  # order of the last visit that any member needs
    num_stages: int  # stages from this one on have no rows to run; they still do their prologues and transfers
    ended: tuple[RequestId, ...] = ()  # stopped between two waves: shards forget them before anything else


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A graph that failed inside a pass; its neighbours did not notice."""

    request: RequestId
    node: NodeId | None
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardResult:
    """What one shard answers to a plan."""

    pass_id: PassId
    stage: int
    rank: int
    failures: tuple[Failure, ...]
    fired: Mapping[RequestId, tuple[NodeId, ...]]  # reads, writes and saves that ran here
    saved_bytes: Mapping[RequestId, int]  # written to results by this shard
    carried_bytes: int  # sent to other stages as carried values
    gathered_bytes: int  # received from other ranks to complete sharded sites and parameters
    seconds: float  # from the first transfer to the last save
    busy_seconds: float  # of those, not waiting for another shard
    values: Mapping[tuple[RequestId, str], Any] = field(default_factory=dict)  # saves, when there is no result file
