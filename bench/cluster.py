"""A Ray cluster on this machine that a benchmark has to itself."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import ray


@contextmanager
def own_cluster(num_cpus: int, folder: str) -> Iterator[None]:
    """Runs it for the block. `folder` has a short path, as Ray's sockets want it, and is the caller's to remove."""
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # it listens on this machine only, and ends with the block
    ray.init(
        address="local",
        num_cpus=num_cpus,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=128 << 20,
        _temp_dir=folder,
    )
    try:
        yield
    finally:
        ray.shutdown()
