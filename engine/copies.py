"""Copies between the host and a GPU that the host does not wait for.

A copy from ordinary memory makes the host wait until the GPU has done everything before it, and with it whatever the
host would have launched meanwhile. From and to pinned memory it does not. On a CPU there is nothing to copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor


def to_device(values: Tensor | Sequence[object], device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor or numbers on a device. The host's memory may be reused at once."""
    host = values if isinstance(values, Tensor) else torch.tensor(values, dtype=dtype)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


def row_index(rows: Sequence[int], device: torch.device) -> slice | Tensor:
    """An index of rows: a slice where they follow one another, as reading these copies nothing."""
    first = rows[0] if rows else 0
    is_run = list(rows) == list(range(first, first + len(rows)))
    return slice(first, first + len(rows)) if is_run else to_device(rows, device)


class HostCopy:
    """A GPU tensor on its way to the host, beside what the GPU computes."""

    def __init__(self, tensor: Tensor) -> None:
        """`tensor` must not be written to any more; its memory may be given back at once."""
        dense = tensor.contiguous()
        beside = _stream_beside(dense.device)
        beside.wait_stream(torch.cuda.current_stream(dense.device))
        with torch.cuda.stream(beside):
            self._host = torch.empty(dense.shape, dtype=dense.dtype, pin_memory=True)
            self._host.copy_(dense, non_blocking=True)
            self._arrived = beside.record_event()
        dense.record_stream(beside)

    def wait(self) -> Tensor:
        """The tensor on the host; waits for the copy alone. Any thread."""
        self._arrived.synchronize()
        return self._host


@cache
def _stream_beside(device: torch.device) -> torch.cuda.Stream:
    """Where a device's copies to the host run."""
    return torch.cuda.Stream(device)
