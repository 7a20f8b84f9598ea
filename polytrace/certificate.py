"""The certificate (what a request will cost and return) and the receipt (what it did). Pure data, JSON on the wire."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueShape:
    """Shape and dtype of a value that does not exist yet."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """What a request will cost and return, before it is admitted. Nothing ran."""

    nodes: tuple[ValueShape | None, ...]  # per node of the graph; None for writes and saves
    saves: Mapping[str, ValueShape]
    passes: int  # waves: merged passes the request takes part in
    tokens: int  # of its sequences, all waves together
    token_layers: int  # rows x decoder layers that they run through, equal rows counted once; on the way back twice
    token_layers_alone: int  # what that would be if every sequence ran whole, on its own
    result_bytes: int  # all saves
    read_bytes: int  # all values read from the model, what a client-side analysis would have to move
    carried_bytes: int  # values that cross from stage to stage
    live_bytes: int  # values that the graph holds at one site visit, at most
    op_flops: int = 0  # of the graph's own ops, and to make rows of images, beside the model's
    tape_bytes: int = 0  # what passes keep for gradients, at once, on the shard that keeps most
    notes: tuple[str, ...]  # for people: reads that see later lines' writes, pad rows written, ...
    edits: tuple[str, ...] = ()  # that its traces start from, as name@version
    kept_bytes: int = 0  # values that stay on the service
    split: int = 0  # of the passes: those that it takes because its rows do not fit into fewer
    row_bytes: int = 0  # its rows and images while they run, on the shard that has most of them
    trunk_bytes: int = 0  # rows that stay for its later passes and steps, on the shard that keeps most
    gathered_bytes: int = 0  # that ranks get of each other's parts for its reads and operations
    hidden_link_bytes: int = 0  # hidden states from stage to stage
    request_bytes: int = 0  # the request as a file; 0 where it never was one
    limits: tuple[LimitLine, ...] = ()  # what it is held against, where a service was asked
    refusal: str | None = None  # why the service would not take it now
    retry_after_s: float | None = None  # seconds after which it may be otherwise

    @property
    def shard_bytes(self) -> int:
        """What it takes of a shard's memory beside the weights, at most: rows, values alive, tapes, kept rows."""
        return self.row_bytes + self.live_bytes + self.tape_bytes + self.trunk_bytes

    @property
    def link_bytes(self) -> int:
        """What goes over links between shards: hidden states, carried values, parts that ranks gather."""
        return self.hidden_link_bytes + self.carried_bytes + self.gathered_bytes

    @property
    def moved_bytes(self) -> int:
        """What is moved for this request alone: carried, gathered, returned and kept."""
        return self.carried_bytes + self.gathered_bytes + self.result_bytes + self.kept_bytes

    @property
    def price(self) -> float:
        """What a tenant is charged, in token-layers."""
        return charge(self.token_layers, self.moved_bytes)

    @property
    def is_admitted(self) -> bool:
        """Whether it would be taken now; True where nobody was asked."""
        return self.refusal is None

    def without_values(self) -> Certificate:
        """The same without the shapes of single values."""
        return replace(self, nodes=(), saves={})

    def __str__(self) -> str:
        from polytrace.price_tables import table_of_certificate

        return table_of_certificate(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitLine:
    """One limit of a service, and what a request takes of it."""

    what: str  # as of `api.limits.TenantLimits`
    needed: int  # by the request
    used: int = 0  # by others of the same tenant, or deployment, now
    limit: int | None  # None: there is none
    whose: str  # "tenant lab" or "deployment tinyworld"

    @property
    def is_within(self) -> bool:
        return self.limit is None or self.used + self.needed <= self.limit


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """What several requests cost together."""

    requests: int = 0
    passes: int = 0
    tokens: int = 0
    token_layers: int = 0
    token_layers_alone: int = 0
    moved_bytes: int = 0
    result_bytes: int = 0
    kept_bytes: int = 0
    op_flops: int = 0
    shard_bytes: int = 0  # of the request that takes most
    refusals: tuple[str, ...] = ()  # of those that the service would not take now
    is_partial: bool = False  # the program needed a result before it could go on; what comes behind is not in it

    @property
    def charged(self) -> float:
        """What the tenant is charged for all of it, in token-layers."""
        return charge(self.token_layers, self.moved_bytes)

    def __str__(self) -> str:
        from polytrace.price_tables import table_of_price

        return table_of_price(self)


def price_of(certificates: Iterable[Certificate]) -> Price:
    """The price of all of them."""
    all_ = list(certificates)
    return Price(
        requests=len(all_),
        passes=sum(each.passes for each in all_),
        tokens=sum(each.tokens for each in all_),
        token_layers=sum(each.token_layers for each in all_),
        token_layers_alone=sum(each.token_layers_alone for each in all_),
        moved_bytes=sum(each.moved_bytes for each in all_),
        result_bytes=sum(each.result_bytes for each in all_),
        kept_bytes=sum(each.kept_bytes for each in all_),
        op_flops=sum(each.op_flops for each in all_),
        shard_bytes=max((each.shard_bytes for each in all_), default=0),
        refusals=tuple(each.refusal for each in all_ if each.refusal is not None),
    )


BYTES_PER_TOKEN_LAYER = 1 << 16  # moved bytes that cost what one row costs at one layer


def charge(token_layers: int, moved_bytes: int) -> float:
    """The cost that shares and accounts are counted in: token-layers, with bytes that are moved on top."""
    return token_layers + moved_bytes / BYTES_PER_TOKEN_LAYER


@dataclass(frozen=True, slots=True, kw_only=True)
class Fired:
    """One read or write that happened."""

    site: str
    invoke: int
    kind: str  # "read", "write" or "write in place"
    passes: int  # in how many of the request's passes
    where: str
    steps: int = 1  # of a generation: at how many
    of_steps: int = 1  # ... of how many that it had

    def __str__(self) -> str:
        steps = f" at {self.steps} of {self.of_steps} steps" if self.of_steps > 1 else ""
        return f"{self.kind} of {self.site} ({self.where}) fired{steps}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated:
    """How one sequence of an invoke went on."""

    invoke: int
    sequence: int
    ids: tuple[int, ...]  # new ones; the end-of-sequence token included
    finish: str  # "length", "eos", "stop" (a text, or `tracer.stop`)
    logprobs: tuple[float, ...] = ()  # of the ids, when asked for
    likeliest: tuple[tuple[tuple[int, float], ...], ...] = ()  # per id: the likeliest tokens there, likeliest first


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """One token of a generation, told as soon as its step has ended."""

    invoke: int
    sequence: int  # of the invoke
    step: int
    id: int
    logprob: float | None = None  # when asked for
    likeliest: tuple[tuple[int, float], ...] = ()
    finish: str | None = None  # as of Generated, when its sequence ends with it


@dataclass(frozen=True, slots=True, kw_only=True)
class PassEntry:
    """One merged pass that the request was part of."""

    pass_id: int
    requests: int  # that shared it
    tokens: int  # rows of all of them at the first layer
    layer_rows: tuple[int, ...]  # rows of all of them at each decoder layer
    seconds: float  # from the first shard's start to the last shard's end
    calls_merged: int = 0  # of a model that is called as it is: that were one call with one of its own, at most


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """What a request did cost and touch. Printed it is one line: `fired`, `passes` and the others have all of it."""

    request: str
    model: str
    passes: tuple[PassEntry, ...]
    tokens: int
    token_layers: int
    token_layers_alone: int
    fired: tuple[Fired, ...]
    pad_rows_written: int  # rows of writes that fell on left padding and vanished
    read_bytes: int
    result_bytes: int  # all that left the shards towards the user
    carried_bytes: int
    gathered_bytes: int  # that ranks received of each other's parts, for its reads, calls and operations
    queue_seconds: float
    run_seconds: float
    notes: tuple[str, ...]
    edits: tuple[str, ...] = ()  # that its traces started from, as name@version
    kept_bytes: int = 0  # of values that stay on the service
    generated: tuple[Generated, ...] = ()  # by invoke and sequence
    tape_bytes: int = 0  # that its passes kept for gradients at once, on the shard that kept most, as certified
    loaded_bytes: int = 0  # of constants and kept values that shards had to read, each its own: 0 when they had them

    @property
    def moved_bytes(self) -> int:
        """What was moved for this request alone: carried, gathered, returned and kept."""
        return self.carried_bytes + self.gathered_bytes + self.result_bytes + self.kept_bytes

    @property
    def price(self) -> float:
        """What its tenant was charged, in token-layers."""
        return charge(self.token_layers, self.moved_bytes)

    def __repr__(self) -> str:
        reads = sum(one.kind == "read" for one in self.fired)
        told = [_count(len(self.passes), "pass", "passes"), _count(self.tokens, "token")]
        told.append(f"{self.token_layers:,} token-layers ({self.token_layers_alone:,} alone)")
        told.append(f"{_count(self.result_bytes, 'byte')} returned, {self.moved_bytes:,} moved")
        told.append(f"fired: {_count(len({one.site for one in self.fired}), 'site')}")
        told[-1] += f" ({_count(reads, 'read')}, {_count(len(self.fired) - reads, 'write')})"
        told += [_count(sum(len(one.ids) for one in self.generated), "new token")] * bool(self.generated)
        told += [_count(len(self.notes), "note")] * bool(self.notes)
        return f"<receipt of {self.model}: {', '.join(told)}; {self.run_seconds:.3f} s>"


def _count(number: int, one: str, several: str | None = None) -> str:
    return f"{number:,} {one if number == 1 else several or one + 's'}"
