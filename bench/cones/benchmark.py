"""The whole benchmark: the grid of cells, how cost grows, two pictures.

    python -m bench.run cones

The larger model and the longer prompts have fewer rounds and some of the cases, so that all of it takes less than 15
minutes on two quiet cores; `python -m bench.cones` runs any cells with as much time as wanted. Sweeps are cut, evenly,
to what fits; `swept` and `whole_sweep` say from what to what.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from bench import pictures, tinyworld
from bench.cones import contest, growth
from bench.cones.by_batch import best_rows
from bench.cones.contest import TOLERANCE, Cell, chosen_size, run_cell
from bench.cones.growth import Growth
from bench.cones.models import folder_of, layer_parameters
from bench.cones.ours import Ours
from bench.cones.peer import VERSION, Peer, environment
from bench.cones.workloads import CASES, shape_of
from bench.environments import NoPeerError
from bench.plain import Plain

GOAL_SHARE = 0.90
_BATCH_ROWS = (256, 512, 1024)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Cells that share a model, a length of prompts and a number of threads."""

    model: str  # a name of bench.cones.models, or a folder
    tokens: int
    threads: int = 1
    cases: tuple[str, ...] = tuple(CASES)
    round_s: float = 2.0  # about how long a round of all contenders may take; it decides how large the sweeps are
    rounds: int = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class ConesConfig:
    """One run of the benchmark."""

    settings: tuple[Setting, ...]
    growth: Growth | None = field(default_factory=Growth)
    growth_model: str  # whose invokes grow
    growth_long_model: str = "8x512"  # whose prompts grow
    has_peer: bool = True
    pictures: str = "out"  # folder


def config_for(folder: Path, *, quick: bool) -> ConesConfig:
    """The configuration that `make bench` runs, or a short one to see that it works."""
    model = str(folder)
    if quick:
        return ConesConfig(
            settings=(Setting(model=model, tokens=16, rounds=1, round_s=0.1),),
            growth=Growth(invokes=(10, 40), tokens=(8, 16), token_runs=8, rounds=1),
            growth_model=model,
            growth_long_model=model,
            has_peer=False,
        )
    few = ("a", "b", "c-last", "f")
    return ConesConfig(
        settings=(
            Setting(model=model, tokens=64),
            Setting(model="8x512", tokens=64, round_s=4.0),
            Setting(model="8x512", tokens=256, cases=few, round_s=4.0, rounds=2),
            Setting(model="16x1024", tokens=64, cases=("a", "b"), rounds=2),
            Setting(model=model, tokens=64, threads=2),
            Setting(model="8x512", tokens=64, threads=2, round_s=3.0),
            Setting(model="16x1024", tokens=64, threads=2, cases=(*few, "d", "h"), rounds=2),
            Setting(model="16x1024", tokens=256, threads=2, cases=("a", "b"), rounds=2),
        ),
        growth_model=model,
    )


def run(config: ConesConfig) -> dict[str, Any]:
    """The figures, as plain JSON."""
    python, peer_says = _peer(config)
    cells = [cell for setting in config.settings for cell in _run_setting(setting, python)]
    figures: dict[str, Any] = {
        "cells": cells,
        "nnsight": peer_says,
        "allowed_difference": TOLERANCE,
        "goal_share_of_bare_speed_up": GOAL_SHARE,
    }
    if config.growth is not None:
        figures["growth"] = _run_growth(config, config.growth)
    return figures


def _run_setting(setting: Setting, python: Path | None) -> Iterator[dict[str, Any]]:
    folder = folder_of(setting.model)
    shape = shape_of(folder)
    ours = Ours(folder, threads=setting.threads)
    plain = Plain(folder)
    torch.set_num_threads(setting.threads)
    peer = Peer(python, folder) if python is not None else None
    try:
        rows, took = best_rows(plain, setting.tokens, _BATCH_ROWS)
        shown = _shown(folder, setting.model)
        tried = ", ".join(f"{ms:.1f} with {candidate}" for candidate, ms in took.items())
        _say(
            f"{shown} @{setting.tokens}, threads {setting.threads}: "
            f"batches of {rows} tokens (milliseconds a run: {tried})"
        )
        for case in setting.cases:
            size = chosen_size(
                case,
                shape,
                tokens=setting.tokens,
                threads=setting.threads,
                seconds=setting.round_s,
                layer_parameters=layer_parameters(folder),
            )
            cell = Cell(
                model=shown,
                case=case,
                tokens=setting.tokens,
                threads=setting.threads,
                size=size,
                rounds=setting.rounds,
                batch_rows=rows,
            )
            figures = run_cell(cell, shape, plain, ours, peer)
            _say(contest.tell(figures))
            yield {**figures, "batch_ms_a_run": took}
    finally:
        if peer is not None:
            peer.close()
        ours.close()


