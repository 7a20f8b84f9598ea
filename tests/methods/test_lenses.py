"""Lenses against plain Hugging Face and hooks: the same tokens, logits and ranks, and only these leave the model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES
from torch import Tensor
from transformers import AutoModelForCausalLM, CohereConfig, GraniteConfig, PreTrainedModel

import polytrace
from bench.tinyworld import FOLDER
from polytrace.errors import GraphError
from polytrace.methods import logit_lens, prepare_unembedding, token_directions, unembed
from polytrace.methods.unembedding import final_norm

TOLERANCE = 1e-5  # of max(1, max|plain|), float32
PROMPTS = [[5, 17, 42, 5, 9, 30, 11], [8, 25, 1, 60], [3, 9]]
TOWER = "The Eiffel Tower is in the city of"


def by_hand(plain: PreTrainedModel, family: str, prompt: list[int], part: str = "output") -> Tensor:
    """Logits `[layers, tokens, vocabulary]` of each layer's output or input, with hooks and the model's own modules."""
    seen: list[Tensor] = []
    layers = plain.get_submodule(FAMILIES[family].layers)
    for layer in layers:  # type: ignore[attr-defined]
        if part == "output":
            layer.register_forward_hook(lambda m, a, out: seen.append(out if isinstance(out, Tensor) else out[0]))
        else:
            layer.register_forward_pre_hook(
                lambda m, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
            )
    with torch.no_grad():
        plain(input_ids=torch.tensor([prompt]), use_cache=False)
        logits: Tensor = plain.lm_head(plain.get_submodule(FAMILIES[family].norm)(torch.cat(seen)))
    for layer in layers:  # type: ignore[attr-defined]
        layer._forward_hooks.clear()
        layer._forward_pre_hooks.clear()
        layer._forward_pre_hooks_with_kwargs.clear()
    cap = getattr(plain.config, "final_logit_softcapping", None)
    return torch.tanh(logits / cap) * cap if cap else logits


def close(ours: Any, theirs: Any) -> None:
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= TOLERANCE * max(1.0, np.abs(theirs).max())


@pytest.mark.parametrize("part", ["output", "input"])
def test_the_most_likely_tokens_of_all_layers_and_positions_are_those_of_hooks(pair: Any, part: str) -> None:
    family, plain, model = pair
    of = {"output": "resid_post", "input": "resid_pre"}[part]
    read: Any = logit_lens(model, PROMPTS, positions=None, top_k=3, of=of)
    assert read.logit.dims == ("prompt", "layer", "position", "rank") and read.logit.shape == (3, 4, 7, 3)
    for number, prompt in enumerate(PROMPTS):
        logits = by_hand(plain, family, prompt, part)
        places = slice(7 - len(prompt), None)
        values, tokens = logits.topk(3)
        own = read.logit.isel(prompt=number, position=places)
        close(own, values)
        close(read.probability.isel(prompt=number, position=places), logits.softmax(-1).gather(-1, tokens))
        found = torch.from_numpy(read.token_id.isel(prompt=number, position=places).values.astype("int64"))
        close(logits.gather(-1, found), values)  # the same tokens, but for ties
        assert np.isnan(read.logit.isel(prompt=number, position=slice(0, 7 - len(prompt)))).all()
    assert (read.token_id.isel(prompt=2, position=slice(0, 5)) == -1).all()


def test_the_last_layer_says_what_the_model_says(pair: Any) -> None:
    _, plain, model = pair
    read: Any = logit_lens(model, PROMPTS[0], -1, None, tokens=list(range(96)))
    with torch.no_grad():
        own = plain(input_ids=torch.tensor([PROMPTS[0]]), use_cache=False).logits[0]
    close(read.logit.isel(prompt=0, layer=0), own)
    assert read.logit.layer.values.tolist() == [3]


def test_chosen_tokens_have_their_logits_probabilities_and_ranks(pair: Any) -> None:
    family, plain, model = pair
    read: Any = logit_lens(model, PROMPTS, slice(1, 4, 2), [0, -1], tokens=[7, 90])
    assert read.logit.layer.values.tolist() == [1, 3] and read.logit.position.values.tolist() == [0, -1]
    for number, prompt in enumerate(PROMPTS):
        logits = by_hand(plain, family, prompt)[[1, 3]][:, [0, -1]]
        close(read.logit.isel(prompt=number), logits[..., [7, 90]])
        close(read.probability.isel(prompt=number), logits.softmax(-1)[..., [7, 90]])
        order = logits.argsort(-1, descending=True)
        ranks = [[[int((row == token).nonzero()) for token in (7, 90)] for row in rows] for rows in order]
        assert read.rank.isel(prompt=number).values.tolist() == ranks


def test_a_negated_lens_reads_minus_what_the_final_norm_gives(pair: Any) -> None:
    family, plain, model = pair
    seen: list[Tensor] = []
    norm = plain.get_submodule(FAMILIES[family].norm)
    handle = norm.register_forward_hook(lambda m, a, out: seen.append(out))
    with torch.no_grad():
        plain(input_ids=torch.tensor(PROMPTS[:1]), use_cache=False)
        logits = plain.lm_head(-seen[0][0, -1])
    handle.remove()
    cap = getattr(plain.config, "final_logit_softcapping", None)
    logits = torch.tanh(logits / cap) * cap if cap else logits
    read = logit_lens(model, PROMPTS[:1], layers=-1, tokens=range(96), negated=True)
    close(read.probability.values[0, 0, 0], logits.softmax(-1))
    forward = logit_lens(model, PROMPTS[:1], layers=-1, tokens=range(96))
    assert abs(read.probability.values - forward.probability.values).max() > 1e-2


def test_a_lens_on_a_model_with_edits_sees_them(pair: Any) -> None:
    _, _, model = pair
    with model.edit() as edited:
        model.layers[1].output[0][:, -1, :8] += 5.0
    before, after = logit_lens(model, PROMPTS), logit_lens(edited, PROMPTS)
    assert np.array_equal(before.logit.sel(layer=0), after.logit.sel(layer=0))
    assert float(np.abs(before.logit.sel(layer=3) - after.logit.sel(layer=3)).max()) > 0.1


def test_the_lens_of_a_part_of_a_layer(pair: Any) -> None:
    family, plain, model = pair
    layer = plain.get_submodule(FAMILIES[family].layers)[2]  # type: ignore[index]
    seen: list[Tensor] = []
    handle = layer.mlp.register_forward_hook(lambda m, a, out: seen.append(out))
    with torch.no_grad():
        plain(input_ids=torch.tensor([PROMPTS[0]]), use_cache=False)
        logits = plain.lm_head(plain.get_submodule(FAMILIES[family].norm)(seen[0][:, -1]))
    handle.remove()
    cap = getattr(plain.config, "final_logit_softcapping", None)
    logits = torch.tanh(logits / cap) * cap if cap else logits
    read: Any = logit_lens(model, PROMPTS[0], 2, tokens=list(range(96)), of=lambda layer: layer.mlp.output)
    close(read.logit.values.ravel(), logits[0])


@pytest.mark.parametrize("kind", ["row", "pseudo_inverse"])
def test_the_lens_reads_a_tokens_direction_as_the_token(pair: Any, kind: str) -> None:
    family, plain, model = pair
    tokens = [3, 41, 90]
    found = token_directions(model, tokens, method=kind)
    norm = final_norm(model)
    weight = plain.lm_head.weight.detach().double()
    gain = norm.gain.double()
    size = len(gain)
    centring = torch.eye(size, dtype=torch.float64) - (1 / size if family == "gpt2" else 0)
    if kind == "row":
        wanted = (weight[tokens] * gain) @ centring
    else:  # by the definition: least squares over the whole vocabulary
        linear = (weight - weight.mean(0)) * gain @ centring
        wanted = torch.linalg.pinv(linear, rtol=1e-5)[:, tokens].T
    assert (found - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    with model.trace([[0]]):
        first = unembed(model, found.to(torch.float32)).argmax(-1).save()
    assert first.tolist() == tokens


def test_a_row_is_the_logits_gradient(pair: Any) -> None:
    family, plain, model = pair
    norm = plain.get_submodule(FAMILIES[family].norm)
    at = torch.randn(1, 32, generator=torch.Generator().manual_seed(3)).requires_grad_()
    (gradient,) = torch.autograd.grad(plain.lm_head(norm(at))[0, 41], at)
    row = token_directions(model, 41)[0]
    spread = (at - at.mean() if family == "gpt2" else at).detach().pow(2).mean().sqrt()
    residual = (at - at.mean() if family == "gpt2" else at).detach()[0]
    tangent = gradient[0] * spread  # the part along the residual itself is taken out by the norm
    projected = row - (row @ residual) / (residual @ residual) * residual
    assert (tangent - projected).abs().max() <= 1e-3 * row.abs().max()


@pytest.mark.parametrize("name", ["cohere", "granite"])
def test_what_a_forward_does_behind_its_head_is_found_by_measuring(name: str, tmp_path: Path) -> None:
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    makers: dict[str, Any] = {
        "cohere": (CohereConfig, {"logit_scale": 0.25}),
        "granite": (GraniteConfig, {"logits_scaling": 8.0}),
    }
    maker, more = makers[name]
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(maker(**sizes, **more, pad_token_id=0, initializer_range=0.3)).eval()
    plain.save_pretrained(tmp_path)
    with polytrace.load(str(tmp_path), threads=1) as model, torch.no_grad():
        read = logit_lens(model, PROMPTS[0], tokens=list(range(96)))
        close(read.logit.isel(prompt=0, layer=-1, position=0), plain(torch.tensor([PROMPTS[0]])).logits[0, -1])


def test_on_tinyworld_the_answer_comes_in_the_middle_and_only_top_k_leaves(world: Any) -> None:
    read: Any = logit_lens(world, [TOWER, "The Colosseum is in the city of"], positions=None, top_k=2)
    paris = read.token.isel(prompt=0, position=-1, rank=0).values.tolist()
    assert paris[2:] == [" Paris"] * 6 and " Paris" not in paris[:2]
    sure = read.probability.isel(prompt=0, position=-1, rank=0)
    assert sure.sel(layer=3) < 0.5 < sure.sel(layer=5) and sure.sel(layer=7) > 0.99
    places = 8 * int((read.logit.position_token != "").sum())  # of the shorter prompt no pads
    assert read.receipt.result_bytes == places * (2 * (4 + 4) + 4)  # two logits and ids, and a partition
    assert read.table(0).iloc[7, -1] == " Paris 100%"
    assert list(read.table(0).columns)[-1].endswith(": of")
    frame = read.to_dataframe()
    assert len(frame) == read.logit.size and set(frame.columns) >= {
        "layer",
        "position_token",
        "token_text",
        "probability",
    }
    chosen: Any = logit_lens(world, TOWER, tokens=[" Paris", " Rome"])
    assert chosen.rank.sel(token=" Paris").values.ravel().tolist()[2:] == [0] * 6
    assert "' Paris' 100%" in chosen.table().iloc[7, 0]


def test_a_prompt_has_the_bits_among_others_that_it_has_alone(pair: Any) -> None:
    model = pair[2]
    together: Any = logit_lens(model, PROMPTS, positions=None)
    for number, prompt in enumerate(PROMPTS):
        alone: Any = logit_lens(model, prompt, positions=None)
        own = together.logit.isel(prompt=number, position=slice(7 - len(prompt), None))
        assert np.array_equal(own, alone.logit.isel(prompt=0))


def test_a_lens_on_a_model_in_bfloat16(world: Any) -> None:
    with polytrace.load(str(FOLDER), threads=1, dtype="bfloat16") as half:
        read, exact = (logit_lens(one, TOWER, [2, 5, 7], tokens=[" Paris", " Rome"]) for one in (half, world))
        assert np.abs(read.probability - exact.probability).max() < 0.05
        found, wanted = (token_directions(one, [" Paris"], method="pseudo_inverse")[0] for one in (half, world))
        assert torch.nn.functional.cosine_similarity(found, wanted, dim=0) > 0.99


def test_mistakes_are_told_in_the_users_line(world: Any) -> None:
    here = os.path.basename(__file__)
    for call, words in (
        (lambda: logit_lens(world, TOWER, 8), "layers 0-7"),
        (lambda: logit_lens(world, [TOWER, "a"], positions=4), "no position 4 in prompt 1"),
        (lambda: logit_lens(world, TOWER, tokens="Paris"), "'P', 'aris'"),
        (lambda: logit_lens(world, TOWER, top_k=0), "top_k is 1-3200"),
        (lambda: logit_lens(world, TOWER, of="pattern"), "resid_post"),
        (lambda: token_directions(world, " Paris", method="best"), "pseudo_inverse"),
    ):
        with pytest.raises(GraphError, match=words) as told:
            call()
        assert told.value.where is not None and told.value.where.startswith(here)


def test_unembedding_is_measured_before_it_is_used(world: Any) -> None:
    with polytrace.load(str(FOLDER), threads=1) as fresh:
        with pytest.raises(GraphError, match="prepare_unembedding"), fresh.trace(TOWER):
            unembed(fresh, fresh.layers[0].resid_post)
        prepare_unembedding(fresh)
        with fresh.trace(TOWER):
            top = unembed(fresh, fresh.layers[7].resid_post[:, -1]).argmax(-1).save()
        assert fresh.tokenizer.decode(top.tolist()) == " Paris"


def test_a_reading_is_drawn_with_its_tokens_on_the_axis(world: Any) -> None:
    pytest.importorskip("polytrace.methods.plots")
    figure = logit_lens(world, TOWER, positions=None).plot()
    assert [text.get_text() for text in figure.axes[0].get_xticklabels()][-1].endswith("of")
