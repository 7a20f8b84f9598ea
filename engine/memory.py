"""Which errors mean that memory did not suffice, on every device, and what they say of it."""

from __future__ import annotations

import re

import torch

from polytrace.errors import CapacityError

# What RuntimeErrors say for which torch has no class: the CPU's allocator, and libraries that allocate by themselves.
_SAYINGS = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
_ASKED = re.compile(r"tried to allocate ([\d.]+) (\w+)", re.IGNORECASE)


def told_out_of_memory(error: BaseException) -> str | None:
    """What is to be told of an error when memory did not suffice, with the bytes asked for; None for any other."""
    if isinstance(error, CapacityError):  # the store's budget
        return error.message
    is_it = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and any(saying in str(error) for saying in _SAYINGS)
    )
    if not is_it:
        return None
    asked = _ASKED.search(str(error))
    if asked is None:
        return "out of memory"
    number = f"{int(asked[1]):,}" if asked[1].isdigit() else asked[1]
    return f"out of memory, {number} {asked[2]} more were asked for"
