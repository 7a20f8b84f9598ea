"""How many rows a tensor must have so that a row's bits do not depend on that number.

On a CPU element-wise kernels take some elements at a time (two vectors of 512 bits) and what is left at the end of a
thread's share one by one, where exp, tanh or cos have other last bits. A GPU computes every element alike. Matrix
products with few rows take another path on both: below 16 rows on a CPU, below 33 on a GPU.

A GPU's libraries also cut a product's sum into parts where the result has few rows, and add these up in a workspace
(measured on an H100: from 17 to 33 rows on, other bits). Without a workspace they cannot, see `forbid_split_sums`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable

import torch

from engine.kernels import why_no_kernels
from scheduling.plan import MIN_ROWS

MAX_THREADS = 4  # shares for more threads would ask for absurd numbers of rows

_LANES = 64  # at a time: of 16 bits each; of floats, half as many

# Elements of which a tensor whose rows do not matter must have a multiple.
FLAT_MULTIPLE = math.lcm(*range(1, MAX_THREADS + 1)) * _LANES


_GPU_ROWS = 64  # a tile of the tensor cores: fewer cost the same


def least_rows(device: torch.device) -> int:
    """Rows that a matrix product must have at least."""
    return MIN_ROWS if device.type == "cpu" else _GPU_ROWS


def forbid_split_sums() -> None:
    """Leaves CUDA's matrix libraries no workspace; heard only before this process has used the GPU.

    Whoever has set these variables keeps what was set: the gate says what it means for the rows.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    os.environ.setdefault("CUBLASLT_WORKSPACE_SIZE", "1")  # KiB; torch refuses none


def rows_multiple(widths: Iterable[int], threads: int, device: torch.device) -> int:
    """The number of rows of which tensors of these widths (elements a row) must have a multiple."""
    if device.type != "cpu":
        return _GPU_ROWS
    shares = math.lcm(*range(1, min(threads, MAX_THREADS) + 1)) * _LANES
    return math.lcm(*(shares // math.gcd(shares, width) for width in widths if width > 1))


def stream_multiple(widths: frozenset[int], ranks: int, threads: int, device: str) -> tuple[int, tuple[str, ...]]:
    """The number of rows of which streams must be a multiple so that no thread's share ends inside a vector.

    With it come notes for people: what cannot be promised on this machine. A GPU wants full tiles.
    """
    parts = {width // ranks for width in widths if width % ranks == 0}
    multiple = rows_multiple(widths | parts, threads, torch.device(device))
    if device == "cuda" and (reason := why_no_kernels()) is not None:
        return multiple, (f"attention and experts are slow on this GPU: no kernel can be compiled ({reason})",)
    if device != "cpu" or threads <= MAX_THREADS:
        return multiple, ()
    return multiple, (f"with {threads} threads a CPU may round differently beside neighbours; up to 4 it does not",)
