"""One cell of the grid: one case on one model, polytrace against every opponent, in one race.

polytrace, the bare forward and the best by hand run the whole workload; one run each, hand-batched runs and nnsight run
a few of its runs, evenly chosen, and their seconds are scaled by tokens, as every run of theirs costs the same.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bench.cones.bare import Bare
from bench.cones.by_batch import run_batched
from bench.cones.by_hand import ByHand
from bench.cones.cones import layer_rows, token_layers_alone, whole_rows
from bench.cones.hooks import Values, read_sources
from bench.cones.ours import Ours
from bench.cones.peer import Peer
from bench.cones.workloads import CASES, Read, Shape, Workload, evenly, make_workload
from bench.plain import Plain, difference
from bench.race import race, ratio
from polytrace.certificate import Receipt

# `max|a - b| / max(1, max|b|)` of one run's value; other kernels, other orders of addition, up to 16 layers.
TOLERANCE = 1e-4
_SMALLEST_SWEEP = 16
_NUM_ONE_EACH = 2
# Multiply-adds of a core count as two; a rate that the machines of this project reach. It only chooses sizes.
_FLOPS_A_THREAD = 60e9
_SECONDS_A_RUN = 0.003  # that do not depend on its rows, of all contenders together


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One case on one model."""

    model: str
    case: str
    tokens: int
    threads: int
    size: int | None  # swept runs; None: the whole sweep
    rounds: int
    batch_rows: int  # tokens of a batch of whole-model runs


def chosen_size(case: str, shape: Shape, *, tokens: int, threads: int, seconds: float, layer_parameters: int) -> int:
    """The largest sweep, by doubling, whose round of all contenders takes about `seconds`; 16 runs at least."""
    full = make_workload(case, shape, tokens=tokens, size=None).full_size
    size = min(full, _SMALLEST_SWEEP)
    while size < full:
        larger = min(full, 2 * size)
        workload = make_workload(case, shape, tokens=tokens, size=larger)
        behind = sum((len(run.ids) - run.position) * shape.layers for run in workload.runs)
        slow = 2 * whole_rows(workload.runs[: _NUM_ONE_EACH + 1]) * shape.layers
        token_layers = 2 * sum(layer_rows(workload, shape.layers)) + behind + slow
        computing = 2 * layer_parameters * token_layers / (threads * _FLOPS_A_THREAD)
        if computing + _SECONDS_A_RUN * larger > seconds:
            break
        size = larger
    return size


