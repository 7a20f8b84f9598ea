"""Plans as values: all that a shard needs to know of a pass before it starts, and what it answers.

Two layers. A `Program` is one request worked out once, at admission: where each node runs, what is carried, in which
wave. A `Plan` is one merged pass: which programs' waves share it and which rows each has in the packed stream.

Words: a *point* is (wave, stage, order); order `PROLOGUE` is the start of the stage's visit, before any module ran.
Within a pass values flow only forward in (stage, order); a value needed at an earlier point opens a later wave.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from operator import sub
from typing import Any, NewType

from polytrace.errors import ServiceError
from polytrace.graph import Graph, Invoke, KeptSave, NodeId
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
class Cut:
    """How the ranks of a stage split a value."""

    dim: int
    size: int  # of the whole
    blocks: int  # equal ones side by side, each split over the ranks


class Action(Enum):
    """What a node does with parts of a value. See `scheduling.below`."""

    KEEP = "keep"  # each rank does on its part what the node says; nothing travels
    PICK = "pick"  # some features travel, from the ranks that have them
    PUT = "put"  # those ranks change some features that have them
    LARGEST = "largest"  # each rank's largest (or smallest) travel, with their places
    EXTREME = "extreme"
    SUM = "sum"
    SOFTMAX = "softmax"  # of each rank the largest and the sum of exponentials travel
    PRODUCT = "product"  # partial products travel


@dataclass(frozen=True, slots=True, kw_only=True)
class Below:
    """A node that works below the gather."""

    action: Action
    cut: Cut  # of its operand; of what broadcasts, after that
    result: Cut | None  # of its value; None: every rank has all of it
    parts: tuple[tuple[int, int], ...] = ()  # whole operands of which a rank takes its part: (argument, dimension)
    dims: tuple[int, ...] = ()  # that are reduced
    features: tuple[int, ...] = ()  # of the whole, that are picked (ascending) or put
    place: int = 0  # of the features' part in the index, where they are put


Key = bytes

NOWHERE = 1 << 62  # behind every position


@dataclass(frozen=True, slots=True)
class Edit:
    """One write to one sequence: rows of `position` and later are others from `level` on."""

    level: int
    position: int
    key: Key  # equal keys: equal writes


@dataclass(frozen=True, slots=True, kw_only=True)
class Cone:
    """One sequence in one wave: what it changes and which of its rows are needed. See `scheduling.cones`."""

    edits: tuple[Edit, ...]  # by level, position, key
    needs: tuple[int, ...]  # per layer: rows before this position are needed there; never growing
    head: tuple[int, ...]  # positions needed behind the last layer, ascending
    inside: tuple[int, ...]  # per level: the first position that a read inside of it gives; NOWHERE: none does
    behind: tuple[int, ...]  # per layer: the first position that a read of its output gives; NOWHERE: none does
    skips: tuple[int, ...] = ()  # layers that none of its rows runs, ascending: their outputs are given


@dataclass(frozen=True, slots=True, kw_only=True)
class StageWork:
    """What one wave asks of one stage, in the order it happens."""

    held: tuple[Transfer, ...]  # values of earlier waves, moved before any stage starts; as source or as target
    arriving: tuple[Transfer, ...]  # values of this wave from earlier stages, received before the prologue
    fragments: tuple[Fragment, ...]  # by order, prologue first
    leaving: tuple[Transfer, ...]  # values of this wave for later stages, sent after the last fragment
    drops: tuple[NodeId, ...]  # values to drop once `leaving` has gone, and every value when the wave is the last


@dataclass(frozen=True, slots=True, kw_only=True)
class Trunk:
    """A sequence whose rows one wave leaves in the shards' stores, for sequences of later waves to fork from.

    Of each layer there are its keys and values, and some of its output: a row that is born behind it begins as that.
    """

    wave: int  # that runs it; it is there from the next wave on, until the request ends
    invoke: int
    sequence: int  # of the invoke
    edits: tuple[Edit, ...]  # that its rows have had
    stops: tuple[int, ...]  # per layer: positions before have their keys and values; never growing
    outputs: tuple[int, ...]  # per layer: positions from here to its stop have its output
    until: int  # order of the visit that a pass has to reach for all of it


TrunkId = tuple[RequestId, int]  # whose it is, and its place among `Program.trunks`; a cache's is below 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Keep:
    """What a pass leaves in the store."""

    trunk: TrunkId
    segment: int  # the sequence's, in Plan.segments
    stops: tuple[int, ...]  # as the trunk's
    outputs: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Grow:
    """Rows of this pass that a sequence's *cache* takes in at every layer: a trunk that grows as its sequence does.

    Its keys and values lie in one piece with room for `capacity` positions, so that a decode pass reads them where they
    are. Positions before `begin` are those of the trunk that its segment forks from, which others fork from too.
    """

    trunk: TrunkId
    segment: int  # in Plan.segments, whose rows, and whose parents', they are
    begin: int  # the first position that the cache has; a multiple of PAGE
    start: int  # positions from here on are new to it; those from `begin` on are there already
    stop: int
    capacity: int  # positions from `begin` on, a multiple of PAGE; it may be more than when it was made, never less


PAGE = 32  # positions that attention takes at a time, counted from position 0


@dataclass(frozen=True, slots=True, kw_only=True)
class WaveRows:
    """What a wave runs when its request has the pass to itself."""

    widest: int  # rows of its widest layer
    token_layers: int  # rows of all layers
    link_rows: int = 0  # that go from a stage to the next one, at all borders together


@dataclass(frozen=True, slots=True, kw_only=True)
class Wave:
    """One pass's share of a request."""

    invokes: tuple[int, ...]  # those that have rows in this wave, ascending
    kept: tuple[tuple[int, ...], ...]  # per invoke above: columns of its view that the head runs on, ascending
    cones: tuple[tuple[Cone, ...], ...]  # per invoke above, per sequence; for packing: a shard's copy has none
    until: int  # order of the last visit that this wave needs; PROLOGUE when it has no rows
    rows: WaveRows  # with what earlier waves kept
    rows_anew: WaveRows  # when nothing was kept
    drawing: tuple[int, ...] = ()  # of the invokes above: those whose sequences' next tokens are drawn
    stages: tuple[StageWork, ...]  # one per stage of the deployment
    # of gradients
    cuts: tuple[int, ...] = ()  # orders of visits where its gradient stops, so that graphs can see and change it
    of: int | None = None  # it runs that wave backwards: it has no rows, and visits are in the opposite order
    frees: tuple[int, ...] = ()  # waves that nobody runs backwards any more, once it has run
    reruns: bool = False  # layers are run again on the way back, for want of memory

    @property
    def is_taped(self) -> bool:
        """Whether it is run backwards later."""
        return bool(self.cuts)


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveSlot:
    """Where a saved value goes. Slots lie without holes, larger elements first, so each is aligned to its own size."""

    name: str
    node: NodeId  # of the Save
    stage: int  # whose rank 0 writes it
    facts: ValueFacts
    offset: int  # bytes from the start of the result's data section, or of `file`
    keep: KeptSave | None = None  # it stays on the service; the result does not have it
    file: str | None = None  # of one that stays, where results are files
    is_of_step: bool = False  # it is saved at every step that its program runs at, as `name_at(name, step)`


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """One request, worked out: sent to every shard with each of its waves."""

    request: RequestId
    graph: Graph  # indices into narrowed reads are rewritten to the narrow view `[sequences, columns, *tail]`
    narrowed: Mapping[NodeId, tuple[int, ...]]  # reads and writes of some columns only -> these, ascending
    invokes: tuple[Invoke, ...]
    seed: int
    edits: tuple[str, ...] = ()  # that it started from, for its receipt
    sharing_domain: str | None  # its rows may be shared with requests of the same domain; None: not even among its own
    facts: tuple[ValueFacts | None, ...]  # per node; None for writes and saves
    below: Mapping[NodeId, Below]  # nodes that each rank works out on its part
    waves: tuple[Wave, ...]
    saves: tuple[SaveSlot, ...]
    # values that later steps of its generation need -> the stage where they outlive its last wave
    holds: Mapping[NodeId, int] = field(default_factory=dict)
    chain: Chain | None = None  # what follows it, when it is the first step of a generation
    trunks: tuple[Trunk, ...]  # by wave
    trunk_bytes: int  # of all trunks, on the shard that keeps most
    tape_bytes: int = 0  # of what its waves keep for their way back, at once, on the shard that keeps most
    live_bytes: int  # of values held at one site visit, at most
    split: int = 0  # of its waves: those that it has because its rows do not fit into fewer
    structure: str | None = None  # of the arguments of all its calls of a model as it is, where they have one
    constants: Mapping[str, RawTensor] = field(default_factory=dict)  # in process; empty when `request_file` is set
    request_file: str | None = None  # the stored request: shards map its constants from here
    contents: Mapping[str, str] = field(default_factory=dict)  # constants that stand on the service -> their files
    result_file: str | None = None  # or a URL: saves are written at `result_start + offset`; None: they are returned
    result_start: int = 0  # bytes before the data section of the result file
    tenant: str = "default"  # whose counter it is charged to
    is_interactive: bool = True  # somebody waits for it: it goes before its tenant's others


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One step of a generation: which program runs, and where it finds what earlier steps left.

    What is left has the name of its node in the request's own graph. One that acts at several steps leaves its latest.
    """

    part: int  # index into Chain.parts
    binds: Mapping[NodeId, NodeId]  # Carried nodes of the program -> what was left
    holds: Mapping[NodeId, NodeId]  # nodes of the program -> as what their values are left
    drops: tuple[NodeId, ...]  # of what was left: what no later step needs
    offset: int  # bytes from the start of the data section to this step's saves


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """What follows the prompts of a generation: equal steps are one program."""

    parts: tuple[Program, ...]
    holds: Mapping[NodeId, NodeId]  # of step 0
    steps: tuple[Step, ...]  # step 1 and on
    ending: Step | None  # behind the last step that came
    data_bytes: int  # of all saves, had all steps come


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """Rows of one sequence, or of several that are equal. A fork has a parent, which has its rows before its own.

    A trunk has none that run: they are in the store, from its start on. At layer l its own rows are those of the
    positions `starts[l]` to `stops[l]`, none when that is empty. A row that is its own from layer l on, and was not at
    the layer before, begins as a copy of its parent's row there.
    """

    parent: int | None  # index into Plan.segments
    trunk: TrunkId | None = None  # whose rows these are
    outputs: tuple[int, ...] = ()  # of a trunk, per layer: positions from here on have the layer's output in the store
    starts: tuple[int, ...]  # per layer, and behind the last one; never growing; 0 without a parent
    stops: tuple[int, ...]  # per layer; never growing: rows end when nobody needs them any more
    head: tuple[int, ...]  # positions of its own rows behind the last layer, ascending
    tokens: tuple[int, ...]  # of its own rows at layer 0, or of a trunk's
    skips: tuple[int, ...] = ()  # layers that its rows go around


NO_ROWS = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """One invoke in this pass."""

    member: int
    invoke: int
    lengths: tuple[int, ...]  # tokens per sequence
    segments: tuple[int, ...]  # per sequence: index into Plan.segments; NO_ROWS: it has ended
    kept_columns: tuple[int, ...]  # columns of the left-padded view that the head runs on, ascending
    begins: tuple[int, ...] = ()  # per sequence: the position of its first token here; empty: 0 for all
    is_drawing: bool = False  # its sequences' next tokens are drawn


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One request's wave in a pass."""

    program: Program
    wave: int
    is_last_wave: bool  # of the request, as far as is known ahead
    step: int = 0
    part: int | None = None  # index into Chain.parts: which program this is; None: the request's first
    binds: Mapping[NodeId, NodeId] = field(default_factory=dict)  # as of Step
    holds: Mapping[NodeId, NodeId] = field(default_factory=dict)
    drops: tuple[NodeId, ...] = ()  # once its last wave has run
    absent: frozenset[NodeId] = frozenset()  # nodes that do not come: see `scheduling.absence`
    offset: int = 0  # bytes that its saves' offsets count from


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One merged pass. Every shard gets the same plan and does its own part of it."""

    pass_id: PassId
    segments: tuple[Segment, ...]  # in the order of their rows in the stream, at every layer
    layer_rows: tuple[int, ...]  # rows at each layer, without padding
    views: tuple[View, ...]
    members: tuple[Member, ...]
    keeps: tuple[Keep, ...]
    grows: tuple[Grow, ...] = ()
    until: int  # order of the last visit that any member needs
    num_stages: int  # stages from this one on have no rows to run; they still do their prologues and transfers
    ended: tuple[RequestId, ...] = ()  # stopped between two waves: shards forget them before anything else
    skipped_rows: tuple[int, ...] = ()  # rows of each layer that go around it; empty: none does
    # of gradients
    cuts: tuple[int, ...] = ()  # orders of visits where the gradient stops; all members have the same; empty: no tape
    of: PassId | None = None  # this pass runs that one backwards, for some of its members; it has no rows
    reruns: bool = (
        False  # of a pass with cuts: layers without any inside keep what came in, and run again on the way back
    )

    @property
    def is_of_nobody(self) -> bool:
        """Nobody waits: it only says what has ended."""
        return not self.members and not self.segments

    @property
    def running_rows(self) -> tuple[int, ...]:
        """Rows that each layer is run for."""
        return tuple(map(sub, self.layer_rows, self.skipped_rows or (0,) * len(self.layer_rows)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A graph that failed inside a pass; its neighbours did not notice."""

    request: RequestId
    node: NodeId | None
    message: str
    is_out_of_memory: bool = False  # perhaps for the pass's other members: it deserves a pass to itself


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """What an invoke's sequences go on with, as far as they have rows."""

    invoke: int
    tokens: tuple[int, ...]  # per sequence; NO_ROWS where it has ended
    logprobs: tuple[float, ...] = ()  # of these, when asked for
    likeliest: tuple[tuple[tuple[int, float], ...], ...] = ()  # per sequence: tokens and log-probabilities


