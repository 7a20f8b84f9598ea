"""The certificate (what a request will cost and return) and the receipt (what it did). Pure data, JSON on the wire."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


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
    op_flops: int = 0  # of the graph's own ops, beside the model's
    tape_bytes: int = 0  # what passes keep for gradients, at once, on the shard that keeps most
    notes: tuple[str, ...]  # for people: reads that see later lines' writes, pad rows written, ...
    edits: tuple[str, ...] = ()  # that its traces start from, as name@version
    kept_bytes: int = 0  # values that stay on the service


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """What a request did cost and touch."""

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
