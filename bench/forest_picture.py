"""How a pass looks: token rows from left to right, layers from bottom to top, a cell for each row that a layer runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import accumulate, groupby, pairwise
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.patches import FancyBboxPatch

_SIZE = 1200, 594  # pixels; what is drawn counts them from the lower left corner
_DPI = 100
_PAPER, _INK, _FAINT = "#ffffff", "#1f2430", "#666d7a"
# Okabe and Ito's, which people of any colour vision tell apart; what is drawn on them.
_COLORS = (("#0072b2", "white"), ("#e69f00", _INK), ("#009e73", "white"), ("#cc79a7", _INK))
_SHARED = ("#343b49", "white")
_WHOLE = "#d5d2c8"
_EDGE, _LEFT, _FLOOR = 24, 78, 137  # of the picture, and of its cells
_HEIGHT, _BETWEEN = 30, 7  # of a cell, and from one layer to the next
_APART = 0.75  # columns between segments, at least
_RULES = (
    "equal rows exist once, for all users who need them",
    "where a token or a write differs, a sequence forks:\nits own rows are only the later tokens, in the later layers",
    "behind the last value that somebody needs, a row ends",
)


class Kind(Enum):
    """What happens to a value."""

    READ = "read"  # for another run of the same user
    SAVED = "saved"  # it, or what is made of it, goes back to the user
    WRITTEN = "written"


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A row of the stream."""

    segment: int
    position: int  # in its prompt
    text: str  # of its token


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """A row that a layer runs."""

    column: int
    layer: int
    users: tuple[int, ...]  # who need it, ascending


@dataclass(frozen=True, slots=True, kw_only=True)
class Branch:
    """Where a fork leaves its parent."""

    source: int  # column of the parent, whose row is in the layer before; of layer 0 the token before
    target: int  # first column of the fork
    layer: int  # first of the fork


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """A value that somebody reads, saves or writes. A layer's output is written into the rows of the next one."""

    kind: Kind
    column: int
    layer: int  # or as many as there are: behind the last one
    user: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PassPicture:
    """All that is drawn."""

    users: tuple[tuple[str, str], ...]  # name, and what they do
    columns: tuple[Column, ...]
    num_layers: int
    cells: tuple[Cell, ...]
    branches: tuple[Branch, ...]
    marks: tuple[Mark, ...]
    num_runs: int
    token_layers_alone: int

    @property
    def token_layers(self) -> int:
        """That the pass computes."""
        return len(self.cells)


def draw(path: Path, picture: PassPicture) -> None:
    """A PNG file of some 1,200 pixels' width, on paper of its own: pages may be light or dark."""
    with pyplot.rc_context({"font.family": "sans-serif", "text.color": _INK}):
        figure = pyplot.figure(figsize=(_SIZE[0] / _DPI, _SIZE[1] / _DPI), dpi=_DPI, facecolor="none")
        axes = figure.add_axes((0, 0, 1, 1), xlim=(0, _SIZE[0]), ylim=(0, _SIZE[1]))
        axes.axis("off")
        _Drawing(axes, picture).draw()
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, pil_kwargs={"optimize": True})
        pyplot.close(figure)


class Places:
    """Where columns and layers are, in pixels from the lower left corner. Whole ones: edges are sharp."""

    def __init__(self, picture: PassPicture) -> None:
        edges = [before.segment != column.segment for before, column in pairwise(picture.columns)]
        room, num_columns, num_gaps = _SIZE[0] - _LEFT - _EDGE, len(picture.columns), max(1, sum(edges))
        self.pitch = int(room / (num_columns + _APART * num_gaps))
        self.width = self.pitch - 2  # of a cell
        apart = (room - num_columns * self.pitch) // num_gaps
        steps = (self.pitch + apart * is_edge for is_edge in edges)
        self.lefts = list(accumulate(steps, initial=_LEFT))  # of each column
        self.head = self.bottom(picture.num_layers) + 10

    def center(self, column: int) -> float:
        """Of a column."""
        return self.lefts[column] + self.width / 2

    def bottom(self, layer: int) -> float:
        """Of a layer's cells."""
        return _FLOOR + layer * (_HEIGHT + _BETWEEN)

    def middle(self, layer: int) -> float:
        """Of a layer's cells, where there are no marks."""
        return self.bottom(layer) + _HEIGHT / 2


