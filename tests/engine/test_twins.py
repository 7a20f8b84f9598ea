"""The self-test of a split, over real processes: sound plans pass, and every kind of wrong plan is caught and named."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import width
from families import CONFIGS, FEW
from processes import in_processes
from transformers import (
    AutoConfig,
    BioGptConfig,
    DeepseekV2Config,
    HunYuanDenseV1Config,
    Llama4TextConfig,
    Olmo2Config,
    PersimmonConfig,
    Qwen2MoeConfig,
    StableLmConfig,
)

from engine.links import Distributed, Solo, join_store, open_store
from engine.shipped import known_source, shipped_models
from engine.shrinking import shrink
from engine.twins import prove_splits
from polytrace.errors import ServiceError

RANKS = 2
MLP = "layers.*.mlp"
LLAMA = {
    **{f"layers.*.self_attn.{name}_proj": "colwise" for name in "qkv"},
    "layers.*.self_attn.o_proj": "rowwise",
    f"{MLP}.gate_proj": "colwise",
    f"{MLP}.up_proj": "colwise",
    f"{MLP}.down_proj": "rowwise",
}
MIXTRAL = {f"{MLP}.experts": "moe_tp_experts", f"{MLP}.experts.down_proj": "rowwise"}
WRONG: dict[str, tuple[str, dict[str, str], str]] = {  # family, plan, what the refusal says
    # runs, and pairs a gate with another neuron's value
    "gate in two blocks": (
        "llama",
        LLAMA | {f"{MLP}.gate_proj": "packed_colwise"},
        r"other numbers than one process, first at model.layers.0.mlp.act_fn.input, by .* use ranks=1",
    ),
    # runs, and takes gates for values
    "experts' blocks as one": (
        "mixtral",
        MIXTRAL | {f"{MLP}.experts.gate_up_proj": "colwise"},
        r"other numbers than one process, first at model.layers.0.mlp.experts.output, by .* use ranks=1",
    ),
    # fails in the twin's forward
    "queries without their keys": (
        "llama",
        {"layers.*.self_attn.q_proj": "colwise", "layers.*.self_attn.o_proj": "rowwise"},
        r"cannot be split over 2 ranks: a tiny twin of it .* use ranks=1",
    ),
}


SIZES: dict[str, Any] = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
MORE = (  # families that the other tests do not have, most of them split by a plan of ours
    StableLmConfig(**SIZES, num_key_value_heads=2),
    HunYuanDenseV1Config(**SIZES, num_key_value_heads=2, head_dim=8),
    PersimmonConfig(**SIZES),
    BioGptConfig(**SIZES),
    Qwen2MoeConfig(**SIZES, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2),
    Llama4TextConfig(**SIZES, num_key_value_heads=2, head_dim=8, num_local_experts=4, interleave_moe_layer_step=2),
    Olmo2Config(**SIZES),
    DeepseekV2Config(**SIZES, n_routed_experts=4, num_experts_per_tok=2),
)
SHIPPED = ("deepseek-ai/DeepSeek-V3", "openai/gpt-oss-120b")
NO_GRADIENTS = "keys of latent attention as if ranks had nothing to add up"  # runs, and right, but not backwards


def configurations(is_wide: bool) -> dict[str, Any]:
    """Those that are proven; of families whose plans are alike, and of shipped models of their classes, all if wide."""
    families = CONFIGS if is_wide else FEW
    found: dict[str, Any] = {name: copy.deepcopy(CONFIGS[name]) for name in families}
    found |= {type(config).__name__: config for config in MORE}
    shipped = shipped_models() if is_wide else SHIPPED
    found |= {name: AutoConfig.from_pretrained(known_source(name)) for name in shipped}
    for name, (family, plan, _) in WRONG.items():
        found[name] = copy.deepcopy(CONFIGS[family])
        found[name].base_model_tp_plan = plan
    latent = found[NO_GRADIENTS] = copy.deepcopy(found["DeepseekV2Config"])
    latent.base_model_tp_plan = latent.base_model_tp_plan | {"layers.*.self_attn.kv_a_proj_with_mqa": "replicate"}
    return found


def shard(rank: int, port: int, out: str, is_wide: bool) -> None:
    torch.set_num_threads(1)
    store = join_store("127.0.0.1", port)
    links = Distributed(store, stage=0, stages=1, rank=rank, ranks=RANKS, timeout_s=60)
    told: dict[str, Any] = {}
    for name, config in configurations(is_wide).items():
        try:
            proof = prove_splits(config, links, torch.device("cpu"))
            assert proof is not None
            where = [f"{module} {way} {port.value}" for module, way, port, _ in proof.no_gradients]
            told[name] = proof.why_no_gradients, where
        except ServiceError as error:
            told[name] = error.message
    links.barrier()
    links.close()
    torch.save(told, Path(out) / f"{rank}.pt")


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("out")
    store = open_store("127.0.0.1")
    in_processes(shard, (store.port, str(folder), width.is_wide), RANKS)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


def test_every_family_and_every_shipped_model_is_proven(told: list[dict[str, Any]]) -> None:
    for each in told:
        assert {name for name, found in each.items() if isinstance(found, str)} == set(WRONG)


def test_every_family_and_every_shipped_model_has_gradients_and_at_its_modules(told: list[dict[str, Any]]) -> None:
    of_latent_keys = {"model.layers.*.self_attn.kv_a_proj_with_mqa  output"}
    of_positions = re.compile(r"rotary_emb  output|layers\.\*(\.self_attn|\.attention)?  inputs")
    for each in told:
        for name in each.keys() - WRONG.keys() - {NO_GRADIENTS}:
            why, where = each[name]
            assert why == ""
            ports = {place for place in where if "  " in place and not of_positions.search(place)}
            assert ports == (of_latent_keys if name == "DeepseekV2Config" else set())
        # Each rank turns its own heads by the tables of positions, and what ranks add up behind an operation is a part
        # of its input's gradient.
        refused = {"model.rotary_emb  output", "model.layers.*.mlp.up_proj F_linear_0 inputs"}
        assert refused <= set(each["llama"][1])


def test_a_split_whose_gradients_differ_is_served_without_and_says_why(told: list[dict[str, Any]]) -> None:
    for each in told:
        assert re.search(
            r"DeepseekV2ForCausalLM has other gradients over 2 ranks than in one process, at \S+ by .* use ranks=1",
            each[NO_GRADIENTS][0],
        )


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_plan_is_refused_on_every_rank_with_where_it_begins(name: str, told: list[dict[str, Any]]) -> None:
    for each in told:
        assert re.search(WRONG[name][2], each[name]), each[name]


def test_one_rank_needs_no_proof() -> None:
    assert prove_splits(None, Solo(), torch.device("cpu")) is None  # of no model at all


@pytest.mark.parametrize("name", shipped_models())
@pytest.mark.parametrize("ranks", [2, 8, 16])
def test_a_twin_is_small_and_is_shared_as_its_model_is(name: str, ranks: int) -> None:
    config = AutoConfig.from_pretrained(known_source(name))
    small = copy.deepcopy(config)
    shrink(small, ranks)
    assert 2 <= small.num_hidden_layers <= 4
    assert (
        small.num_attention_heads * config.num_key_value_heads == config.num_attention_heads * small.num_key_value_heads
    )
    for counted in ("num_attention_heads", "num_key_value_heads", "vocab_size"):
        assert (getattr(small, counted) % ranks == 0) == (getattr(config, counted) % ranks == 0)
    if config.num_key_value_heads <= ranks:
        assert small.num_key_value_heads == config.num_key_value_heads  # as many copies
    assert small.hidden_size <= 1024 and small.intermediate_size == 16 * ranks
