"""One deployment: a model over stages x ranks shards on a Ray cluster, from its start to its end.

Ray places the shards, starts their processes and notices their deaths; nothing else. Plans go to the actors as calls,
and answers come back as their results. When a shard is lost, the passes in flight are lost with it, and the loop's view
of the shards says so (`cluster.gang`). `recover` makes the deployment whole again: only the lost shards are started and
read their files; the others keep their weights, leave the world they were in and meet the new ones in another. A shard
that does not answer for a while is ended, and so lost.

Expects a process that has joined Ray. Knows nothing of requests, the store or HTTP.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.actors import WATCH, ShardActor
from cluster.gang import Gang, RayShards, wait_for_all
from cluster.mapped_gpus import mapped_gpus, most_gpus
from cluster.progress import Loading
from engine.fetching import here
from engine.image_proofs import prove_images
from engine.loading import ShardConfig, check_source, check_split
from engine.whole_loading import whole_class, whole_meta
from engine.whole_places import check_parts
from engine.whole_served import check_unmapped, check_whole
from polytrace.description import ModelDescription, serve_the_same
from polytrace.device_maps import DeviceMap
from polytrace.errors import ServiceError

Report = Callable[[str], None]

_LEAVING_S = 2.0  # for a shard to leave by itself before it is killed
_BEAT_S = 2.0  # between two looks at whether all shards answer
_LOOK_S = 0.5  # between two looks at whether the cluster has room
_PLACING_S = 2.0  # that Ray takes to place shards for which there is room
_MAX_LOSSES = 5  # in a row, while the deployment comes up
# where and whether to look for weights
_INHERITED = ("HF_HUB_OFFLINE", "HF_HOME", "HF_HUB_CACHE", "HF_TOKEN", "POLYTRACE_WEIGHTS")


@dataclass(frozen=True, slots=True, kw_only=True)
class DeploymentConfig:
    """What to serve and how it is split."""

    name: str
    source: str  # folder, hub id or URL
    stages: int = 1
    ranks: int = 1
    dtype: str = "auto"
    device: str = "auto"  # "cpu", "cuda", or "auto": GPUs when the cluster has any
    cpus: float | None = None  # of the cluster's, reserved per shard; None: a small share
    threads: int | None = None  # per shard; None: the cluster's CPUs shared evenly, at least one
    kv_bytes: int | None = None  # per shard's key/value store; None: the engine's default
    random_weights_seed: int | None = None  # read no weights
    offload_bytes: int = 0  # of each shard's weights to keep in its host's memory
    merges_calls: bool = False  # as of `engine.loading.ShardConfig`
    whole: bool = True  # as of `DeploymentSpec`
    device_map: DeviceMap | None = None  # as of `DeploymentSpec`
    gpus: int | None = None  # as of `DeploymentSpec`
    working_dir: str | None = None  # shipped to nodes that do not have polytrace installed
    placement_timeout_s: float | None = None  # for the cluster to have room; None: for ever, saying so
    hang_timeout_s: float = 30.0  # a shard that does not answer for so long is ended

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


def plan_placement(
    config: DeploymentConfig, *, cluster_cpus: float, cluster_gpus: float, node_gpus: float | None = None
) -> Placement:
    """Resolves `auto`: a GPU each when there are enough, a share of one when there are some, else a share of the CPUs.
    With a device map: as many as that needs, on one machine; `node_gpus` are those of the machine with most.

    A shard asks for little of the CPUs, so that 2 x 2 shards fit on two cores and leave room for what else runs there.
    """
    num_shards = config.num_shards
    threads = config.threads or max(1, int((cluster_cpus - 1) // num_shards))  # one core is for the service itself
    cpus = config.cpus or max(0.01, min(1.0, round(0.5 * cluster_cpus / num_shards, 2)))
    if config.device_map is not None:
        there = cluster_gpus if node_gpus is None else node_gpus
        gpus = mapped_gpus(config.name, config.device_map, device=config.device, gpus=config.gpus, node_gpus=there)
        device, backend = ("cuda", "nccl") if gpus else ("cpu", "gloo")
        return Placement(cpus=cpus, gpus=gpus, threads=threads, device=device, backend=backend)
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
        self._answering: set[int] = set()  # shards whose processes have answered once
        self._loaded: set[int] = set()  # shards that have their weights
        self.is_waiting = False  # for room in the cluster; the progress lines say for how much
        self._num_missing = 0  # shards that it waits for room for
        self._is_stopped = threading.Event()

    def start(self, report: Report = lambda _: None) -> ModelDescription:
        """Places, loads and self-tests every shard; lines of progress go to `report`. Shards that are lost on the way
        are started again.

        ServiceError with the reason when it cannot, UserError where the model does not take what was asked for;
        whatever was started is stopped then.
        """
        try:
            self._start(report)
        except BaseException:
            self.stop()
            raise
        return self.describe()

    def recover(self, report: Report = lambda _: None) -> None:
        """Makes the deployment whole after a loss, when no pass is in flight; its views take passes again then.

        ServiceError when it cannot. What `report` raises ends it too; it may be called again then.
        """
        self._bring_up(report)
        for view in self._views:
            view.resume()

    def describe(self) -> ModelDescription:
        """The deployment's description, once it has started."""
        assert self._description is not None, "start() first"
        return self._description

    def shards(self, wake: Callable[[], None] = lambda: None) -> RayShards:
        """The loop's view of the shards. `wake` is called from another thread when a pass has ended."""
        self._views.append(RayShards(self._gang, wake))
        return self._views[-1]

    @property
    def holds(self) -> dict[str, float]:
        """What its shards have of the cluster, all together."""
        return self._of_shards(self.config.num_shards - self._num_missing)

    @property
    def lacks(self) -> dict[str, float]:
        """What it waits for."""
        return self._of_shards(self._num_missing)

    def _of_shards(self, number: int) -> dict[str, float]:
        if self._group is None or not number:
            return {}
        return {name: amount * number for name, amount in _bundle(self._placement).items()}

    def files(self) -> dict[str, frozenset[str]]:
        """By node: the files that its shards read their weights from."""
        found: dict[str, frozenset[str]] = {}
        for node, paths in self._gang.call("files"):
            found[node] = found.get(node, frozenset()) | frozenset(paths)
        return found

    def process_ids(self) -> list[int]:
        """Of the shards, by stage, then rank; waits until each has done what it was given."""
        return self._gang.call("ping")

    def stop(self) -> None:
        """Ends the shards' processes and gives their place back. May be called at any time, also twice."""
        self._is_stopped.set()
        for view in self._views:
            view.close()
        actors, self._gang.actors = self._gang.actors, []
        if actors and ray.is_initialized():
            actors = [actor for actor in actors if actor is not None]
            leaving = [actor.stop.remote() for actor in actors]
            wait_for_all(leaving, _LEAVING_S)
            for actor in actors:
                ray.kill(actor)
        group, self._group = self._group, None
        if group is not None and ray.is_initialized():
            remove_placement_group(group)

    def _start(self, report: Report) -> None:
        config = self.config
        # 1) a model that can be split so, and a place for each shard
        source = here(config.source, report)
        if config.whole and (kind := whole_class(source)) is not None:
            check_whole(source, kind, stages=config.stages, ranks=config.ranks)
            if config.device_map is not None:
                check_parts(config.device_map, whole_meta(source, config.dtype, kind))
        else:
            check_unmapped(source, config.device_map)
            check_source(source, config.dtype, random_weights=config.random_weights_seed is not None)
            check_split(source, config.dtype, stages=config.stages, ranks=config.ranks)
            prove_images(source)
        resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        self._placement = plan_placement(
            config,
            cluster_cpus=resources.get("CPU", 0),
            cluster_gpus=resources.get("GPU", 0),
            node_gpus=most_gpus(ray.nodes()),  # type: ignore[no-untyped-call]
        )
        self._group = self._reserve(self._placement)
        self._gang.actors = [None] * config.num_shards
        # 2) processes with weights, which meet and prove themselves
        threading.Thread(target=self._watch, name="beats", daemon=True).start()
        self._bring_up(report)
        report(f"{config.name} is ready: {config.stages} stages x {config.ranks} ranks")

    def _bring_up(self, report: Report) -> None:
        """Everything that is missing is made; shards that are lost meanwhile are missing again."""
        for losses in range(1, _MAX_LOSSES + 1):
            try:
                self._assemble(report)
            except ServiceError as error:
                if losses == _MAX_LOSSES or not self._gang.find_dead():
                    raise
                report(f"{error}; starting again what was lost")
            else:
                return

    def _assemble(self, report: Report) -> None:
        gang, placement = self._gang, self._placement
        # 1) a process for each shard, where there is room: nodes may be gone
        self._await_room(report)
        missing = sorted({*gang.find_dead(), *(i for i, actor in enumerate(gang.actors) if actor is None)})
        self._answering -= set(missing)
        self._loaded -= set(missing)
        if missing:
            report(f"starting {len(missing)} shards on {placement.device}, {placement.threads} threads each")
        for index in missing:
            gang.actors[index] = self._launch(placement, *divmod(index, self.config.ranks))
        self._await_processes(report)
        # 2) a world in which they meet; those that were there before leave the one they were in
        gang.leave(self.config.hang_timeout_s, self._loaded)
        gang.call("meet", gang.call_first("host_meeting"))
        # 3) weights
        self._load(report)
        # 4) self-test, and the description that follows from it
        report("self-testing: a row must be the same bits beside neighbours and alone")
        reports = gang.call("gate", self._description is None)
        description: ModelDescription = gang.call_first("describe", self.config.name, reports)
        if self._description is not None and not serve_the_same(description, self._description):
            raise ServiceError(f"{self.config.name}: {self.config.source} is not what it was when the service started")
        gang.call("open", description)
        self._description = description

    def _watch(self) -> None:
        """Ends shards that hang, and tells the views of losses that no pass has noticed."""
        while not self._is_stopped.wait(_BEAT_S):
            try:
                loss = self._gang.end_hung(self.config.hang_timeout_s, sorted(self._answering))
            except Exception:  # noqa: BLE001  Ray itself is ending: so is the deployment
                return
            if loss is not None and not self._is_stopped.is_set():
                for view in self._views:
                    view.lose(loss)

    def _reserve(self, placement: Placement) -> PlacementGroup:
        group: PlacementGroup = placement_group([_bundle(placement)] * self.config.num_shards, strategy="PACK")
        return group

    def _await_room(self, report: Report) -> None:
        """Returns when every shard has its place, also those whose node is gone; says what is missing meanwhile."""
        began = time.monotonic()
        limit_s = self.config.placement_timeout_s
        try:
            while not self._has_room():
                self._num_missing = self._num_missing or self.config.num_shards
                if self._is_stopped.is_set():
                    raise ServiceError(f"{self.config.name} was stopped while it waited for room in the cluster")
                if limit_s is not None and time.monotonic() - began > limit_s:
                    raise ServiceError(f"{self.config.name}: no room within {limit_s:.0f} s; it {self._wish()}")
                if time.monotonic() - began > _PLACING_S:
                    self.is_waiting = True
                    report(self._wish())
                self._is_stopped.wait(_LOOK_S)
        finally:
            self.is_waiting, self._num_missing = False, 0

    def _has_room(self) -> bool:
        assert self._group is not None
        # not `group.wait`: a group that was placed once stays ready for it, whatever becomes of its nodes
        return bool(placement_group_table(self._group)["state"] == "CREATED")

    def _wish(self) -> str:
        """What it waits for, against what there is."""
        assert self._group is not None
        nodes = placement_group_table(self._group).get("bundles_to_node_id", {})
        asked = _bundle(self._placement)
        num_missing = self._num_missing = sum(not node for node in nodes.values()) or self.config.num_shards
        free: dict[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]
        whole: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        told_free = ", ".join(f"{name} {free.get(name, 0):g} of {whole.get(name, 0):g}" for name in asked)
        num_nodes = sum(node["Alive"] for node in ray.nodes())  # type: ignore[no-untyped-call]
        told = f"waits for room for {num_missing} of {self.config.num_shards} shards of "
        told += ", ".join(f"{name} {amount:g}" for name, amount in asked.items())
        return f"{told} each; free are {told_free} on {num_nodes} nodes"

    def _launch(self, placement: Placement, stage: int, rank: int) -> Any:
        config, group = self.config, self._group
        assert group is not None
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
            offload_bytes=config.offload_bytes,
            merges_calls=config.merges_calls,
            whole=config.whole,
            device_map=config.device_map,
            **options,
        )
        environment = {name: os.environ[name] for name in _INHERITED if name in os.environ}
        environment |= {"OMP_NUM_THREADS": str(placement.threads), "TOKENIZERS_PARALLELISM": "false"}
        environment["POLYTRACE_SHARD"] = f"{config.name} stage {stage} rank {rank}"  # for people who look at processes
        runtime: dict[str, Any] = {"env_vars": environment}
        if config.working_dir is not None:
            runtime["working_dir"] = config.working_dir
        remotely = ray.remote(concurrency_groups={WATCH: 1})  # type: ignore[call-overload]
        remote = remotely(ShardActor).options(
            num_cpus=placement.cpus,
            num_gpus=placement.gpus,
            max_restarts=0,  # where its bundle is, and with neighbours that know of it: `recover`
            runtime_env=runtime,
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                group, placement_group_bundle_index=stage * config.ranks + rank
            ),
        )
        return remote.remote(shard, placement.backend)

    def _await_processes(self, report: Report) -> None:
        # A process imports torch and transformers first: many seconds on few cores.
        starting = [index for index in range(self.config.num_shards) if index not in self._answering]
        calls = [self._gang.actors[index].ping.remote() for index in starting]
        for count in range(1, len(calls) + 1):
            while len(ray.wait(calls, num_returns=count, timeout=_LOOK_S)[0]) < count:
                self._await_room(report)  # of a node that was gone when they were placed Ray hears a moment later
            report(f"{count} of {len(calls)} shard processes are up")
        for index, call in zip(starting, calls, strict=True):
            try:
                ray.get(call)
            except RayError as error:
                raise self._gang.explain(index, error) from error
            self._answering.add(index)

    def _load(self, report: Report) -> None:
        gang = self._gang
        loading = Loading([gang.name(index) for index in range(self.config.num_shards)], report)
        streams: dict[Any, int] = {
            actor.load.options(num_returns="streaming").remote(): index
            for index, actor in enumerate(gang.actors)
            if index not in self._loaded
        }
        while streams:
            ready: list[Any] = ray.wait(list(streams), num_returns=1)[0]
            for stream in ready:
                index = streams[stream]
                try:
                    loading.hear(index, ray.get(next(stream)))
                except StopIteration:
                    del streams[stream]
                    self._loaded.add(index)
                except RayError as error:
                    raise gang.explain(index, error) from error


def _bundle(placement: Placement) -> dict[str, float]:
    """What Ray reserves for one shard."""
    return {"CPU": placement.cpus} | ({"GPU": placement.gpus} if placement.gpus else {})
