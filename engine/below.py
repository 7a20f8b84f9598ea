"""Nodes that work below the gather: each rank on its part of a value, and only what is left over travels.

What a node does is planned (`scheduling.below`). Here each step has two halves: what a rank makes of its part, and what
all make of everybody's. A graph that has failed on one rank still sends, at the planned shape: zeros stand for its
values, so that no rank waits for another.

What ranks send is added and compared in rank order, so every rank has the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from engine.copies import to_device
from engine.links import Links
from engine.ops import run_op
from engine.slices import take_part
from scheduling.plan import Action, Below, Cut

# Of each rank, what `_Halves.send` made there.
Received = Sequence[Sequence[Tensor]]


@dataclass(frozen=True, slots=True)
class _Halves:
    """What travels, and what becomes of it. Both get the step's plan, the op's name and its arguments."""

    send: Callable[[Below, str, tuple[Any, ...], Mapping[str, Any], Links], tuple[Tensor, ...]]
    finish: Callable[[Below, str, tuple[Any, ...], Mapping[str, Any], Received], Any]


def travels(below: Below) -> bool:
    """Whether a step sends anything."""
    return below.action not in (Action.KEEP, Action.PUT)


def run_apart(below: Below, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], links: Links) -> Any:
    """The value of an op of which nothing travels, from this rank's parts: its part."""
    if below.action is Action.PUT:
        return _put(below, args, links)
    return run_op(name, with_parts(below, args, links), kwargs)


def prepare(
    below: Below, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], links: Links
) -> tuple[Tensor, ...]:
    """What this rank sends for an op, from its parts. Nothing travels yet."""
    if below.action is Action.PICK:
        mine = [local for rank, local in _owners(below, links) if rank == links.rank]
        return (args[0].index_select(below.cut.dim, _numbers(mine, args[0])).movedim(below.cut.dim, 0),)
    return _STEPS[below.action].send(below, name, args, kwargs, links)


def travel(below: Below, sent: tuple[Tensor, ...], links: Links) -> Received:
    """What each rank has sent; collective over the stage. Features travel from those alone that have them."""
    if below.action is Action.PICK:
        (own,) = sent
        owners = [rank for rank, _ in _owners(below, links)]
        counts = [owners.count(rank) for rank in range(links.ranks)]
        if len(set(counts)) > 1:
            shapes = [(count, *own.shape[1:]) for count in counts]
            return [
                (links.share(own if rank == links.rank else own.new_empty(shape), rank),) if shape[0] else ()
                for rank, shape in enumerate(shapes)
            ]
    received = [links.gather(tensor[None].contiguous(), 0).unbind(0) for tensor in sent]
    return list(zip(*received, strict=True))


def finish(
    below: Below, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], received: Received, links: Links
) -> Any:
    """The value of an op, from what every rank has sent: whole, or this rank's part."""
    if below.action is not Action.PICK:
        return _STEPS[below.action].finish(below, name, args, kwargs, received)
    owners = [rank for rank, _ in _owners(below, links)]
    arrived = sorted(range(len(owners)), key=lambda place: owners[place])  # stable: within a rank they ascend
    places = [0] * len(arrived)
    for number, place in enumerate(arrived):
        places[place] = number
    picked = torch.cat([tensor for parts in received for tensor in parts])
    if places != sorted(places):
        picked = picked.index_select(0, _numbers(places, picked))
    return run_op(name, (picked.movedim(0, below.cut.dim), *args[1:]), kwargs)


def with_parts(below: Below, args: tuple[Any, ...], links: Links) -> tuple[Any, ...]:
    """The arguments with this rank's part of whole operands."""
    found = list(args)
    for place, dim in below.parts:
        found[place] = take_part(links, found[place], dim, below.cut.blocks)
    return tuple(found)


def _put(below: Below, args: tuple[Any, ...], links: Links) -> Tensor:
    """In-place code on features of a cut value, as far as this rank has them."""
    own, index, value = args
    mine = [local for rank, local in _owners(below, links) if rank == links.rank]
    parts = list(index) if isinstance(index, tuple) else [index]
    part = parts[below.place]
    places: list[Any] = [mine] if isinstance(part, list) else mine if type(part) is int else _runs(mine)
    for place in places if mine else ():
        parts[below.place] = place
        own = run_op("setitem", (own, tuple(parts), value), {})
    put: Tensor = own
    return put


def _runs(numbers: Sequence[int]) -> list[slice]:
    """Ascending numbers as slices: a slice of the whole is one of each block."""
    starts = [i for i, number in enumerate(numbers) if i == 0 or number != numbers[i - 1] + 1]
    return [slice(numbers[a], numbers[b - 1] + 1) for a, b in pairwise([*starts, len(numbers)])]


def _owners(below: Below, links: Links) -> list[tuple[int, int]]:
    return [_owner(feature, below.cut, links.ranks) for feature in below.features]


def _owner(feature: int, cut: Cut, ranks: int) -> tuple[int, int]:
    """The rank that has a feature of the whole, and which of its own it is."""
    block = cut.size // cut.blocks
    own = block // ranks
    return feature % block // own, feature // block * own + feature % own


