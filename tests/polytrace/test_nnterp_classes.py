"""Every class that nnterp names has every standard name, by structure alone; no nnterp is needed here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM, BloomModel
from width import keeping

import polytrace
from bench.families.configurations import tiny_config, tiny_model
from bench.families.page import NNTERP
from polytrace.standard import MODULES, VALUES

PROMPTS = [[7, 3, 5, 9, 11], [7, 3, 4]]


ELSEWHERE = (  # test_standard has them, or one that is like them
    *("GPT2LMHeadModel", "Gemma2ForCausalLM", "Gemma3ForCausalLM", "GptOssForCausalLM", "LlamaForCausalLM"),
    *("GemmaForCausalLM", "MistralForCausalLM", "Phi3ForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"),
    *("Qwen3MoeForCausalLM", "SeedOssForCausalLM", "SmolLM3ForCausalLM"),
)


@pytest.mark.parametrize("name", keeping(NNTERP, lambda name: name not in ELSEWHERE))
def test_every_standard_name_is_there(name: str, tmp_path: Path) -> None:
    plain = tiny_model(name, tiny_config(name))
    plain.save_pretrained(tmp_path)
    text = plain.config.get_text_config(decoder=True)
    model = polytrace.load(str(tmp_path), threads=1)
    assert list(model.standard) == ["layers", "embed_tokens", "ln_final", "lm_head"]
    assert not [told for values in VALUES for told in getattr(model, values).refusals() if told is not None]
    for modules in MODULES:
        refusals = [told for told in getattr(model, modules).refusals() if told is not None]
        assert bool(refusals) == (name == "OPTForCausalLM" and modules == "mlps")
    heads = getattr(text, "num_attention_heads", None) or text.n_heads
    facts = (model.num_layers, model.num_heads, model.hidden_size, model.vocab_size)
    assert facts == (text.num_hidden_layers, heads, text.hidden_size, text.vocab_size)
    with model.trace(PROMPTS):
        values = {name: [one.save() for one in getattr(model, name)] for name in VALUES}
        embeddings, logits = model.token_embeddings.save(), model.logits.save()
        shares, mask, ids = model.next_token_probs.save(), model.attention_mask.save(), model.input_ids.save()
        projected = model.project_on_vocab(model.layers_output[-1]).save()
    for values_name, found in values.items():
        tail = (heads, 5, 5) if values_name == "attention_probabilities" else (5, model.hidden_size)
        assert {tuple(one.shape) for one in found} == {(2, *tail)} and len(found) == model.num_layers, values_name
    assert embeddings.shape == (2, 5, model.hidden_size) and mask.tolist() == [[1] * 5, [0, 0, 1, 1, 1]]
    assert ids.tolist() == [PROMPTS[0], [0, 0, *PROMPTS[1]]]
    assert logits.shape == projected.shape == (2, 5, model.vocab_size)
    assert torch.allclose(shares.sum(-1), torch.ones(2), atol=1e-5)
    with torch.no_grad():
        expected = plain(torch.tensor(PROMPTS[:1]), use_cache=False).logits[0]
    assert (logits[0] - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))


def test_weights_of_a_body_alone_are_served_with_its_tied_head(tmp_path: Path) -> None:
    """What nnterp calls BloomModel: weights without the causal language model around them."""
    torch.manual_seed(0)
    body = BloomModel(BloomConfig(vocab_size=96, hidden_size=32, n_layer=2, n_head=4)).eval()
    body.save_pretrained(tmp_path)
    model = polytrace.load(str(tmp_path), threads=1)
    assert len(model.standard) == 4 and model.num_layers == 2
    plain = BloomForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with model.trace(PROMPTS[:1]):
        logits = model.logits.save()
    with torch.no_grad():
        expected = plain(torch.tensor(PROMPTS[:1]), use_cache=False).logits
    assert (logits - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))
