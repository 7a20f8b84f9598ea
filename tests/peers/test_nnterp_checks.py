"""What nnterp's own tests check, checked of polytrace; each test has the name of nnterp's and needs no nnterp.

nnterp's tests run on models of the Hugging Face hub, so these are the same checks on tiny ones: a packed model
(Llama), one with fused projections (GPT-2), one whose layers return tuples and that is padded (BLOOM), a mixture
(Mixtral). Not here: its checks of gradients, which traces do not have.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from peers.nnterp_models import make

import polytrace
from polytrace import methods
from polytrace.errors import GraphError

PROMPT = "the king sat on the mat"
PAIR = ["the queen saw on", "the dog sat near the hat on the mat"]  # of different lengths
NATIVE = {
    "LlamaForCausalLM": ("model.layers", "self_attn", "model.norm"),
    "GPT2LMHeadModel": ("transformer.h", "attn", "transformer.ln_f"),
    "BloomForCausalLM": ("transformer.h", "self_attention", "transformer.ln_f"),
    "MixtralForCausalLM": ("model.layers", "self_attn", "model.norm"),
}


@pytest.fixture(scope="module", params=NATIVE)
def kind(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(scope="module")
def model(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("model")
    make(kind, folder)
    return polytrace.load(str(folder), threads=1)


def logits_of(model: Any, prompt: Any, edit: Any = None) -> Any:
    with model.trace(prompt):
        if edit is not None:
            edit()
        return model.logits.save()


def vector(model: Any) -> Any:
    return torch.randn(model.hidden_size, generator=torch.Generator().manual_seed(0))


def differ(one: Any, other: Any) -> bool:
    return not torch.allclose(one, other, atol=1e-4)


def test_model_renaming_activations_diff(kind: str, model: Any) -> None:
    layers, _, norm = NATIVE[kind]
    with model.trace(PROMPT):
        ours = [*(value.save() for value in model.layers_output), model.ln_final.output.save(), model.logits.save()]
        native = [layer.output[0].save() for layer in model.get_submodule(layers)]
        native += [model.get_submodule(norm).output.save(), model.output.logits.save()]
    assert len(ours) == len(native) == model.num_layers + 2
    assert all(torch.equal(one, other) for one, other in zip(ours, native, strict=True))


def test_renaming_forward_and_modules(kind: str, model: Any) -> None:
    _, attention, norm = NATIVE[kind]
    assert model.model.layers[0].self_attn == model.attentions[0] == getattr(model.layers[0], attention)
    assert model.model.layers[0].mlp == model.mlps[0]
    assert model.ln_final == model.get_submodule(norm) and model.lm_head._path == "lm_head"
    with pytest.raises(AttributeError):
        _ = model.layers[0].nonexistent_attn


def test_standardized_transformer_methods(model: Any) -> None:
    with model.trace(PROMPT):
        taken, attention, mlp, given = (
            values[0].save()
            for values in (model.layers_input, model.attentions_output, model.mlps_output, model.layers_output)
        )
        direct = model.model.layers[0].input.save()
        embeddings, same = model.token_embeddings.save(), model.embed_tokens.output.save()
        attention_taken, attention_direct = model.attentions_input[0].save(), model.attentions[0].input.save()
        mlp_taken, mlp_direct = model.mlps_input[0].save(), model.mlps[0].input.save()
        shares, projected, logits = (
            value.save() for value in (model.next_token_probs, model.project_on_vocab(given), model.logits)
        )
        size = model.input_size
    assert torch.equal(taken, direct) and torch.equal(embeddings, same)
    assert torch.equal(attention_taken, attention_direct) and torch.equal(mlp_taken, mlp_direct)
    assert taken.shape == attention.shape == mlp.shape == given.shape == (*size, model.hidden_size)
    assert projected.shape == logits.shape == (*size, model.vocab_size) and shares.shape == (1, model.vocab_size)


def test_standardized_transformer_steer_method(model: Any) -> None:
    bare, added = logits_of(model, PROMPT), 0.5 * vector(model)
    for chosen in (
        {"layers": 0},
        {"layers": [0, 1], "factor": 0.5},
        {"layers": 0, "positions": 0},
        {"layers": 0, "token_positions": 0},
        {"layers": 0, "token_positions": [0, 1]},
    ):
        assert differ(
            bare, logits_of(model, PROMPT, lambda chosen=chosen: model.steer(steering_vector=added, **chosen))
        )
    with pytest.raises(GraphError, match="are one thing"):
        logits_of(model, PROMPT, lambda: model.steer(0, added, positions=0, token_positions=0))


def test_steer_batch_index(model: Any) -> None:
    bare, added = logits_of(model, PAIR), 0.5 * vector(model)
    for chosen in (0, 1):
        for more in ({}, {"token_positions": 0}):
            steered = logits_of(model, PAIR, lambda c=chosen, m=more: model.steer(0, added, batch_index=c, **m))
            assert differ(bare[chosen], steered[chosen]) and torch.equal(bare[1 - chosen], steered[1 - chosen])


def test_standardized_transformer_skip_methods(model: Any) -> None:
    bare = logits_of(model, PROMPT)
    assert differ(bare, logits_of(model, PROMPT, lambda: model.skip_layer(0)))
    assert differ(bare, logits_of(model, PROMPT, lambda: model.skip_layers(0, 1)))
    assert differ(bare, logits_of(model, PROMPT, lambda: model.skip_layer(1, skip_with=model.layers_input[0])))


def test_standardized_transformer_properties(model: Any) -> None:
    with model.trace(PAIR):
        shares, logits = model.next_token_probs.save(), model.logits.save()
    assert shares.shape == (logits.shape[0], logits.shape[-1]) == (2, model.vocab_size)
    assert torch.allclose(shares.sum(-1), torch.ones(2), atol=1e-5)


def test_standardized_transformer_cache(model: Any) -> None:
    """nnterp skips this one: names of its own do not reach nnsight's cache."""
    with model.trace(PROMPT) as tracer:
        cache = tracer.cache(modules=[model.layers[number] for number in range(0, model.num_layers, 2)])
        expected = model.layers_output[0].save()
    found = cache[model.layers[0]._path].output
    assert torch.equal(found[0] if isinstance(found, tuple) else found, expected)


