"""Plans for machines that are not here: counted from real configurations, held against what shards really load."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from families import model_of
from typer.testing import CliRunner

from api.commands import app
from cluster.planning.hardware import GIB, Hardware, hardware_of, parse_bytes
from cluster.planning.planner import Load, Machine, census_of, plan_split, plan_splits_of
from engine.census import Census, Kind
from engine.links import Solo
from engine.loading import ShardConfig, load_model, meta_model
from engine.shipped import shipped_models
from polytrace.errors import ServiceError


@pytest.fixture(scope="module")
def large() -> Census:
    return census_of("meta-llama/Llama-3.1-405B")


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mixtral", "gpt_neox"])
def test_a_census_counts_what_shards_load(family: str, tmp_path: Path) -> None:
    model_of(family).save_pretrained(tmp_path)
    census = Census(meta_model(str(tmp_path)))
    for stages in (1, 2, 3):
        census.check(stages, 1)
        for stage, share in enumerate(census.shares(stages, 1)):
            loaded = load_model(ShardConfig(source=str(tmp_path), stage=stage, stages=stages), Solo())
            assert share.weight_bytes == loaded.weight_bytes
            assert share.layers == range(loaded.window.first, loaded.window.stop)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "gpt_oss", "opt"])
def test_ranks_hold_slices_that_make_up_the_whole(family: str, tmp_path: Path) -> None:
    model_of(family).save_pretrained(tmp_path)
    census = Census(meta_model(str(tmp_path)))
    census.check(2, 2)
    alone, shared = census.shares(2, 1), census.shares(2, 2)
    for one, other in zip(alone, shared, strict=True):
        assert other.weight_bytes < one.weight_bytes <= 2 * other.weight_bytes
        assert other.summed_features >= 2 * census.hidden_size * len(other.layers)


def test_the_real_405b_is_assigned_parameter_by_parameter(large: Census) -> None:
    assert large.num_parameters == 405_853_388_800
    machine = Machine(hardware=hardware_of("h100"), gpus=16, nodes=2)
    planned = plan_splits_of(large, machine, Load())
    assert {split.ranks for split in planned.splits} <= {1, 2, 4, 8}
    for split in planned.splits:
        large.check(split.stages, split.ranks)
        assert split.gpus <= 16
        assert all(shard.num_bytes <= 80 * GIB for shard in split.shards)
        layers = [layer for shard in split.shards for layer in shard.layers]
        assert layers == list(range(126))
        # no layer is anywhere twice, and the two ends stand in their stages
        total = sum(sum(shard.weights.values()) for shard in split.shards) * split.ranks
        assert 2 * large.num_parameters <= total <= 2.001 * large.num_parameters  # norms are on every rank
        assert split.shards[0].weights[Kind.EMBEDDING] and split.shards[-1].weights[Kind.HEAD]


def test_what_does_not_fit_is_refused_with_the_nearest_that_does(large: Census) -> None:
    machine = Machine(hardware=hardware_of("h100"), gpus=8)
    with pytest.raises(ServiceError) as refusal:
        plan_splits_of(large, machine, Load())
    told = str(refusal.value)
    assert "756.0 GiB of weights" in told
    assert "the nearest that works: 16 x h100 of 80.0 GiB in 2 nodes" in told
    needed = parse_bytes(told.rpartition("of at least ")[2].replace(" ", ""))
    richer = Hardware(
        name="h", memory_bytes=int(needed * 1.01), flops=1e15, memory_rate=1e12, link_rate=1e11, network_rate=1e10
    )
    assert plan_splits_of(large, Machine(hardware=richer, gpus=8), Load()).splits
    poorer = Hardware(
        name="h", memory_bytes=int(needed * 0.98), flops=1e15, memory_rate=1e12, link_rate=1e11, network_rate=1e10
    )
    with pytest.raises(ServiceError):
        plan_splits_of(large, Machine(hardware=poorer, gpus=8), Load())
    with pytest.raises(
        ServiceError, match="128 attention heads, which 12 ranks cannot share: use ranks 1, 2, 4, 8, 16,"
    ):
        plan_splits_of(large, Machine(hardware=hardware_of("h200"), gpus=12), Load(), ranks=12)


def test_more_ranks_than_key_value_heads_hold_copies_that_are_counted(large: Census) -> None:
    (alone,), (share,) = large.shares(1, 1), large.shares(1, 16)
    large.check(1, 16)
    heads = {held.path.rpartition("self_attn.")[2]: held.shape for held in share.held if "layers.7.self" in held.path}
    assert heads == {
        "q_proj.weight": (1024, 16384),
        "k_proj.weight": (128, 16384),  # one of the 8 heads, on two ranks
        "v_proj.weight": (128, 16384),
        "o_proj.weight": (16384, 1024),
    }
    norms = sum(held.num_bytes for held in alone.held if len(held.shape) == 1)
    copies = 126 * 2 * 8 * 128 * 16384 * 2  # bytes of all keys' and values' projections, once more
    assert 16 * share.weight_bytes == alone.weight_bytes + copies + 15 * norms
    assert large.heads(16) == (8, 1) and large.heads(8) == (16, 1) and large.heads(4) == (32, 2)
    planned = plan_splits_of(large, Machine(hardware=hardware_of("h200"), gpus=16), Load(), ranks=16)
    assert planned.splits[0].ranks == 16
    two_nodes = Machine(hardware=hardware_of("h200"), gpus=16, nodes=2)
    assert plan_splits_of(large, two_nodes, Load(), ranks=16).splits[0].tokens_s < planned.splits[0].tokens_s


def test_more_of_anything_never_makes_a_plan_slower(large: Census) -> None:
    machine = Machine(hardware=hardware_of("h100"), gpus=32, nodes=4)
    by_stages = [plan_split(large, machine, Load(), stages, 8) for stages in (2, 3, 4)]
    rates = [split.tokens_s for split in by_stages if split is not None]
    assert len(rates) == 3 and rates == sorted(rates)


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("meta-llama/Llama-3.1-8B", 8.03),
        ("meta-llama/Llama-3.1-70B", 70.55),
        ("Qwen/Qwen2.5-72B", 72.71),
        ("mistralai/Mixtral-8x22B-v0.1", 140.62),
        ("deepseek-ai/DeepSeek-V3", 671.03),
        ("openai/gpt-oss-120b", 116.83),
    ],
)
def test_shipped_configurations_have_the_sizes_that_are_published(name: str, billions: float) -> None:
    assert name in shipped_models()
    census = census_of(name)
    assert census.num_parameters / 1e9 == pytest.approx(billions, abs=0.01)
    census.check(8, 1)
    files = {"deepseek-ai/DeepSeek-V3": "fp8", "openai/gpt-oss-120b": "mxfp4"}.get(name)
    assert census.quantisation == (f"its files are {files}: shards hold it widened" if files else "")


def test_the_command_shows_tables_and_json() -> None:
    shown = CliRunner().invoke(app, ["plan", "meta-llama/Llama-3.1-70B", "--gpus", "4"])
    assert shown.exit_code == 0, shown.output
    assert "70.6 billion parameters in bfloat16, on 4 x h100 of 80.0 GiB" in " ".join(shown.output.split())
    plain = CliRunner().invoke(app, ["plan", "meta-llama/Llama-3.1-70B", "--gpus", "4", "--json"])
    splits = json.loads(plain.stdout)["splits"]
    assert {(split["stages"], split["ranks"]) for split in splits} >= {(4, 1), (2, 2), (1, 4)}
    refused = CliRunner().invoke(app, ["plan", "meta-llama/Llama-3.1-70B", "--gpus", "1", "--gpu-memory", "80 apples"])
    assert refused.exit_code != 0 and "no amount of memory" in refused.output
