"""What ranks do together, differentiable: collectives whose gradients are collectives.

Invariant: at a tensor that every rank has whole, every rank has the whole gradient, with the same bits; at a tensor
that ranks split, each has the gradient of its part. So where a whole tensor meets a rank's own weights, its gradient is
the sum of what the ranks' weights give back, in rank order (`met`). A sum over ranks hands its gradient to every rank's
summand, joining parts hands each rank its part's, and taking the own part of a whole joins the parts' gradients.

Every rank makes the same collectives in the same order, backwards too. Autograd runs the functions that it needs in
falling order of their number, which counts a thread's functions as they were made: a function has always a lower number
than those that used its result, so the highest of those that are left is always ready. Hence a backward that one thread
runs goes through a forward's collectives in exactly the opposite order, whatever else differs between ranks, such as
how many experts have rows there. And every rank needs the same ones, because a collective is one function for all
tensors that it takes: which of its results a rank has used does not matter.

Where no gradient is asked for nothing is done: the functions are those of `Links`, on the same tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.autograd.graph import GradientEdge, get_gradient_edge

from engine.links import Links


def is_differentiated(tensor: Tensor) -> bool:
    """Whether autograd follows what is computed from a tensor now."""
    return torch.is_grad_enabled() and tensor.requires_grad


def met(links: Links, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors that every rank has whole, for use with a rank's own weights: their gradients are summed over ranks."""
    if links.ranks == 1 or not any(is_differentiated(tensor) for tensor in tensors):
        return tensors
    found: tuple[Tensor, ...] = _Met.apply(links, *tensors)  # type: ignore[no-untyped-call]
    return found


def met_by_many(links: Links, tensor: Tensor) -> Tensor:
    """A tensor `met` by modules one after another: those that take it as it is now share one sum of its gradient."""
    if links.ranks == 1 or not is_differentiated(tensor):
        return tensor
    if tensor.is_leaf:  # autograd holds it, so it could not hold what was made of it
        return met(links, tensor)[0]
    # What a backward would come to: another function where the tensor has been cut off or written to in between.
    edge = get_gradient_edge(tensor)
    before: tuple[GradientEdge, Tensor] | None = getattr(tensor, _MET, None)
    if before is not None and before[0].node is edge.node and before[0].output_nr == edge.output_nr:
        return before[1]
    (found,) = met(links, tensor)
    setattr(tensor, _MET, (edge, found))
    return found


_MET = "_met_by_ranks"


def met_end(links: Links, tensor: Tensor, size: int) -> Tensor:
    """A tensor of which only so many features at the end are `met`; the others are met further on."""
    if links.ranks == 1 or not is_differentiated(tensor):
        return tensor
    rest, end = tensor.split([tensor.shape[-1] - size, size], -1)
    return torch.cat([rest, *met(links, end)], -1)


def meet_arguments(
    links: Links, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call's arguments with those `met` that can have gradients, all in one."""
    if not torch.is_grad_enabled():
        return args, dict(kwargs)
    given = [*args, *kwargs.values()]
    places = [place for place, value in enumerate(given) if isinstance(value, Tensor) and value.is_floating_point()]
    for place, tensor in zip(places, met(links, *[given[place] for place in places]), strict=True):
        given[place] = tensor
    return tuple(given[: len(args)]), dict(zip(kwargs, given[len(args) :], strict=True))


def ordered_sum(links: Links, tensor: Tensor) -> Tensor:
    """`Links.ordered_sum`; every rank's summand has the sum's gradient."""
    if links.ranks == 1 or not is_differentiated(tensor):
        return links.ordered_sum(tensor)
    total: Tensor = _OrderedSum.apply(links, tensor)  # type: ignore[no-untyped-call]
    return total


def gather(links: Links, tensor: Tensor) -> Tensor:
    """`Links.gather` along the last dimension; each rank's part has its part of the gradient."""
    if links.ranks == 1 or not is_differentiated(tensor):
        return links.gather(tensor, -1)
    whole: Tensor = _Gather.apply(links, tensor)  # type: ignore[no-untyped-call]
    return whole


def own_part(links: Links, whole: Tensor) -> Tensor:
    """A rank's part of the last dimension; the whole has the gradients of all ranks' parts."""
    if links.ranks == 1 or not is_differentiated(whole):
        return _own_part(links, whole)
    part: Tensor = _OwnPart.apply(links, whole)  # type: ignore[no-untyped-call]
    return part


def _own_part(links: Links, whole: Tensor) -> Tensor:
    part: Tensor = whole.unflatten(-1, (links.ranks, -1)).select(-2, links.rank)
    return part


class _Met(Function):
    @staticmethod
    def forward(ctx: Any, links: Links, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.links = links
        return tuple([tensor.detach() for tensor in tensors])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, *[ctx.links.ordered_sum(gradient) for gradient in gradients]


class _OrderedSum(Function):
    @staticmethod
    def forward(ctx: Any, links: Links, tensor: Tensor) -> Tensor:
        return links.ordered_sum(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        return None, gradient


class _Gather(Function):
    @staticmethod
    def forward(ctx: Any, links: Links, tensor: Tensor) -> Tensor:
        ctx.links = links
        return links.gather(tensor, -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        return None, _own_part(ctx.links, gradient)


class _OwnPart(Function):
    @staticmethod
    def forward(ctx: Any, links: Links, whole: Tensor) -> Tensor:
        ctx.links = links
        return _own_part(links, whole).detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        return None, ctx.links.gather(gradient, -1)
