"""Probing and the gate on real families: what is found, what is refused and why."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, Lfm2Config, LlamaConfig, PreTrainedConfig

from engine.links import Solo
from engine.loading import ShardConfig
from engine.shard import Shard
from polytrace.description import ModelDescription, Rows, index_sites
from polytrace.errors import ServiceError
from polytrace.graph import Port, Site

SIZES = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
FAMILIES: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SIZES, **HEADS),
    "gpt2": GPT2Config(vocab_size=96, n_embd=32, n_layer=3, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0),
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
    assert [info.order for info in description.sites] == list(range(len(description.sites)))


def test_convolutions_that_mix_neighbours_are_caught(tmp_path: Path) -> None:
    layers = ["conv", "full_attention", "conv"]
    config = Lfm2Config(**SIZES, **HEADS, layer_types=layers)
    with pytest.raises(ServiceError, match="depend on the neighbours"):
        described(config, tmp_path)


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
