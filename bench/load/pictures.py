"""Pictures of a load: latencies, and what tenants were served over time against their shares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot

from bench.load.clients import Sent
from bench.pictures import STYLE

_COLORS = ("#2b5c8a", "#e58f4e", "#a8323a", "#5f8d4e", "#6d5a8c", "#8a7a5c")


def draw(path: Path, *, title: str, sent: Sequence[Sent], served: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    """Left: how many answers came within how long, by tenant. Right: what tenants were charged, over time."""
    with pyplot.rc_context(STYLE):
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(9.5, 3.6))
        for number, name in enumerate(served):
            color = _COLORS[number % len(_COLORS)]
            waits = np.sort([one.latency_s * 1e3 for one in sent if one.tenant == name and one.is_done])
            if waits.size:
                left.plot(waits, np.arange(1, waits.size + 1) / waits.size, color=color, label=f"{name} ({waits.size})")
            at, total = zip(*served[name], strict=True)
            right.step(at, total, where="post", color=color, label=name)
        left.set(xscale="log", xlabel="milliseconds from due to answered", ylabel="share of answers", ylim=(0, 1.02))
        left.grid(alpha=0.25)
        left.legend(frameon=False, loc="lower right")
        right.set(xlabel="seconds", ylabel="charged token-layers / weight")
        right.grid(alpha=0.25)
        right.legend(frameon=False, loc="upper left")
        figure.suptitle(title, x=0.02, ha="left", fontsize=11)
        figure.tight_layout()
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
        pyplot.close(figure)


def draw_race(path: Path, *, title: str, users: Sequence[int], rates: Mapping[str, Sequence[float]]) -> None:
    """Requests a second of each service, by how many users ask at once."""
    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(figsize=(5.6, 3.4))
        width = 0.8 / len(rates)
        for number, (name, heights) in enumerate(rates.items()):
            places = np.arange(len(users)) + (number - (len(rates) - 1) / 2) * width
            bars = axes.bar(places, heights, width=width * 0.92, color=_COLORS[number], label=name)
            axes.bar_label(bars, fmt="%.0f", padding=2, fontsize=8)
        axes.set_xticks(range(len(users)), [f"{count} users" if count > 1 else "1 user" for count in users])
        axes.set(ylabel="requests a second")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="upper left")
        axes.set_title(title, loc="left", fontsize=11)
        figure.tight_layout()
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
        pyplot.close(figure)