def _run_growth(config: ConesConfig, measured: Growth) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for name, model, rows_of in (
        ("invokes", config.growth_model, growth.by_invokes),
        ("tokens", config.growth_long_model, growth.by_tokens),
    ):
        folder = folder_of(model)
        shape = shape_of(folder)
        ours = Ours(folder, threads=1)
        try:
            plain = Plain(folder)
            torch.set_num_threads(1)
            rows = rows_of(measured, shape, plain, ours)
        finally:
            ours.close()
        _say(growth.tell(f"growth by {name} on {_shown(folder, model)}", rows))
        path = Path(config.pictures) / f"cones-{name}.png"
        pictures.draw_growth(path, rows=rows, title=_TITLES[name], label=_LABELS[name])
        figures[name] = {"model": _shown(folder, model), "rows": rows}
    return figures


_TITLES = {
    "invokes": "A patching sweep in one trace, as it grows",
    "tokens": "32 patches, as the prompt grows",
}
_LABELS = {"invokes": "invokes in the trace", "tokens": "tokens of the prompt"}


def _peer(config: ConesConfig) -> tuple[Path | None, str]:
    """The Python of the peer's environment, and its version or why it is absent."""
    if not config.has_peer:
        return None, "left out"
    try:
        return environment(), VERSION
    except NoPeerError as error:
        _say(str(error))
        return None, str(error)


def is_right(figures: Mapping[str, Any]) -> bool:
    """Whether every value was what it should be."""
    grown = [row for one in figures.get("growth", {}).values() for row in one["rows"]]
    return all(map(contest.is_right, figures["cells"])) and all(row["largest_difference"] <= TOLERANCE for row in grown)


def tell(figures: Mapping[str, Any]) -> str:
    """The figures for a person: a table for each setting."""
    lines = [f"seconds of opponents over polytrace's; nnsight {figures['nnsight']}"]

    def setting(cell: Mapping[str, Any]) -> tuple[str, int, int]:
        return cell["model"], cell["tokens"], cell["threads"]

    for (model, tokens, threads), cells in groupby(figures["cells"], key=setting):
        lines.append(f"\n{model}, prompts of {tokens}, {threads} thread{'s' if threads > 1 else ''}")
        lines.append(
            f"  {'case':<34}{'runs':>11}{'seconds':>9}{'one each':>10}{'batched':>9}{'by hand':>9}{'nnsight':>9}"
            f"{'of bare':>9}{'token-layers':>14}{'counted':>10}{'alone':>10}"
        )
        lines += [_table_row(cell) for cell in cells]
    for name, grown in figures.get("growth", {}).items():
        lines.append("")
        lines.append(growth.tell(f"growth by {name} on {grown['model']}", grown["rows"]))
    lines += [f"WRONG: {told}" for cell in figures["cells"] if (told := contest.what_is_wrong(cell)) is not None]
    return "\n".join(lines)


def _table_row(cell: Mapping[str, Any]) -> str:
    def times(name: str) -> str:
        figure = cell["ratios"].get(f"{name} / polytrace")
        return "-" if figure is None else f"{figure['median']:.2f}x"

    runs = str(cell["swept"]) if cell["swept"] == cell["whole_sweep"] else f"{cell['swept']}/{cell['whole_sweep']}"
    layers = cell["token_layers"]
    off = f"  sharing off {times('sharing off')}" if "sharing off / polytrace" in cell["ratios"] else ""
    return (
        f"  {cell['case'] + ' ' + cell['title']:<34}{runs:>11}{cell['seconds']['polytrace']:>9.2f}"
        f"{times('one each'):>10}{times('hand-batched'):>9}{times('best by hand'):>9}{times('nnsight'):>9}"
        f"{cell['share_of_bare_speed_up']['median']:>9.0%}{layers['ran']:>14}{layers['counted']:>10}"
        f"{layers['alone']:>10}{off}"
    )


def _shown(folder: Path, model: str) -> str:
    """A model's name for people."""
    if folder == tinyworld.FOLDER:
        return "tinyworld"
    return folder.name if model == str(folder) else model


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