@dataclass(frozen=True, slots=True, kw_only=True)
class Stopped:
    """Which sequences of an invoke the graph ends."""

    invoke: int
    is_over: tuple[bool, ...]  # per sequence


class Phase(Enum):
    """What a shard is at while a pass is with it."""

    WAITING = "waiting"  # for another stage
    COMPUTING = "computing"
    SENDING = "sending"  # handing on to other stages: the bytes travel later
    SAVING = "saving"  # waiting for the disk, behind everything else


class PassTooLargeError(ServiceError):
    """A pass needed more memory than a shard has, and was abandoned. The message has the numbers."""


class PassAbandonedError(ServiceError):
    """A pass was lost because another one was abandoned; it is not to blame."""


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
    seconds: float  # from the first transfer to the last save; on a GPU what nobody waits for is not in it
    busy_seconds: float  # of those, not waiting for another stage
    began: float = 0.0  # by the monotonic clock, which all processes of one machine share
    phases: tuple[tuple[Phase, float], ...] = ()  # with their seconds, one after another from `began`
    gathered: Mapping[RequestId, int] = field(default_factory=dict)  # of those, what each request's own nodes asked for
    loaded: Mapping[RequestId, int] = field(default_factory=dict)  # bytes of contents that it read for each request
    drawn: Mapping[RequestId, tuple[Drawn, ...]] = field(default_factory=dict)  # by the last stage
    stopped: Mapping[RequestId, tuple[Stopped, ...]] = field(default_factory=dict)
    # saves that came out smaller than planned, behind the last step: by name
    shapes: Mapping[tuple[RequestId, str], tuple[int, ...]] = field(default_factory=dict)
    values: Mapping[tuple[RequestId, str], Any] = field(default_factory=dict)  # saves, when there is no result file
    merged: tuple[tuple[RequestId, ...], ...] = ()  # of a model that is called as it is: calls that went as one