def colors_of(users: Sequence[int]) -> tuple[str, str]:
    """Of cells that some users need, and of what is drawn on them."""
    return _COLORS[users[0]] if len(users) == 1 else _SHARED


class _Drawing:
    """One picture on its way."""

    def __init__(self, axes: Any, picture: PassPicture) -> None:
        self._axes, self._picture, self._places = axes, picture, Places(picture)

    def draw(self) -> None:
        """All of it."""
        self._box((0, 0), *_SIZE, _PAPER, rounding=14)
        self._draw_names()
        self._draw_groups()
        self._draw_branches()
        for cell in self._picture.cells:
            color, _ = colors_of(cell.users)
            self._box(
                (self._places.lefts[cell.column], self._places.bottom(cell.layer)), self._places.width, _HEIGHT, color
            )
        self._draw_marks()
        self._draw_heading()
        self._draw_legend()
        self._draw_rules()

    def _draw_names(self) -> None:
        """Of layers and tokens."""
        for layer in range(self._picture.num_layers):
            self._text(_LEFT - 12, self._places.middle(layer), f"layer {layer}", 13, ha="right")
        self._text(_LEFT - 12, self._places.head, "head", 13, ha="right")
        for number, column in enumerate(self._picture.columns):
            where = self._places.center(number), _FLOOR - 18
            self._text(*where, _shown(column.text), 12, rotation=90, ha="center", va="top")
        self._text(_EDGE, 20, "→ token rows of all users in one packed stream, no padding", 13, color=_FAINT)

    def _draw_groups(self) -> None:
        """What stands side by side: the rows of a prompt, or forks that the same users have from the same layer on."""
        columns = self._picture.columns
        layers = {branch.target: branch.layer for branch in self._picture.branches}
        users = {cell.column: cell.users for cell in self._picture.cells}

        def kind(segment: list[int]) -> object:
            layer = layers.get(segment[0], 0)
            return (layer, users.get(segment[0])) if layer else segment[0]

        segments = [list(own) for _, own in groupby(range(len(columns)), lambda column: columns[column].segment)]
        num_prompts, y = 0, _FLOOR - 72
        for _, group in groupby(segments, kind):
            first, *others = group
            layer, last = layers.get(first[0], 0), (others or [first])[-1]
            left, right = self._places.lefts[first[0]], self._places.lefts[last[-1]] + self._places.width
            num_prompts += not layer
            forks = f"{len(others) + 1} forks" if others else "fork"
            told = f"{forks} written\nbehind layer {layer - 1}" if layer else f"prompt {num_prompts}"
            self._axes.plot((left, right), (y, y), color=_FAINT, linewidth=1.2)
            self._text((left + right) / 2, y - 6, told, 12, ha="center", va="top", color=_FAINT)

    def _draw_branches(self) -> None:
        """From where a fork's parent is left to where the fork begins; in front of layer 0 one below another."""
        depth = 0
        for branch in self._picture.branches:
            low = self._places.bottom(branch.layer) - _BETWEEN / 2
            if not branch.layer:
                low, depth = low - 4 * depth, depth + 1
            source, target = self._places.center(branch.source), self._places.center(branch.target)
            end = low - _BETWEEN if branch.layer else self._places.bottom(0)
            xs, ys = (source, source, target, target), (end, low, low, self._places.bottom(branch.layer))
            self._axes.plot(xs, ys, color=_FAINT, linewidth=1.2, zorder=1)

    def _draw_marks(self) -> None:
        users_of = {(cell.column, cell.layer): cell.users for cell in self._picture.cells}
        for mark in self._picture.marks:
            if mark.layer == self._picture.num_layers:
                self._mark(mark.kind, self._places.center(mark.column), self._places.head, _COLORS[mark.user][0], 7)
                continue
            _, color = colors_of(users_of[mark.column, mark.layer])
            above = 7 if mark.kind is Kind.WRITTEN else _HEIGHT - 8
            self._mark(mark.kind, self._places.center(mark.column), self._places.bottom(mark.layer) + above, color, 5.5)

    def _draw_heading(self) -> None:
        picture, top = self._picture, _SIZE[1]
        self._text(_EDGE, top - 36, "A pass is a forest of token rows", 25, weight="bold")
        told = f"{picture.num_runs} runs that {len(picture.users)} users ask for, in one forward pass"
        self._text(_EDGE, top - 66, told, 15, color=_FAINT)
        left, width = 760, 230
        counts = (
            ("one run each", picture.token_layers_alone, _WHOLE),
            ("this pass", picture.token_layers, _SHARED[0]),
        )
        for place, (name, count, color) in enumerate(counts):
            middle, long = top - 38 - 27 * place, width * count / picture.token_layers_alone
            self._text(left - 10, middle, name, 15, ha="right")
            self._box((left, middle - 9), long, 18, color)
            self._text(left + long + 9, middle, f"{count:,} token-layers", 15, weight="bold")

    def _draw_legend(self) -> None:
        colors = [*_COLORS[: len(self._picture.users)], _SHARED]
        names = [*(f"{name}: {does}" for name, does in self._picture.users), "several users: computed once"]
        x, y = float(_EDGE), _SIZE[1] - 106
        for name, (color, _) in zip(names, colors, strict=True):
            self._box((x, y - 8), 12, 16, color)
            x = self._text(x + 18, y, name, 13) + 20
        for kind in Kind:
            self._box((x, y - 8), 12, 16, _SHARED[0])
            self._mark(kind, x + 6, y, _SHARED[1], 5.5)
            x = self._text(x + 18, y, kind.value, 13) + 20

    def _draw_rules(self) -> None:
        """The three rules of the forest, and for each a place where it is seen."""
        cells = self._picture.cells
        shared = next(cell.column for cell in cells if len(cell.users) > 1)
        ends = {cell.column: cell.layer for cell in cells}  # layers ascend
        ended = min(ends, key=lambda column: (ends[column], column))
        forks = [branch for branch in self._picture.branches if branch.layer]
        fork = forks[len(forks) // 3]
        self._badge(1, (self._places.center(shared), self._places.head))
        self._badge(2, (self._places.center(fork.target), self._places.bottom(fork.layer) - 20))
        self._badge(3, (self._places.center(ended), self._places.bottom(ends[ended] + 1) + 10))
        x, y = self._places.center(fork.target) + 50, self._places.bottom(3) + 8
        for number, rule in enumerate(_RULES, 1):
            self._badge(number, (x, y))
            self._text(x + 18, y + 8, rule, 14, va="top")
            y -= 30 + 18 * rule.count("\n")

    def _badge(self, number: int, where: tuple[float, float]) -> None:
        self._axes.plot(*where, "o", markersize=13, color=_PAPER, markeredgecolor=_INK, markeredgewidth=1.2, zorder=4)
        self._text(where[0], where[1] - 0.5, str(number), 12, ha="center", zorder=5, weight="bold")

    def _mark(self, kind: Kind, x: float, y: float, color: str, size: float) -> None:
        shape, inside = "^" if kind is Kind.WRITTEN else "o", "none" if kind is Kind.READ else color
        self._axes.plot(x, y, shape, markersize=size, color=inside, markeredgecolor=color, markeredgewidth=1, zorder=3)

    def _box(self, corner: tuple[float, float], width: float, height: float, color: str, rounding: float = 2.5) -> None:
        style, behind = f"round,pad=0,rounding_size={rounding}", color == _PAPER
        box = FancyBboxPatch(corner, width, height, style, facecolor=color, linewidth=0, zorder=0 if behind else 2)
        self._axes.add_patch(box)

    def _text(self, x: float, y: float, text: str, pixels: float, va: str = "center_baseline", **named: Any) -> float:
        """Where it ends on the right."""
        placed = self._axes.text(x, y, text, fontsize=pixels * 72 / _DPI, va=va, **named)
        return float(placed.get_window_extent().x1)


def _shown(text: str) -> str:
    """A token as a person reads it, `$` not as mathematics."""
    return text.strip().replace("$", r"\$") or "∅"
