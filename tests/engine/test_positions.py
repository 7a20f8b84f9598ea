"""Models that number tokens themselves, merged, against plain Hugging Face."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small import close, loaded, logits_of
from transformers import BartConfig, BartForCausalLM, RobertaConfig, RobertaForCausalLM

from engine.positions import first_position, numbered_modules

_PROMPTS = ([3, 17, 42, 5, 9, 30, 11], [8, 25, 13, 60])


def _bart() -> Any:
    """Its root forward takes no positions."""
    sizes: dict[str, Any] = {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48}
    config = BartConfig(**sizes, encoder_layers=2, vocab_size=64, max_position_embeddings=40, init_std=0.3)
    return BartForCausalLM(config).eval()


def _roberta() -> Any:
    """It counts from behind its padding's index where it is given no positions."""
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    more: dict[str, Any] = {"intermediate_size": 48, "vocab_size": 64, "max_position_embeddings": 40}
    return RobertaForCausalLM(RobertaConfig(**sizes, **more, is_decoder=True, initializer_range=0.3)).eval()


@pytest.mark.parametrize(("make", "first"), [(_bart, 0), (_roberta, 2)])
def test_merged_prompts_have_the_positions_that_they_have_alone(make: Any, first: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = make()
    assert [one.first for one in numbered_modules(plain)] == [first]
    with loaded(plain, tmp_path) as model:
        assert model.backend.describe().limits.max_sequence_tokens == 40 - first_position(plain)
        with model.trace() as tracer:
            logits = []
            for ids in _PROMPTS:
                with tracer.invoke(ids):
                    logits.append(model.output.logits.save())
        with model.trace(_PROMPTS[1]):
            alone = model.output.logits.save()
    for ids, ours in zip(_PROMPTS, logits, strict=True):
        close(ours, logits_of(plain, ids))
    assert torch.equal(alone, logits[1])


def test_a_model_that_is_told_positions_is_left_alone() -> None:
    from small import small_gpt2, small_llama

    assert numbered_modules(small_llama()) == numbered_modules(small_gpt2()) == []
