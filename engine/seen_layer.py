"""One layer of the tiny twin and what happened in it: who took and gave what, a row a token.

Owns how its calls are looked up, and when numbers count as the same. Knows nothing of what they mean: that heads,
neurons and the residual are among them is for `engine.heads`, `engine.neurons`, `engine.residual` and `engine.blocks`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from engine.experts import is_experts
from engine.own_formula import OwnFormula
from engine.specimen import NUM_TOKENS, Seen

TOLERANCE = 1e-4  # of the largest value, float32


class SeenLayer:
    """Calls by path in the layer, in the order in which they happened; "" is the layer itself."""

    def __init__(self, layer: nn.Module, path: str, seen: Seen) -> None:
        self.modules = dict(layer.named_modules())
        self.seen = seen
        inside = path + "."
        self.calls = [
            (called.removeprefix(inside) if called != path else "", side, value)
            for called, side, value in seen.calls
            if called == path or called.startswith(inside)
        ]
        attending = [name for name, module in self.modules.items() if id(module) in seen.attended]
        found = [name for name in self.modules if name and inside + name in seen.formulas]
        formulas = {name: seen.formulas[inside + name] for name in found if not _is_below(name, found)}
        self.formula: OwnFormula | None = None
        if not attending and len(formulas) == 1:
            ((own, self.formula),) = formulas.items()
            attending = [own]
        self.attention = attending[0] if len(attending) == 1 else None

    def value(self, path: str, side: str) -> Any:
        """What a module took or gave when it was first called."""
        return next(value for called, at, value in self.calls if (called, at) == (path, side))

    def rows_of(self, path: str, side: str) -> Tensor | None:
        """What a module took or gave, a row a token; None where that is no such tensor."""
        calls = (first_tensor(value) for called, at, value in self.calls if (called, at) == (path, side))
        tensor = next(calls, None)
        return as_rows(tensor) if isinstance(tensor, Tensor) else None

    def outputs(self, within: str | None) -> Iterator[tuple[str, Tensor]]:
        """What modules gave, those inside of one or all."""
        for path, side, value in self.calls:
            is_inside = within is None or path.startswith(f"{within}.")
            if side == "output" and is_inside and isinstance(value, Tensor) and value.ndim <= 3:
                yield path, as_rows(value)

    def linear(self, neurons: Tensor) -> Iterable[Tensor]:
        """Features as many as neurons that a matrix gave, halves of larger ones included."""
        width = neurons.shape[1]
        for path, features in self.outputs(within=None):
            if is_matrix(self.modules[path]) and features.shape[1] in (width, 2 * width):
                yield from features.split(width, 1)

    def is_in_attention(self, path: str) -> bool:
        return self.attention is not None and f"{path}.".startswith(f"{self.attention}.")

    def is_in_mlp(self, path: str) -> bool:
        inside = [f"{other}." for other in (self.attention, self.experts()) if other]
        return path not in ("", self.attention, self.experts()) and not path.startswith(tuple(inside))

    def experts(self) -> str | None:
        """The module that holds them."""
        return next((path for path, module in self.modules.items() if is_experts(module)), None)

    def num_inside(self, paths: Iterable[str]) -> int:
        return sum(1 for path in paths for _ in self.modules[path].modules())


def first_tensor(value: Any) -> Any:
    """The tensor that a module gives, or the first of several."""
    return value[0] if isinstance(value, tuple) and value else value


def as_rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(NUM_TOKENS, -1)


def is_same(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    return float((one - other).abs().max()) <= TOLERANCE * max(1e-6, float(other.abs().max()))


def is_parallel(one: Tensor, other: Tensor) -> bool:
    """Whether they are the same but for one factor over all rows (families scale what they add to the residual)."""
    if one.shape != other.shape or float(one.norm()) < 1e-6 or float(other.norm()) < 1e-6:
        return False
    return float((one.flatten() @ other.flatten()) / (one.norm() * other.norm())) > 1 - TOLERANCE


def is_matrix(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 2 and not isinstance(module, nn.Embedding)


def is_activation(module: nn.Module) -> bool:
    is_plain = next(module.children(), None) is None and next(module.parameters(), None) is None
    return is_plain and not isinstance(module, (nn.Dropout, nn.Identity))


def _is_below(path: str, others: Iterable[str]) -> bool:
    return any(path.startswith(f"{other}.") for other in others)
