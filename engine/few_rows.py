"""The fewest rows of batched products that have the bits of many rows, tried on this machine.

`engine.lanes` has the number that holds for products of every kind. Products of many small matrices, as rows that
decode need them, take the common path from fewer rows on, and padding to sixteen would be most of their work. From
how many on depends on the library and the processor, so it is tried, once a process and head. Of one matrix alone
nothing is tried: threads share its rows, and so some get few where the whole has many.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from scheduling.plan import MIN_ROWS, PAGE

_TRIED = (4, 8)
_SHAPES = ((8, PAGE), (8, 3 * PAGE), (3, 8 * PAGE), (2, PAGE), (2, 32 * PAGE))  # products in a batch, columns


def fewest_rows(num_products: int, key_dim: int, value_dim: int) -> int:
    """For so many products in a batch, of attention on a CPU over heads of these dimensions, with this many threads."""
    return _fewest_rows(key_dim, value_dim, torch.get_num_threads()) if num_products > 1 else MIN_ROWS


@cache
def _fewest_rows(key_dim: int, value_dim: int, num_threads: int) -> int:
    generator = torch.Generator().manual_seed(num_threads)
    for least in _TRIED:
        if all(_have_same_bits(rows, key_dim, value_dim, generator) for rows in (least, least + 1, least + 3)):
            return least
    return MIN_ROWS


def _have_same_bits(rows: int, key_dim: int, value_dim: int, generator: torch.Generator) -> bool:
    for batch, columns in _SHAPES:
        queries = torch.randn(batch, MIN_ROWS, key_dim, generator=generator)
        keys = torch.randn(batch, columns + PAGE, key_dim, generator=generator)[:, :columns].transpose(1, 2)
        values = torch.randn(batch, columns + PAGE, value_dim, generator=generator)
        scores = torch.bmm(queries, keys)
        if not torch.equal(torch.bmm(queries[:, :rows].contiguous(), keys), scores[:, :rows]):
            return False
        weights = torch.softmax(scores, 2)
        if not torch.equal(_sums(weights[:, :rows].contiguous(), values), _sums(weights, values)[:, :rows]):
            return False
    return True


def _sums(weights: Tensor, values: Tensor) -> Tensor:
    out = values.new_zeros(weights.shape[0], weights.shape[1], values.shape[2])
    for first in range(0, weights.shape[2], PAGE):
        out.baddbmm_(weights[:, :, first : first + PAGE], values[:, first : first + PAGE])
    return out
