"""Where an operation of torch leaves the calls that lie in its inputs: one rule for each kind of operation.

An operation that no rule is about, and each that goes across calls, leaves them mixed. A rule looks at places and
shapes, never at values, so what it says holds whatever calls have. That the rest is as it is of a call alone (shapes,
numbers among the arguments) is looked at by `engine.call_proof`.
"""

from __future__ import annotations

from collections.abc import Collection

import torch

from engine.call_axis import MIXED, SAME, Along, Place, Total
from engine.call_lookups import LOOKUPS
from engine.call_moves import MOVES
from engine.call_step import Rule, Step, joined, unknown
from engine.call_sums import SUMS

_SIZES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("view", "_unsafe_view", "expand", "_reshape_alias"), ("size",)),
    **dict.fromkeys(("zeros", "ones", "full", "empty"), ("size",)),
    **dict.fromkeys(("new_zeros", "new_ones", "new_full", "new_empty"), ("size",)),
    "repeat": ("repeats",),
    "arange": ("end",),
    "native_group_norm": ("N",),
}


def rule_of(name: str, tags: Collection[torch.Tag]) -> Rule:
    """The rule for an operation."""
    rule = _RULES.get(name)
    return rule or (_by_element if torch.Tag.pointwise in tags else unknown)


def may_differ(step: Step) -> Collection[str]:
    """Arguments in which an operation may have other numbers than with a call alone: sizes, which shapes show."""
    if step.name == "slice":
        place = step.place(step.first)
        return ("start", "end") if isinstance(place, Along) and step.dims("dim") == (place.dim,) else ()
    if step.name == "eq" and isinstance(step.place(step.first), Total):
        return ("other",)
    return _SIZES.get(step.name, ())


def _by_element(step: Step) -> Place:
    return joined(step, list(step.tensors), step.out.ndim)


def _compared(step: Step) -> Place:
    """`eq`. Whether all are true is the same for calls that have this in common, and so for all of them together."""
    total = step.place(step.first)
    if isinstance(total, Total):
        other, own = step.arguments["other"], step.numbers["other"]
        is_all = isinstance(other, int) and other == total.elements == step.calls * own
        return SAME if is_all else MIXED
    return _by_element(step)


_RULES: dict[str, Rule] = {
    **MOVES,
    **SUMS,
    **LOOKUPS,
    **dict.fromkeys(("floor_divide", "masked_fill", "masked_fill_", "floor_divide_"), _by_element),
    **dict.fromkeys(("hardswish", "hardswish_", "_prelu_kernel", "log_sigmoid_forward"), _by_element),
    "eq": _compared,
}
