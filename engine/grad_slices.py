"""Gradients at a dimension that tensor-parallel ranks split: the whole from the parts, and a rank's part of a whole.

As `engine.slices`, but for copies. Where neighbouring ranks hold the same part of a value (key/value heads that there
are fewer of than ranks), each rank's gradient is what its own use of the part gave. So the gradient of the part is the
sum over its copies, and what is put in goes to one of them: the others get zeros.

At a tensor that every rank has whole nothing of this is needed: every rank has the whole gradient there, with the same
bits (`engine.differentiable`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.links import Links
from engine.slices import gather_whole, take_part


def gather_gradient(links: Links, part: Tensor, dim: int, blocks: int = 1, copies: int = 1) -> Tensor:
    """The gradient of the whole from every rank's gradient of its part; collective over the stage.

    `dim` counts from the front. Copies are added in rank order, in float32 at least; the same bits on every rank.
    """
    if links.ranks == 1 or copies == 1:
        return gather_whole(links, part, dim, blocks)
    # [..., blocks, ranks, own, ...]
    split = links.gather(part.unflatten(dim, (blocks, 1, -1)), dim + 1)
    held = split.unflatten(dim + 1, (links.ranks // copies, copies)).unbind(dim + 2)
    total = held[0].to(torch.promote_types(part.dtype, torch.float32), copy=True)
    for each in held[1:]:
        total += each
    whole: Tensor = total.to(part.dtype).flatten(dim, dim + 2)
    return whole


def owns_part(links: Links, copies: int) -> bool:
    """Whether this rank is the one, of those that hold its part, whose gradient stands for the part's."""
    return links.rank % copies == 0


def take_gradient(links: Links, whole: Tensor, dim: int, blocks: int = 1, copies: int = 1) -> Tensor:
    """This rank's share of a whole gradient, so that `gather_gradient` gives the whole again: its part of it on the
    first rank that holds the part, zeros on the others.
    """
    part = take_part(links, whole, dim, blocks, copies)
    return part if owns_part(links, copies) else torch.zeros_like(part)
