"""Configurations made tiny: what models of them insist on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import BartConfig, BartForCausalLM, FalconH1Config, Gemma4TextConfig, HeliumConfig, Mamba2Config
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from engine.shrinking import shrink


def _run(config: Any) -> Any:
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    model = kind._from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        assert model(input_ids=torch.tensor([[3, 7, 5]]), use_cache=False).logits.isfinite().all()
    return model


@pytest.mark.parametrize("ranks", [1, 2])
def test_layers_with_numbers_of_their_own_keep_their_ratio(ranks: int) -> None:
    config = Gemma4TextConfig()
    shrink(config, ranks)
    sizes = {kind: config.per_layer_config[kind].head_dim for kind in set(config.layer_types)}
    assert sizes["full_attention"] == 2 * sizes["sliding_attention"]
    _run(config)


def test_heads_that_fill_the_residual_still_do() -> None:
    config = HeliumConfig()
    assert config.head_dim * config.num_attention_heads == config.hidden_size
    shrink(config, 1)
    assert config.head_dim * config.num_attention_heads == config.hidden_size
    _run(config)


def test_states_follow_the_width() -> None:
    config = Mamba2Config()
    shrink(config, 1)
    assert config.num_heads * config.head_dim == config.expand * config.hidden_size
    _run(config)


def test_states_beside_attention_follow_the_width() -> None:
    """As in Falcon-H1-34B, where they are twice as wide as the residual."""
    config = FalconH1Config(mamba_d_ssm=8192, mamba_n_heads=32, mamba_d_head=256)
    shrink(config, 1)
    assert config.mamba_n_heads * config.mamba_d_head == config.mamba_d_ssm == 2 * config.hidden_size
    _run(config)


def test_a_decoder_that_is_told_with_its_encoder_is_tiny() -> None:
    config = BartConfig()
    shrink(config, 1)
    model = BartForCausalLM(config)
    assert sum(parameter.numel() for parameter in model.parameters()) < 1_000_000
    _run(config)
