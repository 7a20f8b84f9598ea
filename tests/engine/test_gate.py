"""Probing and the gate on real families: what is found, what is refused and why."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BambaConfig,
    FalconH1Config,
    Gemma2Config,
    Gemma3nTextConfig,
    Gemma4TextConfig,
    GPT2Config,
    Lfm2Config,
    LlamaConfig,
    PreTrainedConfig,
    Qwen3MoeConfig,
    Qwen3NextConfig,
    RecurrentGemmaConfig,
)
from width import keeping

from engine.links import Solo
from engine.loading import ShardConfig
from engine.local import LocalBackend
from engine.shard import Shard
from polytrace.description import ModelDescription, PassLayout, Rows, index_sites
from polytrace.errors import ServiceError
from polytrace.graph import Port, Site
from polytrace.model import Model

SIZES = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
MIXTURE: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
STATES: dict[str, Any] = {"mamba_n_heads": 4, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 8}
GPT2: dict[str, Any] = {"vocab_size": 96, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64} | {
    "bos_token_id": 0,
    "eos_token_id": 0,
}
PROMPT = list(range(3, 20))
FAMILIES: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SIZES, **HEADS),
    "gpt2": GPT2Config(**GPT2),
    "gemma2": Gemma2Config(**SIZES, **HEADS, head_dim=8, sliding_window=5),
}


def save(config: PreTrainedConfig, folder: Path) -> str:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return str(folder)


def described(config: PreTrainedConfig, folder: Path) -> ModelDescription:
    shard = Shard(ShardConfig(source=save(config, folder), threads=1), Solo())
    shard.start(lambda line: None)
    return shard.describe("tiny", [shard.gate()])


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_families_pass_the_gate_at_every_site(family: str, tmp_path: Path) -> None:
    description = described(FAMILIES[family], tmp_path)
    assert description.notes == ()
    assert all(leaf.read_refusal is None for info in description.sites for leaf in info.leaves)
    orders = [info.order for info in description.sites]
    assert orders == sorted(set(orders))


MIXING: dict[str, PreTrainedConfig] = {
    "conv": Lfm2Config(**SIZES, **HEADS, layer_types=["conv", "full_attention", "conv"]),
    "linear_attn": Qwen3NextConfig(
        **SIZES,
        **HEADS,
        **MIXTURE,
        head_dim=8,
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        shared_expert_intermediate_size=16,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
    ),
    "mamba": FalconH1Config(**SIZES, **HEADS, **STATES, mamba_d_ssm=32, mamba_d_head=8),
    "mamba beside attention": BambaConfig(**SIZES, **HEADS, **STATES, mamba_d_head=16, attn_layer_indices=[1]),
    "temporal_block": RecurrentGemmaConfig(
        **SIZES, num_attention_heads=4, num_key_value_heads=1, head_dim=8, attention_window_size=16, lru_width=32
    ),
}


@pytest.mark.parametrize("kind", keeping(MIXING, lambda kind: kind not in ("conv", "mamba beside attention")))
def test_layers_that_mix_neighbours_are_caught_and_named(kind: str, tmp_path: Path) -> None:
    """Then each prompt runs alone, and the description says why."""
    place = kind.split()[0]
    mixes = rf"depend on the neighbours.*begins at model\.layers\.0\.{place}\.output"
    loops = rf"model\.layers\.0\.{place}\.\S* loops over tokens"
    description = described(MIXING[kind], tmp_path)
    assert description.layout is PassLayout.PADDED
    assert re.search(f"{mixes}|{loops}", description.notes[0])


def test_hidden_states_of_several_streams_are_refused_with_their_shape(tmp_path: Path) -> None:
    config = Gemma3nTextConfig(
        **SIZES,
        **HEADS,
        head_dim=8,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=96,
        num_kv_shared_layers=1,
        laurel_rank=4,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        activation_sparsity_pattern=None,
    )
    with pytest.raises(ServiceError, match=r"layers\.0\.input is of shape \[4, 1, "):
        described(config, tmp_path)


def test_where_layers_use_keys_and_values_of_earlier_ones_no_rows_are_shared(tmp_path: Path) -> None:
    config = Gemma4TextConfig(
        **SIZES | {"num_hidden_layers": 6},
        **HEADS,
        pad_token_id=0,
        head_dim=8,
        global_head_dim=8,
        sliding_window=5,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=96,
        num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 3,
    )
    backend = LocalBackend(save(config, tmp_path), threads=1)
    assert not backend.description.has_forks
    assert "hand values to later layers" in backend.description.notes[0]
    model = Model(backend)
    saved = []
    with model.trace() as tracer:
        for layer in range(6):
            with tracer.invoke(PROMPT):
                model.model.layers[layer].output[0][:, 9] = 0.5
                saved.append(model.output.logits[:, -1].save())
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    for layer, ours in enumerate(saved):
        handle = plain.model.layers[layer].register_forward_hook(_fill)
        with torch.no_grad():
            theirs = plain(torch.tensor([PROMPT]), use_cache=False).logits[:, -1]
        handle.remove()
        assert (ours - theirs).abs().max() <= 1e-5


def test_a_padding_token_in_the_configuration_does_not_stop_the_probe(tmp_path: Path) -> None:
    assert described(GPT2Config(**GPT2, pad_token_id=0), tmp_path).notes == ()


def test_sites_inside_experts_are_refused_by_name_and_those_around_them_are_not(tmp_path: Path) -> None:
    config = Qwen3MoeConfig(**SIZES, **HEADS, **MIXTURE, head_dim=8)
    sites = index_sites(described(config, tmp_path))
    inside = sites[Site(module="model.layers.1.mlp.experts.act_fn", port=Port.OUTPUT)]
    assert inside[1].read_refusal == "its rows are sorted by expert, not by token"
    around = sites[Site(module="model.layers.1.mlp", port=Port.OUTPUT)]
    assert around[1].read_refusal is around[1].write_refusal is None


def test_sites_have_the_shapes_that_hooks_see(tmp_path: Path) -> None:
    description = described(FAMILIES["llama"], tmp_path)
    sites = index_sites(description)
    hidden = sites[Site(module="model.layers.1", port=Port.OUTPUT)]
    assert (hidden[1].tail, hidden[0].rows) == ((32,), Rows.ALL)
    logits = sites[Site(module="", port=Port.OUTPUT, selector=("logits",))]
    assert (logits[1].tail, logits[0].rows) == ((96,), Rows.KEPT)
    neurons = sites[Site(module="model.layers.2.mlp.down_proj", port=Port.INPUT)]
    assert neurons[1].tail == (64,)
    attended = sites[Site(module="model.layers.0.self_attn", port=Port.OUTPUT, selector=(0,))]
    assert attended[1].tail == (32,)


def test_calls_that_need_a_pass_are_refused_with_the_reason(tmp_path: Path) -> None:
    modules = {module.path: module for module in described(FAMILIES["llama"], tmp_path).modules}
    assert modules["lm_head"].call_refusal is None
    assert modules["model.norm"].call_refusal is None
    assert "attends" in str(modules["model.layers.0"].call_refusal)
    assert "list" in str(modules["model.layers"].call_refusal)


def test_tied_weights_are_known_by_each_of_their_names(tmp_path: Path) -> None:
    parameters = {info.path: info for info in described(FAMILIES["gpt2"], tmp_path).parameters}
    assert parameters["lm_head.weight"].shape == parameters["transformer.wte.weight"].shape == (96, 32)


def _fill(_module: Any, _args: Any, hidden: torch.Tensor) -> None:
    hidden[:, 9] = 0.5
