"""A plan for people, as tables; and for programs, as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from cluster.planning.hardware import GIB, told_bytes
from cluster.planning.planner import Planned, ShardPlan, SplitPlan
from engine.census import Kind

_SHOWN = 6  # splits beside the best
_BOX = box.SIMPLE_HEAD


_LEGEND = (
    "store: keys and values; values: what graphs hold and save; reserve: the GPU's own and what is fragmented;\n"
    "pass: activations of the largest pass; GPU: of its memory; ms: of that pass, at the roofline"
)


def show(name: str, planned: Planned, console: Console | None = None) -> None:
    """Prints the best split with what each shard holds, and how the others compare."""
    console = console or Console()
    best = planned.splits[0]
    machine = planned.machine
    files = f"{planned.quantisation}\n" if planned.quantisation else ""
    console.print(
        f"{name}: {planned.parameters / 1e9:.1f} billion parameters in {planned.dtype}, on {machine.told()}\n{files}"
        f"[bold]{best.stages} stages x {best.ranks} ranks[/bold]: passes of up to {best.pass_rows:,} rows, "
        f"{best.tokens_s:,.0f} rows a second with all stages busy, {best.latency_s * 1e3:.0f} ms for one such pass "
        f"(both at the roofline)\n"
    )
    console.print(_shards(best, machine.hardware.memory_bytes))
    console.print(_LEGEND, style="dim")
    for link, num_bytes in best.row_links.items():
        if num_bytes:
            console.print(f"one row {link}: {told_bytes(num_bytes)}")
    if len(planned.splits) > 1:
        console.print()
        console.print(_others(planned.splits[: _SHOWN + 1]))
    for ranks, why in planned.refused.items():
        console.print(f"not with {ranks} ranks: {why}", style="dim")


def as_plain(planned: Planned) -> str:
    """All of it as JSON; bytes and seconds."""
    return json.dumps(_plain(asdict(planned)), indent=2)


def _shards(split: SplitPlan, memory_bytes: int) -> Table:
    columns = ("stage", "layers", "weights", "store", "values", "reserve", "pass", "GPU", "ms")
    title = "GiB that each shard holds, and milliseconds of a pass"
    table = Table(*columns, box=_BOX, title=title, title_justify="left", collapse_padding=True, pad_edge=False)
    for shards in _alike(split.shards):
        first, last = shards[0], shards[-1]
        table.add_row(
            str(first.stage) if len(shards) == 1 else f"{first.stage}-{last.stage}",
            f"{first.layers.start}-{last.layers.stop - 1}" + (f" ({len(first.layers)})" if len(shards) > 1 else ""),
            _gib(sum(first.weights.values())),
            _gib(first.store_bytes),
            _gib(first.value_bytes),
            _gib(first.reserve_bytes),
            _gib(first.activation_bytes),
            f"{first.num_bytes / memory_bytes:.0%}",
            f"{first.pass_s * 1e3:.0f}",
        )
    return table


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.1f}"


def _alike(shards: Sequence[ShardPlan]) -> list[list[ShardPlan]]:
    """Neighbouring stages that hold as much, together."""
    groups: list[list[ShardPlan]] = []
    for shard in shards:
        if groups and groups[-1][0].weights == shard.weights and len(groups[-1][0].layers) == len(shard.layers):
            groups[-1].append(shard)
        else:
            groups.append([shard])
    return groups


def _others(splits: Sequence[SplitPlan]) -> Table:
    table = Table(
        "stages x ranks",
        "GPUs",
        "rows a second",
        "ms a pass",
        "rows a pass",
        "fullest GPU",
        box=_BOX,
        collapse_padding=True,
    )
    for split in splits:
        table.add_row(
            f"{split.stages} x {split.ranks}",
            str(split.gpus),
            f"{split.tokens_s:,.0f}",
            f"{split.latency_s * 1e3:.0f}",
            f"{split.pass_rows:,}",
            told_bytes(max(shard.num_bytes for shard in split.shards)),
        )
    return table


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key.value if isinstance(key, Kind) else key: _plain(part) for key, part in value.items()}
    if isinstance(value, range):
        return [value.start, value.stop]
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return value
