"""One deployment: a model over stages x ranks shards on a Ray cluster, from its start to its end.

Ray places the shards, starts their processes and notices their deaths; nothing else. Plans go to the actors as calls,
and answers come back as their results. A deployment is one gang: when a shard is lost, the passes in flight are lost
with it and the deployment is over; its shards then say so (`cluster.gang`) and its owner starts another one.

Expects a process that has joined Ray. Knows nothing of requests, the store or HTTP.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.actors import ShardActor
from cluster.gang import Gang, RayShards
from engine.loading import ShardConfig, check_split
from polytrace.description import ModelDescription
from polytrace.errors import ServiceError

Report = Callable[[str], None]

_LEAVING_S = 2.0  # for a shard to leave by itself before it is killed
_INHERITED = ("HF_HUB_OFFLINE", "HF_HOME", "HF_HUB_CACHE", "HF_TOKEN")  # where and whether to look for weights


@dataclass(frozen=True, slots=True, kw_only=True)
class DeploymentConfig:
    """What to serve and how it is split."""

    name: str
    source: str  # folder or hub id
    stages: int = 1
    ranks: int = 1
    dtype: str = "auto"
    device: str = "auto"  # "cpu", "cuda", or "auto": GPUs when the cluster has any
    cpus: float | None = None  # of the cluster's, reserved per shard; None: a small share
    threads: int | None = None  # per shard; None: the cluster's CPUs shared evenly, at least one
    kv_bytes: int | None = None  # per shard's key/value store; None: the engine's default
    random_weights_seed: int | None = None  # read no weights
    working_dir: str | None = None  # shipped to nodes that do not have polytrace installed
    placement_timeout_s: float = 120.0  # for the cluster to have room

    @property
    def num_shards(self) -> int:
        return self.stages * self.ranks


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """What each shard gets of the cluster."""

    cpus: float
    gpus: float
    threads: int
    device: str
    backend: str  # of torch.distributed


def plan_placement(config: DeploymentConfig, *, cluster_cpus: float, cluster_gpus: float) -> Placement:
    """Resolves `auto`: a GPU each when there are enough, a share of one when there are some, else a share of the CPUs.

    A shard asks for little of the CPUs, so that 2 x 2 shards fit on two cores and leave room for what else runs there.
    """
    num_shards = config.num_shards
    threads = config.threads or max(1, int(cluster_cpus // num_shards))
    cpus = config.cpus or max(0.01, min(1.0, round(0.5 * cluster_cpus / num_shards, 2)))
    if config.device == "cpu" or (config.device == "auto" and cluster_gpus < 1):
        return Placement(cpus=cpus, gpus=0, threads=threads, device="cpu", backend="gloo")
    if cluster_gpus < 1:
        raise ServiceError(f"{config.name}: device {config.device!r} was asked for, and the cluster has no GPU")
    if cluster_gpus >= num_shards:
        return Placement(cpus=cpus, gpus=1, threads=threads, device="cuda", backend="nccl")
    # NCCL refuses two shards on one GPU; gloo carries their bytes through the host.
    shards_a_gpu = -(-num_shards // int(cluster_gpus))
    return Placement(cpus=cpus, gpus=1 / shards_a_gpu, threads=threads, device="cuda", backend="gloo")


class Deployment:
    """The shards of one model. Construction is cheap; `start` acquires, `stop` gives everything back."""

    def __init__(self, config: DeploymentConfig) -> None:
        self.config = config
        self._gang = Gang([], stages=config.stages, ranks=config.ranks)
        self._group: PlacementGroup | None = None
        self._description: ModelDescription | None = None
        self._views: list[RayShards] = []

    def start(self, report: Report = lambda _: None) -> ModelDescription:
        """Places, loads and self-tests every shard; lines of progress go to `report`.

        ServiceError with the reason when it cannot; whatever was started is stopped then.
        """
        try:
            return self._start(report)
        except BaseException:
            self.stop()
            raise

    def describe(self) -> ModelDescription:
        """The deployment's description, once it has started."""
        assert self._description is not None, "start() first"
        return self._description

    def shards(self, wake: Callable[[], None] = lambda: None) -> RayShards:
        """The loop's view of the shards. `wake` is called from another thread when a pass has ended."""
        self._views.append(RayShards(self._gang, wake))
        return self._views[-1]

    def process_ids(self) -> list[int]:
        """Of the shards, by stage, then rank; waits until each has done what it was given."""
        return self._gang.call("ping")

    def stop(self) -> None:
        """Ends the shards' processes and gives their place back. May be called at any time, also twice."""
        for view in self._views:
            view.close()
        actors, self._gang.actors = self._gang.actors, []
        if actors and ray.is_initialized():
            leaving = [actor.stop.remote() for actor in actors]
            ray.wait(leaving, num_returns=len(leaving), timeout=_LEAVING_S)
            for actor in actors:
                ray.kill(actor)
        group, self._group = self._group, None
        if group is not None and ray.is_initialized():
            remove_placement_group(group)

    def _start(self, report: Report) -> ModelDescription:
        config = self.config
        # 1) a model that can be split so, and a place for each shard
        check_split(config.source, config.dtype, stages=config.stages, ranks=config.ranks)
        resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        placement = plan_placement(config, cluster_cpus=resources.get("CPU", 0), cluster_gpus=resources.get("GPU", 0))
        group = self._reserve(placement, report)
        # 2) a process for each, which meet
        report(f"starting {config.num_shards} shards on {placement.device}, {placement.threads} threads each")
        self._gang.actors = [
            self._launch(placement, group, stage, rank)
            for stage in range(config.stages)
            for rank in range(config.ranks)
        ]
        self._await_processes(report)
        self._gang.call("meet", self._gang.call_first("host_meeting"))
        # 3) weights
        self._load(report)
        # 4) self-test, and the description that follows from it
        report("self-testing: a row must be the same bits beside neighbours and alone")
        reports = self._gang.call("gate")
        description: ModelDescription = self._gang.call_first("describe", config.name, reports)
        self._gang.call("open", description)
        self._description = description
        report(f"{config.name} is ready: {config.stages} stages x {config.ranks} ranks")
        return description

    def _reserve(self, placement: Placement, report: Report) -> PlacementGroup:
        bundle = {"CPU": placement.cpus} | ({"GPU": placement.gpus} if placement.gpus else {})
        num_shards = self.config.num_shards
        group: PlacementGroup = placement_group([bundle] * num_shards, strategy="PACK")
        self._group = group
        report(f"reserving {bundle} for each of {num_shards} shards")
        if not group.wait(self.config.placement_timeout_s):
            available: dict[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]
            free = {name: amount for name, amount in available.items() if name in ("CPU", "GPU")}
            raise ServiceError(
                f"{self.config.name}: the cluster found no room for {num_shards} shards of {bundle} within "
                f"{self.config.placement_timeout_s:.0f} s; free are {free}"
            )
        return group

    def _launch(self, placement: Placement, group: PlacementGroup, stage: int, rank: int) -> Any:
        config = self.config
        options: dict[str, Any] = {} if config.kv_bytes is None else {"kv_bytes": config.kv_bytes}
        shard = ShardConfig(
            source=config.source,
            dtype=config.dtype,
            stage=stage,
            stages=config.stages,
            rank=rank,
            ranks=config.ranks,
            device=placement.device,
            threads=placement.threads,
            random_weights_seed=config.random_weights_seed,
            **options,
        )
        environment = {name: os.environ[name] for name in _INHERITED if name in os.environ}
        environment |= {"OMP_NUM_THREADS": str(placement.threads), "TOKENIZERS_PARALLELISM": "false"}
        runtime: dict[str, Any] = {"env_vars": environment}
        if config.working_dir is not None:
            runtime["working_dir"] = config.working_dir
        remote = ray.remote(ShardActor).options(
            num_cpus=placement.cpus,
            num_gpus=placement.gpus,
            max_restarts=0,
            runtime_env=runtime,
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                group, placement_group_bundle_index=stage * config.ranks + rank
            ),
        )
        return remote.remote(shard, placement.backend)

    def _await_processes(self, report: Report) -> None:
        # A process imports torch and transformers first: many seconds on few cores.
        calls = self._gang.start("ping")
        for count in range(1, len(calls) + 1):
            ray.wait(calls, num_returns=count)
            report(f"{count} of {len(calls)} shard processes are up")
        failure = self._gang.first_failure(calls)
        if failure is not None:
            raise failure

    def _load(self, report: Report) -> None:
        streams: dict[Any, int] = {
            actor.load.options(num_returns="streaming").remote(): index for index, actor in enumerate(self._gang.actors)
        }
        while streams:
            ready: list[Any] = ray.wait(list(streams), num_returns=1)[0]
            for stream in ready:
                index = streams[stream]
                try:
                    report(f"{self._gang.name(index)}: {ray.get(next(stream))}")
                except StopIteration:
                    del streams[stream]
                except RayError as error:
                    raise self._gang.explain(index, error) from error
