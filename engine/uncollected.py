"""How a process that begins takes in torch, transformers and the engine: thousands of modules, none of them garbage."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Python looks for no garbage while the block imports, and what there is behind it counts as old at once.

    It would go through all modules over and over, for a quarter of the time that their imports take.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if not gc.get_freeze_count():  # else it is somebody's, who unfreezes it
            gc.freeze()
            gc.unfreeze()
        if was_enabled:
            gc.enable()
