"""Whole layers of families that cannot be packed: left out, counted in receipts, and how many heads they have."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from padded_families import model_from, model_of
from torch import Tensor
from transformers import FalconConfig

from engine.local import LocalBackend
from polytrace.errors import GraphError
from polytrace.model import Model

FLOAT32_TOLERANCE = 1e-5  # of max(1, max|plain|)
PROMPTS = [[3, 14, 15, 92, 65], [35, 89, 79]]
SIZES: dict[str, Any] = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
IDS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def served(plain: Any, folder: Path) -> Any:
    torch.set_num_threads(1)
    plain.save_pretrained(folder)
    return Model(LocalBackend(str(folder), threads=1))


@pytest.fixture(scope="module")
def bloom(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    plain = model_of("bloom")
    return plain, served(plain, tmp_path_factory.mktemp("bloom"))


def test_layers_that_give_tuples_are_skipped_by_their_hidden_states(bloom: tuple[Any, Any]) -> None:
    plain, model = bloom
    with model.trace(PROMPTS):
        model.skip_layers(1, 2)
        logits = model.logits.save()
    with model.trace(PROMPTS):
        unchanged = model.logits.save()
    for row, prompt in enumerate(PROMPTS):
        kept: dict[str, Tensor] = {}
        layers = plain.transformer.h
        hooks = [
            layers[1].register_forward_pre_hook(lambda m, args, kept=kept: kept.update(hidden=args[0].clone())),
            layers[2].register_forward_hook(lambda m, args, out, kept=kept: (kept["hidden"], *out[1:])),
        ]
        with torch.no_grad():
            expected = plain(input_ids=torch.tensor([prompt]), use_cache=False).logits[0]
        for hook in hooks:
            hook.remove()
        scale = max(1.0, float(expected.abs().max()))
        ours, before = logits[row, -len(prompt) :], unchanged[row, -len(prompt) :]
        assert float((ours - expected).abs().max()) <= FLOAT32_TOLERANCE * scale
        assert float((before - expected).abs().max()) > 0.1


def test_receipts_and_certificates_count_the_layers_that_ran(bloom: tuple[Any, Any]) -> None:
    _, model = bloom
    with model.trace(PROMPTS, run=False) as asked:
        model.layers_output[1].save()
    ran: Counter[int] = Counter()
    layers = model.backend.shards.shard.runner.model.transformer.h
    hooks = [
        layer.register_forward_pre_hook(lambda m, args, number=number: ran.update({number: args[0].shape[1]}))
        for number, layer in enumerate(layers)
    ]
    with model.trace(PROMPTS) as tracer:
        model.layers_output[1].save()
    for hook in hooks:
        hook.remove()
    tokens = sum(map(len, PROMPTS))
    assert ran == {0: tokens, 1: tokens}
    assert tracer.receipt.token_layers == tracer.receipt.token_layers_alone == ran.total()
    assert tracer.receipt.passes[0].layer_rows == (tokens, tokens, 0, 0)
    assert model.validate(asked).token_layers == ran.total()


@pytest.mark.parametrize(
    ("how", "groups"),
    [
        ({"multi_query": True}, 1),
        ({"new_decoder_architecture": True, "num_kv_heads": 2}, 2),
        ({"multi_query": False, "parallel_attn": False, "alibi": True}, 4),
        ({"multi_query": True, "alibi": True}, 1),
    ],
)
def test_key_value_heads_are_those_that_attention_has(how: dict[str, Any], groups: int, tmp_path: Path) -> None:
    """Falcon's configuration counts them in its own way, and not at all for one that all queries share."""
    plain = model_from(FalconConfig(**SIZES, **IDS, **how))
    model = served(plain, tmp_path)
    assert (model.num_heads, model.num_kv_heads, model.head_dim) == (4, groups, 8)
    if "alibi" not in how:
        with model.trace([1, 2]):
            keys = model.layers[0].k.save()
        assert keys.shape == (1, 2, groups, 8)


def test_attention_by_a_fused_kernel_has_a_module_and_says_why_it_has_no_pattern(tmp_path: Path) -> None:
    plain = model_of("falcon_alibi")
    model = served(plain, tmp_path)
    prompt, seen = PROMPTS[0], {}

    def hook(module: Any, args: Any, output: Any) -> Any:
        seen["given"] = output[0].clone()
        return (output[0] * -2.0, *output[1:])

    handle = plain.transformer.h[1].self_attention.register_forward_hook(hook)
    with torch.no_grad():
        expected = plain(input_ids=torch.tensor([prompt]), use_cache=False).logits
        handle.remove()
        unchanged = plain(input_ids=torch.tensor([prompt]), use_cache=False).logits
    with model.trace(prompt):
        given = model.attentions_output[1].clone().save()
        model.attentions_output[1] *= -2.0
        logits = model.logits.save()
    assert model.attentions[1]._path == "transformer.h.1.self_attention"
    assert float((given - seen["given"]).abs().max()) <= FLOAT32_TOLERANCE * max(1.0, float(given.abs().max()))
    assert float((logits - expected).abs().max()) <= FLOAT32_TOLERANCE * max(1.0, float(expected.abs().max()))
    assert float((unchanged - expected).abs().max()) > 0.1
    with (
        pytest.raises(GraphError, match="no pattern: this family attends by torch's fused attention"),
        model.trace(prompt),
    ):
        _ = model.attention_probabilities[1]
    assert not model.attn_probs_available


def test_tokens_without_a_tokenizer_have_no_texts(bloom: tuple[Any, Any]) -> None:
    _, model = bloom
    with pytest.raises(GraphError, match="came without a tokenizer"):
        model.get_topk_closest_tokens(torch.ones(32))
