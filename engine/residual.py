"""How a layer's attention and MLP get into the residual: who takes it between them, and what was added until then.

A change of the residual is told by what modules gave: some of it, all rows times one factor.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from torch import Tensor, nn

from engine.parts import Added
from engine.seen_layer import SeenLayer, as_rows, first_tensor, is_matrix, is_parallel, is_same

SIDE_BY_SIDE = "attention and MLP of this layer run side by side on resid_pre: nothing lies between them"


class Middle(NamedTuple):
    """Who takes the residual between attention and MLP, or why nobody does, and how attention got into it."""

    module: str | None
    why_not: str
    norm_behind: str | None = None
    scale: float = 1.0
    rows: Tensor | None = None  # the residual that it takes
    attention_adds: Added | None = None
    mlp_adds: Added | None = None


def find_middle(layer: SeenLayer) -> Middle:
    """The first module whose input is the residual with what attention gave, and without what the MLP did."""
    first = as_rows(next(value for path, side, value in layer.calls if (path, side) == ("", "input")))
    last = as_rows(first_tensor(next(value for path, side, value in layer.calls if (path, side) == ("", "output"))))
    added: list[tuple[str, Tensor]] = []  # what the modules of the layer gave, so far
    candidates: list[tuple[str, str, float, Tensor, int]] = []
    for path, side, value in layer.calls:
        tensor = first_tensor(value)
        if path == "" or tensor is None or tensor.numel() != first.numel():
            continue
        rows = as_rows(tensor)
        if side == "output":
            added.append((path, rows))
        elif not is_same(rows, first):
            giver = next((given for given in added if is_parallel(rows - first, given[1])), None)
            if giver is not None:
                scale = float((rows - first).norm() / giver[1].norm())
                candidates.append((path, giver[0], scale, rows, len(added)))
    for path, other, scale, rows, behind in candidates:
        by_mlp = _adding(layer, last - rows, added[behind:])
        if by_mlp is not None:
            is_attention = layer.is_in_attention(other)
            by_attention = _adding(layer, rows - first, added[:behind])
            return Middle(path, "", None if is_attention else other, scale, rows, by_attention, by_mlp)
    once = _of_one_call(added)
    both = [(one, other) for one, a in once for other, b in once if is_same(last - first, a + b)]
    if both:
        told = [pair for pair in both if layer.is_in_attention(pair[0]) and not layer.is_in_attention(pair[1])]
        adds = [Added(path) for path in max(told, key=layer.num_inside)] if told else [None, None]
        return Middle(None, SIDE_BY_SIDE, None, 1.0, None, *adds)
    return Middle(None, "no module of this layer takes the sum of resid_pre and what attention gave")


def _adding(layer: SeenLayer, change: Tensor, given: list[tuple[str, Tensor]]) -> Added | None:
    """Which of what modules gave the change is a multiple of."""
    found = [(path, rows) for path, rows in _of_one_call(given) if is_parallel(change, rows)]
    if not found:
        return None
    path, rows = max(found, key=lambda one: layer.num_inside([one[0]]))
    module = layer.modules[path]
    is_plain = is_matrix(module) or isinstance(module, (nn.Dropout, nn.Identity)) or layer.num_inside([path]) > 1
    scale = float((change.flatten() @ rows.flatten()) / rows.norm().square())
    return Added(path, scale, is_normed=not is_plain)


def _of_one_call(given: list[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    """What modules gave that were called once: what others gave has no name."""
    calls = Counter(path for path, _ in given)
    return [(path, rows) for path, rows in given if calls[path] == 1]
