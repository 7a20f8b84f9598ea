"""One deployment: a model over stages x ranks shards on a Ray cluster, from its start to its end.

Ray places the shards, starts their processes and notices their deaths; nothing else. Plans go to the actors as calls,
and answers come back as their results. A deployment is one gang: when a shard is lost, the passes in flight are lost
with it and the deployment is over; `RayShards` then says so and its owner starts another one.

Expects a process that has joined Ray. Knows nothing of requests, the store or HTTP.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.actors import ShardActor
from engine.loading import ShardConfig, check_split
from polytrace.description import ModelDescription
from polytrace.errors import PolytraceError, ServiceError
from scheduling.plan import Plan, ShardResult

Report = Callable[[str], None]

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
        self._actors: list[Any] = []  # by stage, then rank
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
        self._views.append(RayShards(self._actors, self.config, wake))
        return self._views[-1]

    def process_ids(self) -> list[int]:
        """Of the shards, by stage, then rank; waits until each has done what it was given."""
        return self._call("ping")

    def stop(self) -> None:
        """Ends the shards' processes and gives their place back. May be called at any time, also twice."""
        for view in self._views:
            view.close()
        actors, self._actors = self._actors, []
        if actors and ray.is_initialized():
            leaving = [actor.stop.remote() for actor in actors]
            ray.wait(leaving, num_returns=len(leaving), timeout=2)
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
        self._actors = [
            self._launch(placement, group, stage, rank)
            for stage in range(config.stages)
            for rank in range(config.ranks)
        ]
        self._await_processes(report)
        point = self._get([self._actors[0].host_meeting.remote()])[0]
        self._call("meet", point)
        # 3) weights
        self._load(report)
        # 4) self-test, and the description that follows from it
        report("self-testing: a row must be the same bits beside neighbours and alone")
        reports = self._call("gate")
        description: ModelDescription = self._get([self._actors[0].describe.remote(config.name, reports)])[0]
        self._call("open", description)
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
        waiting: list[Any] = [actor.ping.remote() for actor in self._actors]
        while waiting:
            ready, waiting = ray.wait(waiting, num_returns=1)
            self._get(ready)
            report(f"{self.config.num_shards - len(waiting)} of {self.config.num_shards} shard processes are up")

    def _load(self, report: Report) -> None:
        streams: dict[Any, int] = {
            actor.load.options(num_returns="streaming").remote(): index for index, actor in enumerate(self._actors)
        }
        while streams:
            ready: list[Any] = ray.wait(list(streams), num_returns=1)[0]
            for stream in ready:
                try:
                    line = ray.get(next(stream))
                except StopIteration:
                    del streams[stream]
                except RayError as error:
                    _raise(error, shard_name(streams[stream], self.config))
                else:
                    report(f"{shard_name(streams[stream], self.config)}: {line}")

    def _call(self, method: str, *args: Any) -> list[Any]:
        """Calls every shard at once and waits for all answers."""
        return self._get([getattr(actor, method).remote(*args) for actor in self._actors])

    def _get(self, calls: list[Any]) -> list[Any]:
        failure = _first_failure(calls, self.config)
        if failure is not None:
            raise failure
        return ray.get(calls)


class RayShards:
    """The loop's shards (`scheduling.loop.Shards`): as many passes in flight as there are stages.

    After a loss `finished` hands every pass in flight back with the reason, and raises it from then on.
    """

    def __init__(self, actors: list[Any], config: DeploymentConfig, wake: Callable[[], None]) -> None:
        self._actors = actors
        self._config = config
        self._wake = wake
        self._num_in_flight = 0
        self._submitted: queue.SimpleQueue[tuple[Plan, list[Any]] | None] = queue.SimpleQueue()
        self._ended: queue.SimpleQueue[tuple[Plan, tuple[ShardResult, ...] | PolytraceError]] = queue.SimpleQueue()
        self._loss: PolytraceError | None = None
        threading.Thread(target=self._watch, name="passes", daemon=True).start()

    def have_room(self) -> bool:
        return self._loss is None and self._num_in_flight < self._config.stages

    def submit(self, plan: Plan) -> None:
        handle = ray.put(plan)  # serialised once for all shards
        self._num_in_flight += 1
        self._submitted.put((plan, [actor.run.remote(handle) for actor in self._actors]))

    def finished(self) -> Iterator[tuple[Plan, tuple[ShardResult, ...] | PolytraceError]]:
        if self._loss is not None and self._num_in_flight == 0:
            raise self._loss
        while not self._ended.empty():
            plan, results = self._ended.get()
            self._num_in_flight -= 1
            yield plan, results
        if self._loss is not None:
            self._wake()  # so that the loop comes again and hears of it

    def close(self) -> None:
        """Nothing is submitted from now on."""
        self._submitted.put(None)

    def _watch(self) -> None:
        while (submitted := self._submitted.get()) is not None:
            plan, calls = submitted
            if self._loss is None:
                self._loss = _first_failure(calls, self._config)
            self._ended.put((plan, self._loss or tuple(ray.get(calls))))
            self._wake()


def shard_name(index: int, config: DeploymentConfig) -> str:
    """What a shard is called in progress lines and errors."""
    return f"stage {index // config.ranks} rank {index % config.ranks}"


def _first_failure(calls: list[Any], config: DeploymentConfig) -> PolytraceError | None:
    """Waits for all calls or the first to fail; the error of the shard that died, rather than of its neighbours."""
    waiting: list[Any] = list(calls)
    failed: dict[int, RayError] = {}
    while waiting:
        # After a failure the others hear of it within moments: gloo and NCCL notice a dead peer.
        ready, waiting = ray.wait(waiting, num_returns=1, timeout=1.0 if failed else None)
        if not ready:
            break
        try:
            ray.get(ready[0])
        except RayError as error:
            failed[calls.index(ready[0])] = error
    if not failed:
        return None
    index = next((i for i, error in failed.items() if isinstance(error, RayActorError)), next(iter(failed)))
    return _as_polytrace(failed[index], shard_name(index, config))


def _as_polytrace(error: RayError, name: str) -> PolytraceError:
    cause = error.cause if isinstance(error, RayTaskError) else None
    if isinstance(cause, PolytraceError):
        return type(cause)(f"{name}: {cause.message}", where=cause.where)
    if isinstance(error, RayActorError):
        return ServiceError(f"the shard {name} died: {_first_line(error)}")
    return ServiceError(f"the shard {name} failed: {_first_line(cause or error)}")


def _raise(error: RayError, name: str) -> NoReturn:
    raise _as_polytrace(error, name) from error


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
