"""How polytrace's cost grows with the number of invokes in one trace, and with the length of the prompt.

Planning is timed apart from running: working the request out (`compile`) and laying out its passes (`next_pass`).
Hand-batched runs of the whole model are timed on a few runs and scaled, as the line to compare with.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.cones.by_batch import run_batched
from bench.cones.cones import layer_rows, whole_rows
from bench.cones.contest import largest_difference
from bench.cones.hooks import read_sources
from bench.cones.ours import Ours
from bench.cones.workloads import Shape, Workload, evenly, make_workload, many_donors
from bench.plain import Plain

_BATCH_ROWS = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Growth:
    """What is measured."""

    invokes: tuple[int, ...] = (10, 30, 100, 300, 1000, 3000, 10_000)
    invoke_tokens: int = 16  # prompts of the sweep that grows
    tokens: tuple[int, ...] = (16, 32, 64, 128, 256, 512, 1024)
    token_runs: int = 32  # patches of the prompt that grows
    rounds: int = 3
    long_run_s: float = 5.0  # one round is enough for what takes longer


def by_invokes(growth: Growth, shape: Shape, plain: Plain, ours: Ours) -> list[dict[str, Any]]:
    """A row for each number of invokes: a patching sweep on prompts of one length."""
    return [
        _row(growth, many_donors(shape, tokens=growth.invoke_tokens, size=size), size, shape, plain, ours)
        for size in growth.invokes
    ]


def by_tokens(growth: Growth, shape: Shape, plain: Plain, ours: Ours) -> list[dict[str, Any]]:
    """A row for each length of prompt: a sweep of as many patches, evenly over layers and positions."""
    return [
        _row(growth, make_workload("a", shape, tokens=tokens, size=growth.token_runs), tokens, shape, plain, ours)
        for tokens in growth.tokens
    ]


def _row(growth: Growth, workload: Workload, at: int, shape: Shape, plain: Plain, ours: Ours) -> dict[str, Any]:
    longest = len(workload.runs[0].ids)
    few = evenly(workload.swept, max(1, _BATCH_ROWS // longest))
    sources = read_sources(plain, workload)
    seconds: list[float] = []
    stages: list[Mapping[str, float]] = []
    batched: list[float] = []
    for _ in range(growth.rounds + 1):
        start = time.perf_counter()
        values = ours.run(workload)
        seconds.append(time.perf_counter() - start)
        stages.append(ours.stages_s)
        start = time.perf_counter()
        plain_values = run_batched(plain, workload, few, sources, rows=_BATCH_ROWS)
        batched.append(time.perf_counter() - start)
        if seconds[0] > growth.long_run_s:
            break
    counted = slice(1, None) if len(seconds) > 1 else slice(None)  # the first is a warm-up
    scale = whole_rows(workload.runs) / whole_rows([workload.runs[member] for member in few])
    median = {
        stage: statistics.median(one[stage] for one in stages[counted])
        for stage in ("record", "compile", "plan", "run")
    }
    return {
        "at": at,
        "runs": len(workload.runs),
        "nodes": ours.num_nodes,
        "seconds": statistics.median(seconds[counted]),
        "stages_s": median,
        "planner_us_a_node": 1e6 * (median["compile"] + median["plan"]) / ours.num_nodes,
        "hand_batched_s": scale * statistics.median(batched[counted]),
        "rounds": len(seconds[counted]),
        "token_layers": {
            "counted": sum(layer_rows(workload, shape.layers)),
            "whole_model": whole_rows(workload.runs) * shape.layers,
            "receipt": sum(receipt.token_layers for receipt in ours.receipts),
        },
        "largest_difference": largest_difference(values, plain_values),
    }


def tell(title: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """Lines for a person."""
    lines = [title]
    for row in rows:
        stages = row["stages_s"]
        lines.append(
            f"  {row['at']:>6}: {row['seconds']:.3f} s (record {stages['record']:.3f}, "
            f"compile {stages['compile']:.3f}, plan {stages['plan']:.3f}, run {stages['run']:.3f}; "
            f"planner {row['planner_us_a_node']:.0f} us a node); "
            f"hand-batched {row['hand_batched_s']:.3f} s"
        )
    return "\n".join(lines)
