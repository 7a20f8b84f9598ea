"""What there is while a random program is drawn: values with an example of each, and sites that may still be named.

Owns which value may be used where (an invoke's own, or any that is not ragged), and that a site is named in one way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from families import FAMILIES
from hypothesis import strategies as st
from language_by_hand import look_around
from language_programs import Prompt
from language_sites import Spot, spots
from torch import Tensor


@dataclass(frozen=True)
class Known:
    """A value while a program is drawn."""

    name: str
    example: Tensor
    block: int
    moment: int  # from when on it is there, in its invoke
    is_ragged: bool = False  # its rows are prompts' of different lengths
    has_features: bool = True  # its last dimension is no token's
    is_view: bool = False  # [sequences, tokens, ...] of its invoke
    hangs_on: frozenset[int] = frozenset()  # invokes


@dataclass
class Used:
    """What statements so far have named, of some prompts."""

    moments: dict[int, Spot] = field(default_factory=dict)
    skipped: list[tuple[int, int]] = field(default_factory=list)

    def allows(self, spot: Spot) -> bool:
        if any(first < spot.moment <= last for first, last in self.skipped):
            return False
        return self.moments.get(spot.moment, spot) == spot


@cache
def all_spots(family: str) -> tuple[Spot, ...]:
    return tuple(spots(family))


@cache
def shapes(family: str) -> dict[Spot, tuple[tuple[int, ...], torch.dtype]]:
    """The shapes of all sites of one prompt of five tokens."""
    return look_around(family, all_spots(family))


class Desk:
    """What its author draws from, and the values and sites of the program so far."""

    number: int  # of the invoke that is being written
    is_empty: bool  # it has no prompts of its own
    lengths: tuple[int, ...]
    own: Used

    def __init__(self, draw: st.DrawFn, family: str, pool: tuple[Prompt, ...], on_ranks: bool) -> None:
        self.draw, self.family, self.pool = draw, family, pool
        self.names = FAMILIES[family]
        self.spots = [spot for spot in all_spots(family) if spot.on_ranks or not on_ranks]
        self.known: list[Known] = []
        self.counted = 0
        self.used: list[Used] = []
        self.has_flow = False  # an edit of one invoke hangs on another

    def one(self, choices: Sequence[Any]) -> Any:
        return self.draw(st.sampled_from(choices))

    def numbers(self) -> tuple[int, int]:
        return self.draw(st.tuples(st.integers(0, 63), st.integers(0, 63)))

    def given(self, values: list[Known]) -> str:
        """One of them, for an edit."""
        value: Known = self.one(values)
        self.has_flow |= value.hangs_on != {self.number}
        return value.name

    def spot(self, choices: list[Spot]) -> Spot | None:
        others = self.used if self.is_empty else [self.own]
        allowed = [spot for spot in choices if all(used.allows(spot) for used in others)]
        if not allowed:
            return None
        special = [spot for spot in allowed if len(spot.keys) > 1 or "." not in spot.name or spot.token_dim == 2]
        spot: Spot = self.one(self.one([allowed, special or allowed]))
        self.use(spot)
        return spot

    def use(self, spot: Spot) -> None:
        self.own.moments[spot.moment] = spot

    def can_use(self, known: Known, moment: int | None = None) -> bool:
        """Here, or for an edit at a moment."""
        if known.block != self.number:
            return not known.is_ragged
        return moment is None or known.moment <= moment

    def example(self, spot: Spot) -> Tensor:
        shape, dtype = shapes(self.family)[spot]
        size = [*shape]
        size[0], size[spot.token_dim] = len(self.lengths), max(self.lengths)
        if spot.writes == "scale":
            size[3] = max(self.lengths)
        return torch.randn(size, generator=torch.Generator().manual_seed(sum(size))).to(dtype)

    def keep(
        self,
        example: Tensor,
        moment: int,
        is_ragged: bool = False,
        *,
        has_features: bool = True,
        is_view: bool = False,
        operands: Sequence[Known] = (),
    ) -> str:
        name = f"v{self.counted}"
        self.counted += 1
        hangs_on = frozenset({self.number}).union(*(each.hangs_on for each in operands))
        self.known.append(Known(name, example, self.number, moment, is_ragged, has_features, is_view, hangs_on))
        return name
