"""What a controller is told: the cluster it drives, and the deployments that are wanted on it.

Apart from `cluster.controller`, so that nobody needs Ray to say it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, StrEnum
from pathlib import Path

from polytrace.device_maps import DeviceMap
from scheduling.policy import BUDGET_TOKENS, MAX_ACTIVE


class ShareAcross(StrEnum):
    """Whose requests may have rows and kept prefixes in common, and be told of each other in receipts."""

    TENANT = "tenant"  # those of one tenant
    DEPLOYMENT = "deployment"  # of all: less to run, and tenants can tell whether others ran the same prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class DeploymentSpec:
    """A model to serve by name: how it is split, and how many times it is there."""

    name: str
    source: str  # folder, hub id, or URL (`engine.fetching`)
    stages: int = 1
    ranks: int = 1
    replicas: int = 1  # each is stages x ranks shards; requests go to the least loaded
    dtype: str = "auto"
    device: str = "auto"  # "cpu", "cuda", or "auto": GPUs when the cluster has any
    cpus: float | None = None  # of the cluster's, reserved per shard; None: a small share
    random_weights_seed: int | None = None  # no weights are read; for trials of size and speed
    offload_bytes: int = 0  # of each shard's weights to keep in its host's memory
    share_across: ShareAcross = ShareAcross.TENANT
    merges_calls: bool = True  # of a model that is called as it is: of several requests, where that is exact
    whole: bool = True  # a vision-language model is called as it is; else it runs as the language model in it
    # of a model that is called as it is: how it lies over the devices of its one shard (`polytrace.device_maps`)
    device_map: DeviceMap | None = None
    gpus: int | None = None  # of the one shard with a device map; None: those that it names, one of a name's


class Heat(StrEnum):
    """How near to running a deployment's weights are."""

    HOT = "hot"  # with its shards
    WARM = "warm"  # in the memory of the nodes that it ran on (`cluster.holder`), without shards
    COLD = "cold"  # where they are stored


@dataclass(frozen=True, slots=True, kw_only=True)
class Keeping:
    """How long a deployment is kept loaded, and who may have it loaded. Without any of this it stays loaded."""

    on_demand: bool = False  # a request loads it when it is not, and it may make room for others while it is idle
    is_pinned: bool = False  # stays loaded whoever needs the room, however idle
    schedule: str | None = None  # `cluster.hours`: it is kept loaded then, and outside only as long as it is used
    idle_minutes: float | None = None  # without a request, after which it rests; None: until its room is needed
    rests: Heat = Heat.COLD  # or WARM: where it goes then


ALWAYS = Keeping()


class Mode(Enum):
    """What is wanted of a deployment."""

    SERVING = "serving"
    DRAINING = "draining"  # what is accepted is finished, nothing new is taken; its shards stay
    REMOVING = "removing"  # the same, and then its shards end
    DROPPING = "dropping"  # its shards end; what has not finished is refused


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A deployment as the store wants it."""

    spec: DeploymentSpec
    mode: Mode
    revision: int  # another one each time it was deployed: what failed before is tried again
    heat: Heat = Heat.HOT
    why: str = ""  # it is not hot
    keeping: Keeping = ALWAYS
    last_used: float | None = None  # seconds since the epoch, as far as an earlier controller told


@dataclass(frozen=True, slots=True, kw_only=True)
class ControllerConfig:
    """The Ray cluster of a service, and what holds for all of its deployments. Which these are is in the store."""

    address: str | None = None  # of a Ray cluster to join; None: an own one, on this machine
    ray_folder: str | None = None  # scratch of the own cluster: a short path; `address_file` tells its address
    url: str | None = None  # of the gateway, made known in the cluster
    takes_jobs: bool = False  # the own cluster has Ray's job server, for `ray job submit`
    budget_tokens: int = BUDGET_TOKENS  # most rows in one pass
    max_active: int = MAX_ACTIVE  # requests that a replica has worked out and in memory; the rest waits in the store


def address_file(ray_folder: str) -> Path:
    """Where the controller writes the address of its own Ray cluster, HOST:PORT, as soon as it runs."""
    return Path(ray_folder) / "address"


def jobs_file(ray_folder: str) -> Path:
    """Where it writes the URL of its own cluster's job server, when it has one."""
    return Path(ray_folder) / "jobs"
