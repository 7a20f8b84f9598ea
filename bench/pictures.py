"""Pictures: a logit lens, a map of what patching restores, how cost grows, what stages do when.

Takes plain numbers, writes PNG files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm
from matplotlib.patches import Patch

_INK = "#1f2430"
_PROBABILITY = LinearSegmentedColormap.from_list("probability", ["#f7f5ef", "#f3d9a4", "#e58f4e", "#a8323a", "#4a1134"])
_RESTORED = LinearSegmentedColormap.from_list("restored", ["#2b5c8a", "#a9c8de", "#f7f5ef", "#eca66a", "#9e2a2b"])
_PHASES = {"computing": "#2b5c8a", "waiting": "#e8e5dc", "sending": "#e58f4e", "saving": "#a8323a"}
STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.edgecolor": "#c9c5ba",
    "axes.labelcolor": _INK,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "figure.dpi": 160,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """Some time that a stage spent at one thing."""

    stage: int
    phase: str  # of `_PHASES`
    at: tuple[float, float]  # seconds: from, to
    number: int  # of the pass


def draw_logit_lens(
    path: Path, *, tokens: Sequence[str], guesses: Sequence[Sequence[str]], probabilities: Sequence[Sequence[float]]
) -> None:
    """What each layer would say next at each token: `guesses[layer][token]`, shaded by its probability."""
    with pyplot.rc_context(STYLE):
        figure, axes = _canvas(columns=len(tokens), rows=len(guesses))
        image = axes.imshow(probabilities, cmap=_PROBABILITY, vmin=0, vmax=1, aspect="auto", origin="lower")
        for layer, row in enumerate(guesses):
            for column, guess in enumerate(row):
                color = "white" if probabilities[layer][column] > 0.5 else _INK
                axes.text(column, layer, _shown(guess), ha="center", va="center", color=color, fontsize=7.5)
        _label(axes, tokens=tokens, rows=[f"{layer}" for layer in range(len(guesses))])
        axes.set_title("Logit lens: the next token each layer would say", loc="left", pad=12, fontsize=11)
        _finish(figure, image, "probability of the guess", path)


def draw_patching(
    path: Path, *, tokens: Sequence[str], restored: Sequence[Sequence[float]], clean: str, corrupt: str
) -> None:
    """How much of the answer comes back when one residual of the clean run is put in: `restored[layer][token]`.

    1 is the clean run's logit difference, 0 the corrupt run's. `tokens` name the columns (clean above corrupt).
    """
    with pyplot.rc_context(STYLE):
        figure, axes = _canvas(columns=len(tokens), rows=len(restored))
        limit = max(1.0, *(abs(value) for row in restored for value in row))
        norm = TwoSlopeNorm(vmin=-limit, vcenter=0, vmax=limit)
        image = axes.imshow(restored, cmap=_RESTORED, norm=norm, aspect="auto", origin="lower")
        for layer, row in enumerate(restored):
            for column, value in enumerate(row):
                if abs(value) >= 0.05:
                    color = "white" if abs(value) > 0.7 * limit else _INK
                    axes.text(column, layer, f"{value:.2f}", ha="center", va="center", color=color, fontsize=7.5)
        _label(axes, tokens=tokens, rows=[f"{layer}" for layer in range(len(restored))])
        title = f"Activation patching: the residual of “{clean}”\nput into “{corrupt}”, one layer and token at a time"
        axes.set_title(title, loc="left", pad=12, fontsize=11)
        _finish(figure, image, "logit difference restored", path)


def draw_growth(path: Path, *, rows: Sequence[Mapping[str, Any]], title: str, label: str) -> None:
    """Seconds over size, both logarithmic: all of a trace, what of it is not running, hand-batched runs beside it.

    A row of `bench.cones.growth` has `at`, `seconds`, `stages_s` and `hand_batched_s`.
    """
    at = [row["at"] for row in rows]
    planner = [row["stages_s"]["compile"] + row["stages_s"]["plan"] for row in rows]
    lines = (
        ("hand-batched runs of the whole model", [row["hand_batched_s"] for row in rows], "#9c978a", "-"),
        ("polytrace, all of it", [row["seconds"] for row in rows], "#a8323a", "-"),
        ("of it: running", [row["stages_s"]["run"] for row in rows], "#e58f4e", "--"),
        ("of it: planning", planner, "#2b5c8a", "--"),
        ("of it: recording", [row["stages_s"]["record"] for row in rows], "#6fa3c7", "--"),
    )
    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(figsize=(6.4, 4.2), layout="constrained")
        for name, seconds, color, style in lines:
            axes.plot(at, seconds, style, color=color, marker="o", markersize=3.5, linewidth=1.6, label=name)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks(at, [f"{size:,}" for size in at])
        axes.minorticks_off()
        axes.set_xlabel(label)
        axes.set_ylabel("seconds")
        axes.grid(color="#e8e5dc", linewidth=0.8)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
        axes.set_title(title, loc="left", pad=12, fontsize=11)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
        pyplot.close(figure)


def draw_timeline(
    path: Path, *, panels: Sequence[tuple[str, Sequence[Stretch]]], phases: Sequence[str], title: str
) -> None:
    """What each stage did when, a panel below the other with one axis of time. Every second pass is lighter."""
    num_stages = 1 + max(stretch.stage for _, stretches in panels for stretch in stretches)
    with pyplot.rc_context(STYLE):
        size = 9.6, 0.9 + len(panels) * (0.55 + 0.38 * num_stages)
        figure, all_axes = pyplot.subplots(len(panels), figsize=size, sharex=True, layout="constrained", squeeze=False)
        for axes, (name, stretches) in zip(all_axes[:, 0], panels, strict=True):
            for stretch in stretches:
                start, stop = stretch.at
                alpha = 0.6 if stretch.number % 2 and stretch.phase == "computing" else 1.0
                bar = axes.barh(stretch.stage, stop - start, left=start, height=0.78, color=_PHASES[stretch.phase])
                bar[0].set_alpha(alpha)
            axes.set_yticks(range(num_stages), [f"stage {stage}" for stage in range(num_stages)])
            axes.invert_yaxis()
            axes.tick_params(length=0)
            axes.set_title(name, loc="left", fontsize=9)
            axes.margins(x=0)
            for side in ("top", "right", "left"):
                axes.spines[side].set_visible(False)
        all_axes[-1, 0].set_xlabel("seconds")
        handles = [Patch(color=_PHASES[phase]) for phase in phases]
        figure.text(0.01, 0.01, "every other pass is lighter", fontsize=8)
        figure.legend(handles, phases, loc="outside lower right", ncols=len(phases), frameon=False, fontsize=8)
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
        pyplot.close(figure)


def _canvas(*, columns: int, rows: int) -> tuple[Any, Any]:
    return pyplot.subplots(figsize=(2.2 + 0.78 * columns, 1.9 + 0.42 * rows), layout="constrained")


def _label(axes: Any, *, tokens: Sequence[str], rows: Sequence[str]) -> None:
    axes.set_xticks(range(len(tokens)), [_shown(token) for token in tokens], rotation=35, ha="right")
    axes.set_yticks(range(len(rows)), rows)
    axes.set_ylabel("layer")
    axes.tick_params(length=0)
    axes.set_xticks([column - 0.5 for column in range(1, len(tokens))], minor=True)
    axes.set_yticks([row - 0.5 for row in range(1, len(rows))], minor=True)
    axes.grid(which="minor", color="white", linewidth=1.2)
    axes.tick_params(which="minor", length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _finish(figure: Any, image: Any, label: str, path: Path) -> None:
    bar = figure.colorbar(image, label=label, pad=0.015, aspect=30)
    bar.outline.set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)


def _shown(token: str) -> str:
    """The token as a person reads it: a leading space as a small mark, `$` not as mathematics."""
    return token.replace(" ", "·").replace("\n", "⏎").replace("$", r"\$") or "∅"
