"""An operation of several calls in one, and what all rules for where it leaves the calls go by."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from engine.call_axis import MIXED, SAME, Along, Content, Mixed, Place, Same, Total
from engine.recorder import tensors_of


@dataclass(frozen=True, slots=True)
class Step:
    """An operation that has run."""

    name: str  # of torch's library, without the overload: "sum"
    arguments: Mapping[str, Any]  # by the names of its schema
    out: Tensor  # a tensor that came of it
    alone: tuple[int, ...]  # the shape of that where a call is alone
    numbers: Mapping[str, Any]  # the arguments that are no tensors, where a call is alone
    calls: int
    place: Callable[[Tensor], Place]

    @property
    def first(self) -> Tensor:
        """Its first argument, a tensor."""
        tensor: Tensor = next(iter(self.arguments.values()))
        return tensor

    @property
    def tensors(self) -> Iterator[Tensor]:
        """All tensors among its arguments."""
        return tensors_of(self.arguments)

    def dims(self, name: str) -> tuple[int, ...]:
        """Dimensions of its first argument that another argument names, from 0 on; all where it names none."""
        given, rank = self.arguments.get(name), self.first.ndim
        named = (given,) if isinstance(given, int) else tuple(given or range(rank))
        return tuple([dim % rank for dim in named]) if rank else ()


Rule = Callable[[Step], Place]


def unknown(step: Step) -> Place:
    """Of an operation that no rule is about: the same for all where all that it gets is."""
    return SAME if all(isinstance(step.place(tensor), Same) for tensor in step.tensors) else MIXED


def joined(step: Step, tensors: Sequence[Tensor], rank: int, keeps: bool = False) -> Place:
    """Of elements of several tensors that are put beside each other as shapes are, from the last dimension on."""
    found: Along | None = None
    contents: set[Content] = set()
    for tensor in tensors:
        place = step.place(tensor)
        if isinstance(place, (Mixed, Total)):
            return MIXED
        if isinstance(place, Along):
            moved = place.to(place.dim + rank - tensor.ndim)
            if found is not None and not found.is_at(moved):
                return MIXED
            found = moved
            contents.add(place.content)
    if found is None:
        return SAME
    if any(varies(step, tensor, found, rank) for tensor in tensors):
        return MIXED
    if contents == {Content.SAME}:
        return found.of(Content.SAME)
    if keeps and len(tensors) == 1:
        return found
    return MIXED if Content.COUNT in contents else found.of(Content.OWN)


def plain(place: Place) -> Place:
    """Of what is worked out of a tensor, or of a part of it, at that place."""
    if not isinstance(place, Along) or place.content is Content.SAME:
        return place
    return MIXED if place.content is Content.COUNT else place.of(Content.OWN)


def varies(step: Step, tensor: Tensor, along: Along, rank: int) -> bool:
    """Whether what is the same for all may be another for each call."""
    dim = along.dim - rank + tensor.ndim
    return isinstance(step.place(tensor), Same) and dim >= 0 and tensor.shape[dim] != 1
