"""What a shard tells of itself behind its gate, for whoever describes the whole model.

These cross processes: shards make them (`engine.gate`), the first shard or the driver reads them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from engine.arguments import Selector
from engine.relations import Check
from polytrace.graph import Port


@dataclass(frozen=True, slots=True, kw_only=True)
class LeafReport:
    """What a shard's gate saw of one leaf that its stage owns."""

    module: str
    port: Port
    selector: Selector
    local_tail: tuple[int, ...]
    mutated: bool
    refusal: str | None  # why its rows are not the request's own
    has_gradient: bool = True  # ranks' gradients there make up one process's, where the model has any


@dataclass(frozen=True, slots=True, kw_only=True)
class GateReport:
    """What one shard found when it ran the gate."""

    stage: int
    rank: int
    leaves: tuple[LeafReport, ...]
    sharded: Mapping[str, tuple[int, int]]  # parameter held here -> dimension split over the ranks, and its copies
    packed: Mapping[str, int]  # module (its output) or parameter -> number of equal blocks that are split one by one
    row_multiple: int  # see `engine.lanes.stream_multiple`; the same on every shard
    key_value_bytes: int  # of one row at one layer here, at most
    has_forks: bool  # a fork that changes nothing has its parent's bits, at every site seen here
    has_exact_rows: bool  # False: a row's last bits depend on how many rows run beside it
    notes: tuple[str, ...]
    can_generate: bool = True  # sequences go on here
    why_no_gradients: str = ""  # why there are none; empty: there are
    checks: tuple[Check, ...] = ()  # of standard names, see `engine.checking`
