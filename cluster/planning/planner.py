"""Which split of a model fits which GPUs, what each shard holds, what crosses which link, and what can be reached.

Weights are counted, parameter by parameter, from the model built without data (`engine.census`). Memory beside them and
time are estimates: by the rules that stand in `_row_bytes`, and by `cluster.planning.roofline`, which no real run beats
and few come close to. Every stage is taken to be busy: as many passes in flight as there are stages.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from cluster.planning.hardware import GIB, Hardware, told_bytes
from cluster.planning.roofline import FLOAT_BYTES, Roofline, stored_row_bytes
from engine.census import Census, Kind, StageShare
from engine.loading import meta_model
from engine.shipped import known_source
from polytrace.errors import ServiceError
from scheduling.policy import BUDGET_TOKENS

_MIN_PASS_ROWS = 2048  # a plan whose passes are smaller is no plan
_MORE = 8  # times the nodes that are tried for the nearest plan that works


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """The GPUs that there are."""

    hardware: Hardware
    gpus: int
    nodes: int = 1

    def __post_init__(self) -> None:
        if self.gpus < 1 or self.nodes < 1 or self.gpus % self.nodes:
            raise ServiceError(f"{self.gpus} GPUs cannot stand evenly in {self.nodes} nodes")

    @property
    def gpus_a_node(self) -> int:
        return self.gpus // self.nodes

    def told(self) -> str:
        """For people."""
        nodes = f" in {self.nodes} nodes" if self.nodes > 1 else ""
        return f"{self.gpus} x {self.hardware.name} of {told_bytes(self.hardware.memory_bytes)}{nodes}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What the shards are to hold beside weights, and how the model is used."""

    store_bytes: int = 4 * GIB  # keys and values of a pass, and rows kept for later passes
    value_bytes: int = 4 * GIB  # users' values at one visit (`Limits.max_live_bytes`)
    reserve_bytes: int = 2 * GIB  # the driver, communication buffers, fragmentation
    head_rows: int = 512  # positions of a pass that somebody wants logits of
    context: int = 1024  # keys that a row attends to

    @property
    def beside_bytes(self) -> int:
        """What each shard holds beside weights and a pass."""
        return self.store_bytes + self.value_bytes + self.reserve_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardPlan:
    """One stage's shards; its ranks are alike."""

    stage: int
    layers: range
    weights: Mapping[Kind, int]  # bytes
    store_bytes: int
    value_bytes: int
    reserve_bytes: int
    activation_bytes: int  # of the largest pass that fits
    pass_s: float  # seconds of such a pass
    sum_s: float  # of these, adding up over ranks
    send_s: float  # of these, to the next stage

    @property
    def num_bytes(self) -> int:
        return (
            sum(self.weights.values())
            + self.store_bytes
            + self.value_bytes
            + self.reserve_bytes
            + self.activation_bytes
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitPlan:
    """A split of the model that fits."""

    stages: int
    ranks: int
    pass_rows: int  # the largest pass that fits every shard
    shards: tuple[ShardPlan, ...]  # by stage
    tokens_s: float
    latency_s: float  # of one such pass through all stages
    row_links: Mapping[str, int]  # bytes of one row over each kind of link

    @property
    def gpus(self) -> int:
        return self.stages * self.ranks


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """All splits that fit a machine, the one with the most tokens a second first; and what was refused, and why."""

    machine: Machine
    parameters: int
    dtype: str  # as shards hold them
    quantisation: str  # what there is to say of the files', if anything
    splits: tuple[SplitPlan, ...]
    refused: Mapping[int, str]  # numbers of ranks -> why not


def census_of(name: str, dtype: str = "auto") -> Census:
    """A model's census, from a shipped configuration, a folder or a hub id. Reads no weights."""
    return Census(meta_model(known_source(name), dtype))


def plan_splits_of(
    census: Census, machine: Machine, load: Load, *, stages: int | None = None, ranks: int | None = None
) -> Planned:
    """Every split that fits, the fastest first. ServiceError with the nearest that works when none does."""
    planned = _plan(census, machine, load, stages, ranks)
    if planned.splits:
        return planned
    raise ServiceError(_refusal(census, machine, load, stages, ranks, planned.refused))


def _plan(census: Census, machine: Machine, load: Load, stages: int | None, ranks: int | None) -> Planned:
    refused: dict[int, str] = {}
    splits: list[SplitPlan] = []
    for tried_ranks in _rank_counts(machine, ranks):
        try:
            census.splits(tried_ranks)
        except ServiceError as error:
            refused[tried_ranks] = error.message
            continue
        for tried_stages in _stage_counts(census, machine, tried_ranks, stages):
            found = plan_split(census, machine, load, tried_stages, tried_ranks)
            if found is not None:
                splits.append(found)
    splits.sort(key=lambda split: (-split.tokens_s, split.gpus))
    return Planned(
        machine=machine,
        parameters=census.num_parameters,
        dtype=census.dtype,
        quantisation=census.quantisation,
        splits=tuple(splits),
        refused=refused,
    )


def plan_split(census: Census, machine: Machine, load: Load, stages: int, ranks: int) -> SplitPlan | None:
    """One split, None when it does not fit."""
    roofline = Roofline(census, machine.hardware, machine.gpus_a_node, stages=stages, ranks=ranks)
    shares = roofline.shares
    row_bytes = _row_bytes(census, ranks)
    rooms = [machine.hardware.memory_bytes - load.beside_bytes - share.weight_bytes for share in shares]
    rooms[-1] -= _logits_bytes(census, load)
    pass_rows = min(BUDGET_TOKENS, min(rooms) // row_bytes, load.store_bytes // stored_row_bytes(census, ranks))
    if pass_rows < _MIN_PASS_ROWS:
        return None
    shards = tuple(
        _shard(census, roofline, load, share, stage, pass_rows, row_bytes) for stage, share in enumerate(shares)
    )
    sums = max(share.summed_features for share in shares) * census.itemsize * (ranks - 1)
    return SplitPlan(
        stages=stages,
        ranks=ranks,
        pass_rows=pass_rows,
        shards=shards,
        tokens_s=pass_rows / max(shard.pass_s for shard in shards),
        latency_s=sum(shard.pass_s for shard in shards),
        row_links={
            "between ranks, into each, in the heaviest stage": sums,
            "the same by a ring all-reduce, which would not keep a row's bits": 2 * sums // ranks,
            "between stages, for each rank": census.hidden_size * census.itemsize if stages > 1 else 0,
        },
    )


def _shard(
    census: Census,
    roofline: Roofline,
    load: Load,
    share: StageShare,
    stage: int,
    pass_rows: int,
    row_bytes: int,
) -> ShardPlan:
    layers = len(share.layers)
    seconds = roofline.seconds(
        stage,
        rows=[pass_rows] * layers,
        pairs=[pass_rows * load.context] * layers,
        head_rows=min(load.head_rows, pass_rows),
        sent_rows=pass_rows,
    )
    is_last = stage == len(roofline.shares) - 1
    return ShardPlan(
        stage=stage,
        layers=share.layers,
        weights=share.bytes_by_kind(),
        store_bytes=load.store_bytes,
        value_bytes=load.value_bytes,
        reserve_bytes=load.reserve_bytes,
        activation_bytes=pass_rows * row_bytes + (_logits_bytes(census, load) if is_last else 0),
        pass_s=seconds.all_s,
        sum_s=seconds.sum_s,
        send_s=seconds.send_s,
    )


def _row_bytes(census: Census, ranks: int) -> int:
    """What a row takes at most while it is in a layer.

    The residual stream, its normed copy and a sum on its way, with every rank's part of it; beside them either query,
    key, value and what attention makes of them in float32, or three widths of the MLP.
    """
    heads, kv_heads = census.heads(ranks)
    stream = (3 + (ranks if ranks > 1 else 0)) * census.hidden_size * census.itemsize
    attention = (heads + 2 * kv_heads) * census.head_dim * census.itemsize
    attention += 2 * heads * census.head_dim * FLOAT_BYTES
    mlp = 3 * census.widest // ranks * census.itemsize
    return stream + max(attention, mlp)


def _logits_bytes(census: Census, load: Load) -> int:
    """Of a pass, on the last stage: as they are made, and in float32."""
    return load.head_rows * census.vocab_size * (census.itemsize + FLOAT_BYTES)


def _rank_counts(machine: Machine, ranks: int | None) -> Iterator[int]:
    """Ranks talk at every layer: they stay within a node."""
    if ranks is not None:
        yield ranks
        return
    for count in range(1, machine.gpus_a_node + 1):
        if machine.gpus_a_node % count == 0:
            yield count


def _stage_counts(census: Census, machine: Machine, ranks: int, stages: int | None) -> Iterator[int]:
    most = min(census.num_layers, machine.gpus // ranks)
    if stages is not None:
        if stages <= most:
            yield stages
        return
    yield from range(1, most + 1)


def _refusal(
    census: Census, machine: Machine, load: Load, stages: int | None, ranks: int | None, refused: Mapping[int, str]
) -> str:
    """Why nothing fits, and what would."""
    weights = census.num_parameters * census.itemsize
    if ranks is not None and ranks in refused:
        reasons = [f"no plan has {ranks} ranks: {refused[ranks]}"]
    else:
        asked = "" if stages is None and ranks is None else " that was asked for"
        reasons = [
            f"no split{asked} of its {told_bytes(weights)} of weights fits {machine.told()}: "
            f"each shard has {told_bytes(load.beside_bytes)} beside its weights, "
            f"and a pass has at least {_MIN_PASS_ROWS} rows"
        ]
    if stages is not None or ranks is not None:
        free = _plan(census, machine, load, None, None).splits
        if free:
            return "; ".join([*reasons, f"{free[0].stages} stages x {free[0].ranks} ranks would fit"])
    nearest = _fewest_gpus(census, machine, load)
    if nearest is not None:
        best = nearest.splits[0]
        reasons.append(f"the nearest that works: {nearest.machine.told()}, {best.stages} stages x {best.ranks} ranks")
    smallest = _least_memory(census, machine, load)
    if smallest is not None:
        reasons.append(f"or {machine.gpus} GPUs of at least {told_bytes(smallest)}")
    return "; ".join(reasons)


def _fewest_gpus(census: Census, machine: Machine, load: Load) -> Planned | None:
    for nodes in range(machine.nodes, machine.nodes * _MORE + 1):
        more = Machine(hardware=machine.hardware, gpus=machine.gpus_a_node * nodes, nodes=nodes)
        found = _plan(census, more, load, None, None)
        if found.splits:
            return found
    return None


def _least_memory(census: Census, machine: Machine, load: Load) -> int | None:
    beside = load.beside_bytes + _logits_bytes(census, load)
    needs = []
    for ranks in _rank_counts(machine, None):
        try:
            census.splits(ranks)
        except ServiceError:
            continue
        stages = min(census.num_layers, machine.gpus // ranks)
        shares = census.shares(stages, ranks)
        rows = _MIN_PASS_ROWS * _row_bytes(census, ranks)
        needs.append(max(share.weight_bytes for share in shares) + beside + rows)
    return min(needs, default=None)
