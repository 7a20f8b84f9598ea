"""Memory that the C library keeps when tensors are gone, given back to the system.

glibc puts pieces of up to 32 MiB, once such were freed, on its heap, and keeps what is freed there for the next ones. A
shard that has run a large generation would hold on to as much for ever. To trim the heap takes 0.1 ms for each MiB that
goes back, and what goes back has to be had again: so it is done when nobody waits, and when it is worth it.
"""

from __future__ import annotations

import ctypes

WORTH_BYTES = 64 << 20  # given back to the store since the last time


def trim() -> None:
    """Gives back what is free; where the C library is another one, it does so by itself, or not at all."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)