def run_cell(cell: Cell, shape: Shape, plain: Plain, ours: Ours, peer: Peer | None) -> dict[str, Any]:
    """The figures, as plain JSON."""
    # 1) the work, and the part of it that slow contenders do
    workload = make_workload(cell.case, shape, tokens=cell.tokens, size=cell.size)
    longest = max(len(run.ids) for run in workload.runs)
    few = evenly(workload.swept, _NUM_ONE_EACH)
    batch = evenly(workload.swept, max(1, cell.batch_rows // longest))
    sources = read_sources(plain, workload)
    by_hand = ByHand(plain, workload, rows=cell.batch_rows)
    if peer is not None:
        peer.prepare(
            cell.case, tokens=cell.tokens, size=cell.size, members=batch, rows=cell.batch_rows, threads=cell.threads
        )

    # 2) the race
    values: dict[str, Values] = {}
    bare: list[Bare] = []

    def run_bare() -> None:
        if not bare:  # in the round that is not counted, after polytrace's
            bare.append(Bare(plain, workload, ran=rows_that_ran(ours.receipts)))
        bare[0]()

    def keeping(name: str, run: Callable[[], Values]) -> Callable[[], None]:
        return lambda: values.__setitem__(name, run())

    contenders: dict[str, Callable[[], object]] = {
        "polytrace": keeping("polytrace", lambda: ours.run(workload)),
        "bare forward": run_bare,
        "one each": keeping("one each", lambda: run_batched(plain, workload, few, sources, rows=1)),
        "hand-batched": keeping(
            "hand-batched", lambda: run_batched(plain, workload, batch, sources, rows=cell.batch_rows)
        ),
        "best by hand": keeping("best by hand", by_hand),
    }
    if peer is not None:
        contenders["nnsight"] = peer.run
    if cell.case == "g":
        contenders["sharing off"] = keeping("sharing off", lambda: ours.run(workload, sharing="off"))
    seconds = race(contenders, rounds=cell.rounds)
    if peer is not None:
        values["nnsight"] = peer.values()

    # 3) what it says
    ours.run(workload)  # once more: the stages and receipts of a run with sharing
    total = whole_rows(workload.runs)
    scales = {
        "one each": total / whole_rows([workload.runs[member] for member in few]),
        "hand-batched": total / whole_rows([workload.runs[member] for member in batch]),
    }
    scales["nnsight"] = scales["hand-batched"]
    scaled = {name: [scales.get(name, 1.0) * one for one in times] for name, times in seconds.items()}
    rows = layer_rows(workload, shape.layers)
    ran = rows_that_ran(ours.receipts)
    speed_up = ratio(scaled["hand-batched"], scaled["polytrace"])
    bare_speed_up = ratio(scaled["hand-batched"], scaled["bare forward"])
    return {
        **asdict(cell),
        "title": CASES[cell.case].title,
        "runs": len(workload.runs),
        "swept": len(workload.swept),
        "whole_sweep": workload.full_size,
        "requests": len(workload.runs) if workload.is_separate else 1,
        "seconds": {name: statistics.median(times) for name, times in scaled.items()},
        "timed_runs": {"one each": len(few), "hand-batched": len(batch), "nnsight": len(batch)},
        "scaled_by": {name: scale for name, scale in scales.items() if name in scaled},
        "ratios": {f"{name} / polytrace": asdict(ratio(times, scaled["polytrace"])) for name, times in scaled.items()},
        "hand-batched / bare forward": asdict(bare_speed_up),
        "share_of_bare_speed_up": asdict(ratio(scaled["bare forward"], scaled["polytrace"])),
        "speed_up": speed_up.median,
        "bare_speed_up": bare_speed_up.median,
        "stages_s": dict(ours.stages_s),
        "passes": len({entry.pass_id for receipt in ours.receipts for entry in receipt.passes}),
        "token_layers": {
            "counted": sum(rows),
            "alone": token_layers_alone(workload, shape.layers),
            "whole_model": total * shape.layers,
            "by_hand": by_hand.token_layers(),
            "bare": sum(bare[0].layer_rows),
            "ran": sum(ran),
            "receipt": sum(receipt.token_layers for receipt in ours.receipts),
            "receipt_alone": sum(receipt.token_layers_alone for receipt in ours.receipts),
        },
        "layer_rows": list(rows),
        "layer_rows_ran": list(ran),
        "largest_difference": {
            name: largest_difference(values["polytrace"], theirs)
            for name, theirs in values.items()
            if name != "polytrace"
        },
        "largest_effect": largest_effect(workload, values["polytrace"]),
    }


def rows_that_ran(receipts: Sequence[Receipt]) -> tuple[int, ...]:
    """Rows that each layer ran in all passes of these requests."""
    passes = {entry.pass_id: entry.layer_rows for receipt in receipts for entry in receipt.passes}
    return tuple(map(sum, itertools.zip_longest(*passes.values(), fillvalue=0)))


def largest_difference(ours: Values, theirs: Values) -> float:
    """Over the runs that the others did."""
    return max((difference(ours[member], value) for member, value in theirs.items()), default=float("inf"))


def largest_effect(workload: Workload, values: Values) -> float | None:
    """How far the edits move a logit difference; None where the case has none."""
    moved = [
        abs(float(values[member]) - float(values[run.parent]))
        for member in workload.swept
        if (run := workload.runs[member]).parent is not None and run.read is Read.DIFFERENCE and run.parent in values
    ]
    return max(moved) if moved else None


def is_right(cell: Mapping[str, Any]) -> bool:
    """Whether every contender has polytrace's numbers, and an edit that was dropped would have been seen."""
    return what_is_wrong(cell) is None


def what_is_wrong(cell: Mapping[str, Any]) -> str | None:
    """For a person; None when nothing is. A patch of one of many tokens of a random model moves its logits little."""
    effect = cell["largest_effect"]
    named = f"{cell['case']} on {cell['model']} @{cell['tokens']}"
    for name, off in cell["largest_difference"].items():
        if not off <= TOLERANCE:
            return f"{named}: {name} is off by {off:.1e}"
    if effect is not None and not effect > 10 * TOLERANCE:
        return f"{named}: edits move the answer by {effect:.1e} only, so that one that is dropped would not be seen"
    return None


def tell(cell: Mapping[str, Any]) -> str:
    """One line for a person."""
    ratios = {name: figure["median"] for name, figure in cell["ratios"].items()}
    shown = ", ".join(
        f"{name.removesuffix(' / polytrace')} {value:.2f}x"
        for name, value in ratios.items()
        if name not in ("polytrace / polytrace", "bare forward / polytrace")
    )
    layers = cell["token_layers"]
    sweep = f"{cell['swept']} of {cell['whole_sweep']}" if cell["swept"] != cell["whole_sweep"] else f"{cell['swept']}"
    return (
        f"  {cell['case']:<6} {cell['model']} @{cell['tokens']} threads {cell['threads']}, {sweep} runs: "
        f"{cell['seconds']['polytrace']:.2f} s; {shown}; bare {cell['seconds']['bare forward']:.2f} s "
        f"({100 * cell['share_of_bare_speed_up']['median']:.0f} %); token-layers {layers['ran']} "
        f"(counted {layers['counted']}, alone {layers['alone']}); "
        f"off {max(cell['largest_difference'].values()):.0e}{'' if is_right(cell) else '  WRONG'}"
    )
