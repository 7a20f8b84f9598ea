"""How many rows a tensor must have so that no element-wise kernel's tail falls on a row that somebody reads.

On a CPU such a kernel takes some elements at a time (two vectors of 512 bits) and what is left at the end of a thread's
share one by one, where exp, tanh or cos have other last bits. A GPU computes every element alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

MAX_THREADS = 4  # shares for more threads would ask for absurd numbers of rows

_LANES = 64  # at a time: of 16 bits each; of floats, half as many

# Elements of which a tensor whose rows do not matter must have a multiple.
FLAT_MULTIPLE = math.lcm(*range(1, MAX_THREADS + 1)) * _LANES


def rows_multiple(widths: Iterable[int], threads: int, device: torch.device) -> int:
    """The number of rows of which tensors of these widths (elements a row) must have a multiple."""
    if device.type != "cpu":
        return 1
    shares = math.lcm(*range(1, min(threads, MAX_THREADS) + 1)) * _LANES
    return math.lcm(*(shares // math.gcd(shares, width) for width in widths if width > 1))
