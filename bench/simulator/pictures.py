"""Pictures of simulated runs: how far apart backlogged tenants were, and how long answers took, policy by policy."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot

from bench.pictures import STYLE
from bench.simulator.population import SINGLE, kind_of
from bench.simulator.simulation import Run

_COLORS = {"fair": "#2b5c8a", "fcfs": "#e58f4e", "one": "#a8323a"}
_NAMES = {"fair": "fair (the product)", "fcfs": "first come, first served", "one": "one request at a time"}
_TENANTS = ("#2b5c8a", "#e58f4e", "#5f8d4e")
_POINTS = 600  # of a line


def draw(path: Path, *, title: str, runs: Mapping[str, Run]) -> None:
    """Left: what the three tenants were served, under the first policy given. Middle: the largest gap between two
    backlogged tenants, from the begin to the end of each run. Right: how many answers came within how long, of the
    tenant with single traces and of people, generations left out.
    """
    with pyplot.rc_context(STYLE):
        figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(11.5, 3.6), layout="constrained")
        first = next(iter(runs))
        books = runs[first].books
        hours, lines = np.array(books.times) / 3600, np.array(books.lines)
        keep = _thinned(len(hours))
        for number, tenant in enumerate(books.watched):
            left.plot(hours[keep], lines[keep, number] / 1e9, color=_TENANTS[number], label=tenant)
        left.set(xlabel="simulated hours", ylabel="billion token-layers served")
        left.set_title(f"three tenants of equal weight, {_NAMES[first]}", loc="left", fontsize=9)
        for name, run in runs.items():
            at, gaps = np.array(run.books.times) / run.seconds, np.array(run.books.gaps) / run.books.largest_pass
            keep = _thinned(len(at))
            middle.plot(at[keep], np.maximum(gaps[keep], 0.05), color=_COLORS[name], linewidth=0.9, label=_NAMES[name])
            for kind, style in ((SINGLE, "-"), ("person", ":")):
                own = [one for one in run.ended if kind_of(one.asked.tenant) == kind]
                waits = np.sort([one.ended - one.asked.at for one in own if one.asked.experiment != "generation"])
                if waits.size:
                    place = np.arange(1, waits.size + 1) / waits.size
                    keep = _thinned(waits.size)
                    right.plot(waits[keep], place[keep], style, color=_COLORS[name])
        middle.axhline(2.0, color="#9c978a", linewidth=0.9, linestyle="--")
        middle.set(yscale="log", xlabel="share of the run", ylabel="largest passes")
        middle.set_title("gap of two backlogged tenants (dashed: bound)", loc="left", fontsize=9)
        right.set(xscale="log", xlabel="seconds to the answer", ylabel="share of answers", ylim=(0, 1.02))
        right.set_title("a tenant's single traces (line), people (dots)", loc="left", fontsize=9)
        for axes in (left, middle, right):
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
        left.legend(frameon=False, loc="lower right", fontsize=8)
        top = max(2.0, *(max(run.books.gaps) / run.books.largest_pass for run in runs.values()))
        middle.set_ylim(0.04, 20 * top)
        middle.legend(frameon=False, loc="upper left", fontsize=8)
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110)
        pyplot.close(figure)


def _thinned(count: int) -> np.ndarray:
    """Places of at most so many points as a picture shows, the last one among them."""
    return np.unique(np.linspace(0, max(0, count - 1), _POINTS).astype(int))
