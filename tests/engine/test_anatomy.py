"""What a tiny twin tells of families beside those that others serve here: nothing of it goes by names."""

from __future__ import annotations

from typing import Any

import pytest
import transformers

from engine.anatomy import Parts, find_anatomy

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
