"""Where operations leave the calls that go by integers or masks: tables, `gather`, indices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from engine.call_axis import MIXED, Along, Content, Mixed, Place, Same
from engine.call_step import Rule, Step, joined, plain, unknown, varies


def _looked_up(step: Step) -> Place:
    table, at = step.place(step.arguments["weight"]), step.place(step.arguments["indices"])
    return plain(at) if isinstance(table, Same) else MIXED


def _gathered(step: Step) -> Place:
    own, at = step.place(step.first), step.place(step.arguments["index"])
    (dim,) = step.dims("dim")
    if any(isinstance(one, Along) and one.content is Content.COUNT for one in (own, at)):
        return MIXED
    if isinstance(own, Along) and isinstance(at, Along) and own.is_at(at) and own.dim != dim:
        return own.of(Content.OWN)
    if isinstance(own, Same):
        return plain(at) if isinstance(at, Same) or (isinstance(at, Along) and at.dim == dim) else MIXED
    return MIXED


def _chosen(step: Step) -> Place:
    """`index_select`."""
    own, at = step.place(step.first), step.place(step.arguments["index"])
    (dim,) = step.dims("dim")
    if isinstance(at, Same) and isinstance(own, Along):
        return MIXED if own.dim == dim else plain(own)
    if isinstance(own, Same):
        return plain(at.to(dim)) if isinstance(at, Along) else at
    return MIXED


def _indexed(step: Step) -> Place:
    """`tensor[indices]`, with integers."""
    own, given = step.place(step.first), step.arguments["indices"]
    indices = [(dim, at) for dim, at in enumerate(given) if at is not None]
    dims = [dim for dim, _ in indices]
    rank = max(at.ndim for _, at in indices)  # of what the indices make, in the place of the dimensions they are for
    is_together = dims == list(range(dims[0], dims[0] + len(dims)))
    start = dims[0] if is_together else 0
    if isinstance(own, Along) and own.dim in dims:
        # Each call's own rows: an index that counts the rows of all, beside indices that are each call's.
        own_at = given[own.dim]
        counting = step.place(own_at)
        is_counting = isinstance(counting, Along) and counting.content is Content.COUNT
        if not is_counting or own.before != 1 or own.content is Content.COUNT:
            return MIXED
        assert isinstance(counting, Along)
        place = counting.of(Content.OWN).to(counting.dim + rank - own_at.ndim)
        if (place.before, place.inside) != (own.before, own.inside):
            return MIXED
        others = [at for dim, at in indices if dim != own.dim]
        if others and isinstance(beside := joined(step, others, rank), Along):
            if not beside.is_at(place):
                return MIXED
        elif others and isinstance(beside, Mixed):
            return MIXED
        if any(varies(step, at, place, rank) for at in others):
            return MIXED
        return place.to(start + place.dim)
    place_of_indices = joined(step, [at for _, at in indices], rank)
    if isinstance(own, Along):
        if not isinstance(place_of_indices, Same):
            return MIXED
        before = sum(dim < own.dim for dim in dims)
        return plain(own.to(own.dim - before + (rank if not is_together or start < own.dim else 0)))
    return (
        place_of_indices.to(start + place_of_indices.dim) if isinstance(place_of_indices, Along) else place_of_indices
    )


def is_filling(arguments: Mapping[str, Any]) -> bool:
    """Whether it is an `index_put` of one number where a mask says: it does not matter at how many places."""
    indices = [at for at in arguments["indices"] if at is not None]
    is_alone = len(indices) == 1 and indices[0].dtype == torch.bool and arguments["indices"][0] is indices[0]
    return is_alone and not arguments.get("accumulate", True) and arguments["values"].numel() == 1


def _put_at(step: Step) -> Place:
    """`index_put`."""
    own, values = step.place(step.first), step.place(step.arguments["values"])
    if is_filling(step.arguments) and isinstance(values, Same):
        mask = step.arguments["indices"][0]
        if mask.ndim == step.first.ndim:
            return joined(step, [step.first, mask], step.first.ndim)
        at = step.place(mask)  # of the first dimensions
        if isinstance(own, Along) and isinstance(at, Along) and own.is_at(at):
            return own.of(Content.OWN) if Content.COUNT not in (own.content, at.content) else MIXED
        return MIXED
    return unknown(step)


LOOKUPS: dict[str, Rule] = {
    "embedding": _looked_up,
    "gather": _gathered,
    "index_select": _chosen,
    "index": _indexed,
    **dict.fromkeys(("index_put", "index_put_"), _put_at),
}
