"""Contents of calls that the gate (`engine.whole_merging`) puts beside each other: of one structure, of other values.

What mixes the members of a batch shows where they differ, so what is the same all over, or no number, is replaced.
Integers that are the same all over are what calls in one have in common (`likeness`), and stay.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

Called = tuple[tuple[Any, ...], dict[str, Any]]  # arguments of one call, or of one that is several


def likeness(called: Called) -> tuple[Hashable, ...]:
    """What calls in one have to have in common beside their structure, because models go by it: of integers which one
    they are all over, and otherwise whether one of them is 0 (a mask with a hole in it).
    """

    def likeness_of(value: Any) -> Hashable:
        if not isinstance(value, Tensor) or _is_of_numbers(value) or not value.numel():
            return None
        first = value.flatten()[0]
        return int(first) if bool((value == first).all()) else ("all", bool(value.all()))

    return tuple([likeness_of(value) for value in (*called[0], *called[1].values())])


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
    """A call with other content: numbers moved by as much as they are, integers drawn anew."""
    chance = torch.Generator().manual_seed(seed)

    def change(value: Tensor) -> Tensor:
        return _moved(value, chance) if _is_of_numbers(value) else _drawn(value, seed, chance)

    return _each(called, change)


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
    """Integers from 1 (0 where a call has one) to the largest of its own, or of its own where these are below 0; of its
    likeness. Takes no more memory than they do.
    """
    own = value.long().unique()
    if len(own) < 2:
        return value
    is_range = int(own[0]) >= 0
    start, end = (min(1, int(own[0])), int(own[-1]) + 1) if is_range else (0, len(own))
    drawn = torch.randint(start, end, (value.numel(),), generator=chance).to(value.device)
    drawn = drawn if is_range else own[drawn]
    if not bool(value.all()):
        drawn[seed % len(drawn)] = 0
    if bool((drawn == drawn[0]).all()):
        drawn[(seed + 1) % len(drawn)] = own[0] if int(drawn[0]) != int(own[0]) else own[-1]
    return drawn.reshape(value.shape).to(value.dtype)
