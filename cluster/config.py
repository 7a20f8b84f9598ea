"""What a controller is told when it is started. Apart from `cluster.controller`, so that nobody needs Ray to say it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class ControllerConfig:
    """One deployment and the Ray cluster it lives in."""

    name: str  # the deployment's
    source: str  # folder or hub id
    stages: int = 1
    ranks: int = 1
    dtype: str = "auto"
    address: str | None = None  # of a Ray cluster to join; None: an own one, on this machine
    ray_folder: str | None = None  # scratch of the own cluster: a short path; `address_file` tells its address
    url: str | None = None  # of the gateway, made known in the cluster
    budget_tokens: int = 8192  # most rows in one pass
    max_active: int = 1024  # requests worked out and in memory; the rest waits in the store
    random_weights_seed: int | None = None  # no weights are read; for trials of size and speed
    offload_bytes: int = 0  # of each shard's weights to keep in its host's memory


def address_file(ray_folder: str) -> Path:
    """Where the controller writes the address of its own Ray cluster, HOST:PORT, as soon as it runs."""
    return Path(ray_folder) / "address"
