"""Features of a module, or of its weights, as the heads or halves that they are: views, on every rank.

A fused matrix gives several roles' features: one role behind the other (`q | k | v`), each split over the ranks by
itself, or the roles of a key/value head side by side (`q k v | q k v`), where ranks have whole heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto

from torch import Tensor

# H = heads, C = features of a head, W = features of the module, D = what it makes them of


@dataclass(frozen=True, slots=True, kw_only=True)
class Units:
    """Which of a dimension's features are a role's."""

    total: int  # units in the dimension, or in each period of it
    start: int  # the first of the role's
    count: int
    size: int | None  # features of a unit; None: as many as `total` equal parts have
    is_interleaved: bool = False  # periods lie one after another, each with some of every role

    @property
    def is_view(self) -> bool:
        """Whether `of` shares memory with what it was given."""
        return not self.is_interleaved or self.count == 1

    def of(self, tensor: Tensor, dim: int) -> Tensor:
        """`[..., W, ...]` as `[..., H, C, ...]`, of the ranks' part as of the whole."""
        dim %= tensor.ndim
        if self.is_interleaved:
            periods: Tensor = tensor.unflatten(dim, (-1, self.total, self.size or 1)).narrow(
                dim + 1, self.start, self.count
            )
            return periods.select(dim + 1, 0) if self.count == 1 else periods.flatten(dim, dim + 1)
        units: Tensor = tensor.unflatten(dim, (self.total, -1) if self.size is None else (-1, self.size))
        here = units.shape[dim]
        start, count = self.start * here // self.total, self.count * here // self.total
        if count * self.total != self.count * here or start * self.total != self.start * here:
            raise ValueError(f"{here} of {self.total} units are not whole heads of every kind")
        return units.narrow(dim, start, count)

    def put(self, tensor: Tensor, values: Tensor) -> None:
        """Gives the last dimension's features of the role other values, `[..., H, C]`."""
        if not self.is_interleaved:
            self.of(tensor, -1).copy_(values)
            return
        periods: Tensor = tensor.unflatten(-1, (-1, self.total, self.size or 1))
        periods.narrow(-2, self.start, self.count).copy_(values.unflatten(-2, (-1, self.count)))


def units_of(role: str, order: tuple[str, ...], counts: Mapping[str, int], size: int | None, periods: int) -> Units:
    """The role's units in a matrix that holds these roles, so many of each in a period."""
    each = {other: counts[other] // periods for other in order}
    start = sum(each[other] for other in order[: order.index(role)])
    return Units(total=sum(each.values()), start=start, count=each[role], size=size, is_interleaved=periods > 1)


class Form(Enum):
    """What is made of a matrix `[W, D]`, whose own layout may be `[D, W]`."""

    TO_HEADS = auto()  # [H, D, C]: what makes each head's features
    FROM_HEADS = auto()  # [H, C, D]: what is made of each head's features
    MATRIX = auto()  # [D, W], or the half of it
    HEADS = auto()  # of a bias: [H, C]
    ROWS = auto()  # as it is, from a row on


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedWeight:
    """A weight by the name that the field has for it: a view of a parameter."""

    path: str  # of the module that has the name, and the name
    of: str  # the parameter
    form: Form
    units: Units | None = None  # None: all of it
    is_transposed: bool = False  # the parameter is [D, W], as GPT-2's
    share: int = 1  # query heads of a key/value head, where each query head is to have its own
    first: int = 0  # row

    def is_of_parts(self, split_dim: int, blocks: int) -> bool:
        """Whether a rank's part of the parameter has that rank's part of this, and nothing of another role.

        Ranks that split a fused matrix in two, whatever its roles are, have other roles each.
        """
        units = self.units
        if units is None or units.is_interleaved or units.count == units.total or blocks > 1:
            return True
        return split_dim != int(self.is_transposed and self.form is not Form.HEADS)

    def view(self, parameter: Tensor, copies: int = 1) -> Tensor:
        """The named tensor, of the ranks' part as of the whole; shares memory but for `share`.

        `copies`: so many ranks hold the same key/value heads.
        """
        share = self.share // copies
        if self.form is Form.ROWS:
            return parameter[self.first :]
        if self.form is Form.HEADS:
            if self.units is None:
                return parameter
            own = self.units.of(parameter, 0)
            return own.flatten() if self.units.size is None else _repeated(own, share)
        weight_WD = parameter.T if self.is_transposed else parameter
        if self.form is Form.MATRIX:
            return (weight_WD if self.units is None else self.units.of(weight_WD, 0).flatten(0, 1)).T
        assert self.units is not None
        if self.form is Form.TO_HEADS:
            return _repeated(self.units.of(weight_WD, 0).transpose(1, 2), share)
        return self.units.of(weight_WD, 1).permute(1, 2, 0)


def _repeated(heads: Tensor, share: int) -> Tensor:
    return heads.repeat_interleave(share, 0) if share > 1 else heads