def test_access_attn_probabilities(model: Any) -> None:
    with model.trace(PAIR) as tracer:
        shares, logits, lengths = model.attention_probabilities[0].save(), model.logits.save(), tracer.lengths
    assert shares.shape == (2, model.num_heads, logits.shape[1], logits.shape[1])
    for own, length in zip(shares, lengths, strict=True):
        sums = own[:, -length:].sum(-1)
        assert torch.allclose(sums, torch.ones_like(sums), atol=1e-5) and not own[:, :-length].any()


def test_edit_attn_probabilities(model: Any) -> None:
    def knock_out() -> None:
        for shares in model.attention_probabilities:
            shares[:, :, 1:, 1] += shares[:, :, 1:, 0]  # the first query has no other key
            shares[:, :, 1:, 0] = 0

    assert differ(logits_of(model, PROMPT), logits_of(model, PROMPT, knock_out))


def test_activation_collection(model: Any, tmp_path: Any) -> None:
    prompts = [PROMPT, PAIR[0]] * 2
    with model.trace(prompts):
        acts = torch.stack([hidden[:, -1] for hidden in model.layers_output]).save()
        shares = model.next_token_probs.save()
    kept = methods.collect_activations(model, prompts, to=tmp_path / "kept", positions=-1)
    batched = torch.stack([kept.array(f"resid_post.{layer}") for layer in range(model.num_layers)])
    assert acts.shape == (model.num_layers, 4, model.hidden_size) and torch.equal(acts, batched)
    assert shares.shape == (4, model.vocab_size)


def test_logit_lens_and_patchscope_lens(model: Any) -> None:
    every = range(model.vocab_size)
    for prompts in (PAIR, PROMPT):
        lens = methods.logit_lens(model, prompts, tokens=every).probability
        assert lens.shape == (2 if prompts is PAIR else 1, model.num_layers, 1, model.vocab_size)
        assert np.allclose(lens.sum("token"), 1, atol=1e-4)
    for target, layers in ((methods.repeat_target(), None), (methods.Target(prompt="the cat ?"), [0, -1])):
        scope = methods.patchscope(model, PAIR, target, layers, tokens=every).probability
        assert scope.shape == (2, model.num_layers, 1, model.vocab_size)
        assert np.allclose(scope.sum("token"), 1, atol=1e-4)


def test_patchscope_lens_with_latents_and_generation(model: Any) -> None:
    target, every = methods.Target(prompt="the cat sat", position=-1), range(model.vocab_size)
    with model.trace(PROMPT):
        latents = torch.stack([hidden[:, -1] for hidden in model.layers_output]).save()
    own = methods.patchscope(model, PROMPT, target, tokens=every).probability
    given = methods.patchscope(
        model, PAIR[0], target, tokens=every, mapping=lambda _state, layer, _goal: latents[layer]
    ).probability
    assert np.array_equal(own.values, given.values)
    said = methods.patchscope(model, PROMPT, target, [0, 1], generate=3)
    assert said.text.shape == (1, 2, 1) and len(said.receipts) <= 3


def test_patch_object_attn_lens(model: Any) -> None:
    found = methods.object_attention_lens(model, PAIR[:1], [PROMPT], 0, window=1, tokens=range(model.vocab_size))
    assert found.probability.shape == (1, model.num_layers, model.vocab_size)


def test_prompts_and_their_targets(model: Any) -> None:
    assert len(methods.target_tokens(model, ["king", "dog"])) >= 2
    sets = methods.target_sets(model, {"greeting": "cat", "point": ".", "again": "cat"}, may_collide=True)
    assert methods.collisions(sets) and not methods.collisions({name: sets[name] for name in ("point", "again")})
    asked = [
        methods.Prompt(text=text, answers={"animal": "dog", "person": ["king", "queen"]}) for text in (PROMPT, *PAIR)
    ]
    plain, lens = methods.run_battery(model, asked).probability, methods.run_battery(model, asked, lens="logit")
    assert plain.shape == (3, 2) and list(plain.target.values) == ["animal", "person"]
    assert lens.probability.shape == (3, model.num_layers, 2)
    assert np.allclose(lens.probability.isel(layer=-1), plain, atol=1e-5)
