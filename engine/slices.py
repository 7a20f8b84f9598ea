"""A dimension that tensor-parallel ranks split: the whole from the parts, and a rank's part of a whole.

Fused projections (GPT-2's q|k|v) are several equal blocks side by side, each split over the ranks by itself, so a rank
holds `[q_r | k_r | v_r]` and joining the ranks' parts means joining block by block. Where there are more ranks than
key/value heads, so many neighbouring ranks (`copies`) hold the same part: the whole has it once.
"""

from __future__ import annotations

from torch import Tensor

from engine.links import Links


def gather_whole(links: Links, part: Tensor, dim: int, blocks: int = 1, copies: int = 1) -> Tensor:
    """The whole of a tensor whose dimension `dim` the stage's ranks split; collective over the stage."""
    if links.ranks == 1 or (blocks == 1 and copies == 1):
        return links.gather(part, dim)
    # [..., blocks, ranks, own, ...]
    split: Tensor = links.gather(part.unflatten(dim, (blocks, 1, -1)), dim + 1)
    return split[(slice(None),) * (dim + 1) + (slice(None, None, copies),)].flatten(dim, dim + 2)


def take_part(links: Links, whole: Tensor, dim: int, blocks: int = 1, copies: int = 1) -> Tensor:
    """This rank's part of a whole tensor: the inverse of `gather_whole`."""
    if links.ranks == 1:
        return whole
    split: Tensor = whole.unflatten(dim, (blocks, links.ranks // copies, -1))
    return split.select(dim + 1, links.rank // copies).flatten(dim, dim + 1)
