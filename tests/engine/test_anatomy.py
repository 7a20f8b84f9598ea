"""What a tiny twin tells of families beside those that others serve here: nothing of it goes by names."""

from __future__ import annotations

from typing import Any

import pytest
import transformers

from engine.anatomy import find_anatomy
from engine.parts import Block, Parts

FUSED = ("q", "k", "v")


def _parts(name: str, **sizes: Any) -> Parts:
    (parts,) = find_anatomy(getattr(transformers, f"{name}Config")(**sizes), "model.layers").kinds.values()
    return parts


def test_what_is_done_to_attention_before_it_is_added_is_found() -> None:
    granite = _parts("Granite", num_hidden_layers=2, residual_multiplier=0.22)
    assert granite.mid == "post_attention_layernorm" and granite.norm_behind is None
    assert granite.scale == pytest.approx(0.22, rel=1e-4)
    olmo = _parts("Olmo2", num_hidden_layers=2)
    assert (olmo.mid, olmo.norm_behind, olmo.roles["q"].module) == (
        "mlp",
        "post_attention_layernorm",
        "self_attn.q_proj",
    )


def test_halves_of_fused_matrices_are_told_apart() -> None:
    glm = _parts("Glm", num_hidden_layers=2)
    assert glm.roles["gate"].order == glm.roles["up"].order == ("gate", "up")
    phi3 = _parts("Phi3", num_hidden_layers=2, pad_token_id=0)
    assert {role: phi3.roles[role].order for role in FUSED} == dict.fromkeys(FUSED, FUSED)
    assert not any(phi3.roles[role].is_interleaved for role in FUSED)


def test_what_the_numbers_do_not_bear_out_has_no_name() -> None:
    bitnet = _parts("BitNet", num_hidden_layers=2)  # norms before both projections back
    assert bitnet.out is bitnet.act is bitnet.down is None and bitnet.roles["v"].module == "self_attn.v_proj"
    cohere = _parts("Cohere", num_hidden_layers=2)
    assert cohere.mid is None and "side by side" in cohere.why_no_mid
    (mamba,) = find_anatomy(transformers.MambaConfig(num_hidden_layers=2), "backbone.layers").kinds.values()
    assert mamba.attention is None and mamba.roles == {}  # no heads


def test_attention_and_mlp_are_the_modules_with_all_their_parts() -> None:
    granite = _parts("Granite", num_hidden_layers=2, residual_multiplier=0.22)
    for block in (granite.attention_block, granite.mlp_block):
        assert block is not None and block.note is not None and "adds 0.22 times it" in block.note
        assert block.added is None
    olmo, bitnet = _parts("Olmo2", num_hidden_layers=2), _parts("BitNet", num_hidden_layers=2)
    assert olmo.mlp_block is not None and str(olmo.mlp_block.note).startswith("before post_feedforward_layernorm")
    assert bitnet.mlp_block == Block(module="mlp", taken="mlp", given="mlp", added="mlp")  # its activation is no module
    experts = list(find_anatomy(transformers.DeepseekV3Config(num_hidden_layers=4), "model.layers").kinds.values())
    assert len(experts) == 2 and {parts.mlp_block for parts in experts} == {bitnet.mlp_block}  # shared ones are inside


def test_what_has_the_residual_in_it_or_no_module_around_it_is_told() -> None:
    layers = "roberta_prelayernorm.encoder.layer"
    config = transformers.RobertaPreLayerNormConfig(num_hidden_layers=2, is_decoder=True)
    (roberta,) = find_anatomy(config, layers).kinds.values()
    attention, mlp = roberta.attention_block, roberta.mlp_block
    assert attention is not None and attention.module == "attention"
    assert attention.given == attention.added == "attention.output.dense"
    assert attention.note == "attention.output.dense.output: what attention gives has the residual in it"
    assert mlp == Block(module="", taken="intermediate.dense", given="output.dense", added="output.dense")
    shared = _parts("GraniteMoeShared", num_hidden_layers=2, shared_intermediate_size=64)
    assert shared.mlp_block == Block(module="", taken=None, given=None)
