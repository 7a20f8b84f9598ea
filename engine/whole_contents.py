"""Contents of calls that the gate (`engine.whole_merging`) puts beside each other: of one structure, of other values.

What mixes the members of a batch shows where they differ, so what is the same all over, or no number, is replaced.
Integers that are the same all over are what calls in one have in common (`likeness`), and stay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Called = tuple[tuple[Any, ...], dict[str, Any]]  # arguments of one call, or of one that is several


def likeness(called: Called) -> tuple[int | None, ...]:
    """What calls in one have to have in common beside their structure: models go by masks that are ones all over."""

    def only(value: Any) -> int | None:
        if not isinstance(value, Tensor) or _is_of_numbers(value) or not value.numel():
            return None
        first = value.flatten()[0]
        return int(first) if bool((value == first).all()) else None

    return tuple([only(value) for value in (*called[0], *called[1].values())])


def telling(called: Called) -> Called:
    """A call whose numbers are numbers and differ, as far as its own do not."""
    chance = torch.Generator().manual_seed(0)

    def tell(value: Tensor) -> Tensor:
        if not _is_of_numbers(value):
            return value
        is_number = value.isfinite()
        if value.numel() > 1 and bool((value == value.flatten()[0]).all()):
            is_number = torch.zeros_like(is_number)
        return torch.where(is_number, value, _moved(value, chance))

    return _each(called, tell)


def other(called: Called, seed: int) -> Called:
    """A call with other content: numbers moved by as much as they are, integers drawn from among its own."""
    chance = torch.Generator().manual_seed(seed)

    def change(value: Tensor) -> Tensor:
        return _moved(value, chance) if _is_of_numbers(value) else _drawn(value, seed, chance)

    return _each(called, change)


def extremes(called: Called) -> Sequence[Callable[[Called], Called]]:
    """What makes neighbours of the strangest sort of a call: 1e4 times as large, of NaN, of infinities."""

    def large(one: Called) -> Called:
        return _each(other(one, _ANOTHER), lambda value: 1e4 * value if _is_of_numbers(value) else value)

    def lost(one: Called) -> Called:
        return _each(one, lambda value: torch.full_like(value, float("nan")) if _is_of_numbers(value) else value)

    def infinite(one: Called) -> Called:
        return _each(one, lambda value: _infinities(value) if _is_of_numbers(value) else value)

    has_numbers = any(
        isinstance(value, Tensor) and _is_of_numbers(value) for value in (*called[0], *called[1].values())
    )
    return (large, lost, infinite) if has_numbers else (large,)


_ANOTHER = 64  # a seed that no call beside these has


def _each(called: Called, change: Callable[[Tensor], Tensor]) -> Called:
    args, kwargs = called

    def changed(value: Any) -> Any:
        return change(value) if isinstance(value, Tensor) else value

    return tuple(map(changed, args)), {name: changed(value) for name, value in kwargs.items()}


def _is_of_numbers(value: Tensor) -> bool:
    return value.is_floating_point() or value.is_complex()


def _moved(value: Tensor, chance: torch.Generator) -> Tensor:
    """Every element moved by about its own size, so that it shows beside others of that size; zeros by about one."""
    kept = torch.where(value.isfinite(), value, 0)
    dtype = value.dtype if value.is_complex() else torch.float32
    noise = torch.randn(value.shape, generator=chance, dtype=dtype).to(value.device, value.dtype)
    moved = kept + noise * torch.where(kept == 0, 1, kept.abs())
    if value.is_complex():
        return moved
    most = torch.finfo(value.dtype).max / 2
    return moved.clamp(-most, most)  # masks are made of the least number there is


def _drawn(value: Tensor, seed: int, chance: torch.Generator) -> Tensor:
    """Integers within the range of a call's own, its own where some are below 0, without the largest or the least."""
    own = value.long().unique()
    if len(own) < 2:
        return value
    is_range = int(own[0]) >= 0
    start, end = (min(1, int(own[0])), int(own[-1]) + 1) if is_range else (0, len(own))
    if end - start > 2:
        start, end = (start, end - 1) if seed % 2 else (start + 1, end)
    drawn = torch.randint(start, end, (value.numel(),), generator=chance)
    if bool((drawn == drawn[0]).all()):  # that would be a call of another likeness
        drawn[seed % len(drawn)] = start if int(drawn[0]) != start else end - 1
    drawn = drawn.to(value.device)
    return (drawn if is_range else own[drawn]).reshape(value.shape).to(value.dtype)


def _infinities(value: Tensor) -> Tensor:
    places = torch.arange(value.numel(), device=value.device).reshape(value.shape)
    return torch.where(places % 2 == 0, float("inf"), float("-inf")).to(value.dtype)