def _whole_places(local: Tensor, cut: Cut, links: Links) -> Tensor:
    """Places in the whole of places in this rank's part."""
    block = cut.size // cut.blocks
    own = block // links.ranks
    return local // own * block + links.rank * own + local % own


def _numbers(numbers: Sequence[int], like: Tensor) -> Tensor:
    return to_device(numbers, like.device, torch.long)


# The largest, and where


def _send_largest(
    below: Below, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], links: Links
) -> tuple[Tensor, ...]:
    part, dim = args[0], below.cut.dim
    if name == "topk":
        count = min(_count(args, kwargs), part.shape[dim])
        values, places = part.topk(count, dim, largest=_is_largest(name, args, kwargs), sorted=True)
    else:
        values, places = (part.max if _is_largest(name, args, kwargs) else part.min)(dim, keepdim=True)
    return values, _whole_places(places, below.cut, links)


def _finish_largest(
    below: Below, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], received: Received
) -> Any:
    dim = below.cut.dim
    values, places = (torch.cat(parts, dim) for parts in zip(*received, strict=True))
    if name == "topk":
        few = values.topk(_count(args, kwargs), dim, largest=_is_largest(name, args, kwargs), sorted=True)
        return few.values, places.gather(dim, few.indices)
    best = (values.max if _is_largest(name, args, kwargs) else values.min)(dim, keepdim=True)
    pair = best.values, places.gather(dim, best.indices)
    if not _keeps_dim(args, kwargs):
        pair = pair[0].squeeze(dim), pair[1].squeeze(dim)
    return pair[1] if name.startswith("arg") else pair


def _count(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    count: int = args[1] if len(args) > 1 else kwargs["k"]
    return count


def _is_largest(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    if name == "topk":
        return bool(args[3] if len(args) > 3 else kwargs.get("largest", True))
    return name.endswith("max")


def _keeps_dim(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    return bool(args[2] if len(args) > 2 else kwargs.get("keepdim", False))


# Sums, and the largest of several dimensions


def _send_sum(
    below: Below, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], links: Links
) -> tuple[Tensor, ...]:
    return (_wide(args[0]).sum(below.dims, keepdim=_keeps_dim(args, kwargs)),)


def _finish_sum(
    below: Below, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], received: Received
) -> Tensor:
    total = _added([parts[0] for parts in received])
    if name == "mean":
        count = below.cut.size
        for dim in below.dims:
            count *= 1 if dim == below.cut.dim else args[0].shape[dim]
        total = total / count
    is_counted = not args[0].is_floating_point()
    return total if is_counted else total.to(args[0].dtype)


def _send_extreme(
    below: Below, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], links: Links
) -> tuple[Tensor, ...]:
    return (getattr(args[0], name)(below.dims, keepdim=_keeps_dim(args, kwargs)),)


def _finish_extreme(
    below: Below, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], received: Received
) -> Tensor:
    found: Tensor = getattr(torch.stack([parts[0] for parts in received]), name)(0)
    return found


# Softmax and its kin


def _send_softmax(
    below: Below, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], links: Links
) -> tuple[Tensor, ...]:
    part = _wide(args[0])
    largest = part.amax(below.cut.dim, keepdim=True)
    finite = largest.masked_fill(largest.isneginf(), 0)  # a part may be -inf everywhere while the whole is not
    return largest, (part - finite).exp().sum(below.cut.dim, keepdim=True)


def _finish_softmax(
    below: Below, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], received: Received
) -> Tensor:
    largest = torch.stack([parts[0] for parts in received]).amax(0)
    total = _added([parts[1] * (parts[0] - largest).exp() for parts in received])
    if name == "logsumexp":
        found = torch.where(largest.isinf(), largest, largest + total.log())
        found = found if _keeps_dim(args, kwargs) else found.squeeze(below.cut.dim)
    elif name == "softmax":
        found = (_wide(args[0]) - largest).exp() / total
    else:
        found = _wide(args[0]) - largest - total.log()
    return found.to(args[0].dtype)


# Products


def _send_product(
    below: Below, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], links: Links
) -> tuple[Tensor, ...]:
    return (_wide(args[0]) @ _wide(args[1]),)


def _finish_product(
    below: Below, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], received: Received
) -> Tensor:
    return _added([parts[0] for parts in received]).to(args[0].dtype)


def _wide(part: Tensor) -> Tensor:
    """Half precision is rounded once, behind the sum."""
    return part.float() if part.dtype in (torch.float16, torch.bfloat16) else part


def _added(parts: Sequence[Tensor]) -> Tensor:
    """In rank order."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


_STEPS = {
    Action.LARGEST: _Halves(_send_largest, _finish_largest),
    Action.EXTREME: _Halves(_send_extreme, _finish_extreme),
    Action.SUM: _Halves(_send_sum, _finish_sum),
    Action.SOFTMAX: _Halves(_send_softmax, _finish_softmax),
    Action.PRODUCT: _Halves(_send_product, _finish_product),
}
