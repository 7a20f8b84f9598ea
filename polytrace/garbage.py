"""Pauses Python's cyclic garbage collector where very many objects are made that hold no cycles."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_collections() -> Iterator[None]:
    """Inside, the collector does not run: it would walk all of torch's objects again and again for nothing.

    Other threads are not collected for either, so what runs inside should be short: seconds at the most.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
