"""SAEs in traces beside plain Hugging Face with hooks by hand: features, splices, ablations, steering, quality."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hooked import PROMPTS, Both, both, close
from sae_files import KINDS, by_hand, config_of, weights_of, write_lens
from torch import Tensor

from polytrace.errors import GraphError
from polytrace.methods import (
    SparseAutoencoder,
    ablate_features,
    load_sae,
    sae_features,
    sae_quality,
    splice_sae,
    steer_features,
    top_activations,
)

LAYER = 2
NORMS: list[dict[str, Any]] = [
    {},
    {"apply_b_dec_to_input": True},
    {"normalize_activations": "layer_norm"},
    {"normalize_activations": "constant_norm_rescale", "apply_b_dec_to_input": True},
]


@pytest.fixture(scope="module", params=["llama", "gpt2", "gemma2"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Both]:
    with both(request.param, tmp_path_factory.mktemp(request.param)) as found:
        yield found


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Both]:
    with both("llama", tmp_path_factory.mktemp("llama")) as found:
        yield found


def made(folder: Path, kind: str, hook: str = f"blocks.{LAYER}.hook_resid_post", **more: Any) -> tuple[Any, ...]:
    """Weights, configuration, and the SAE as it was loaded from its files."""
    weights = weights_of(kind)
    config = config_of(kind, weights, hook, **more)
    return weights, config, load_sae(write_lens(folder, config, weights))


def residual(served: Both, ids: list[int], layer: int = LAYER) -> Tensor:
    place = (served.names.layer(layer), "output")
    return served.run(ids, [place])[1][place][0]


def last_logits(model: Any, edited: Any) -> Tensor:
    with edited.trace(PROMPTS):
        found: Any = model.lm_head.output[:, -1].save()
    return found


def changed(served: Both, change: Any) -> Tensor:
    """Last logits of the prompts with the residual changed by hand: `[tokens, D]` to the same."""

    def hook(hidden: Tensor) -> Tensor:
        return change(hidden[0])[None]

    place = (served.names.layer(LAYER), "output")
    return torch.stack([served.run(ids, changes={place: hook})[0][-1] for ids in PROMPTS])


@pytest.mark.parametrize("more", NORMS, ids=["plain", "b_dec", "layer_norm", "constant_norm"])
@pytest.mark.parametrize("kind", KINDS)
def test_features_and_splices_are_the_formulas_on_plain_activations(
    llama: Both, tmp_path: Path, kind: str, more: dict[str, Any]
) -> None:
    weights, config, sae = made(tmp_path, kind, **more)
    every = sae_features(llama.model, PROMPTS, sae, features=range(sae.num_features))
    strongest = sae_features(llama.model, PROMPTS, sae, top_k=4)
    few = sae_features(llama.model, PROMPTS, sae, features=[7, 3], positions=[-1, 1])
    assert strongest.activation.dims == ("prompt", "position", "rank")
    for number, ids in enumerate(PROMPTS):
        wanted, _ = by_hand(kind, weights, residual(llama, ids), config)
        assert 0.05 < float((wanted > 0).float().mean()) < 0.95
        own = slice(7 - len(ids), None)
        close(every.activation.values[number, own], wanted)
        best = wanted.topk(4)
        close(strongest.activation.values[number, own], best.values)
        assert strongest.feature is not None
        active = best.values > 0
        told = torch.tensor(strongest.feature.values[number, own])
        assert torch.equal(told[active], best.indices.int()[active])
        close(few.activation.values[number], wanted[[-1, 1]][:, [7, 3]])
    assert np.isnan(every.activation.values[1, :3]).all() and (strongest.feature.values[1, :3] == -1).all()
    spliced = last_logits(llama.model, splice_sae(llama.model, sae))
    close(spliced, changed(llama, lambda x: by_hand(kind, weights, x, config)[1]))
    plain = changed(llama, lambda x: x)
    assert float((spliced - plain).abs().max()) > 0.1
    close(last_logits(llama.model, splice_sae(llama.model, sae, error=True)), plain)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("positions", [None, -1, [1, -2]])
def test_features_are_ablated_and_steered(llama: Both, tmp_path: Path, kind: str, positions: Any) -> None:
    more = NORMS[2] if kind == "standard" else {}
    weights, config, sae = made(tmp_path, kind, **more)
    where = slice(None) if positions is None else np.atleast_1d(positions).tolist()
    plain = changed(llama, lambda x: x)

    def by_features(change: Any, *, error: bool) -> Tensor:
        def hook(x: Tensor) -> Tensor:
            features, own = by_hand(kind, weights, x, config)
            scale = x.std(-1, keepdim=True) if more else 1.0
            moved = (change(features.clone()) - features) @ weights["W_dec"] * scale
            x = x.clone()
            x[where] = ((x if error else own) + moved)[where]
            return x

        return changed(llama, hook)

    def put(numbers: Any, values: Any, mode: str) -> Any:
        def change(features: Tensor) -> Tensor:
            own = features[..., numbers]
            told = torch.as_tensor(values)
            features[..., numbers] = {"add": own + told, "set": own * 0 + told, "scale": own * told}[mode]
            return features

        return change

    features, _ = by_hand(kind, weights, residual(llama, PROMPTS[0]), config)
    active = features[-1].topk(3).indices.tolist()
    for error in (True, False):
        ours = last_logits(llama.model, ablate_features(llama.model, sae, active, error=error, positions=positions))
        close(ours, by_features(put(active, 0.0, "set"), error=error))
        assert float((ours - plain)[0].abs().max()) > 0.02
    for mode, values in (("set", [3.0, -2.0, 1.0]), ("add", 2.5), ("scale", 4.0)):
        edited = steer_features(llama.model, sae, active, values, mode=mode, positions=positions)
        ours = last_logits(llama.model, edited)
        close(ours, by_features(put(active, values, mode), error=True))
        assert float((ours - plain)[0].abs().max()) > 0.05


def test_an_sae_belongs_to_the_same_point_of_every_family(served: Both, tmp_path: Path) -> None:
    weights, config, sae = made(tmp_path / "post", "jumprelu")
    found = sae_features(served.model, PROMPTS[0], sae, features=range(sae.num_features))
    close(found.activation.values[0], by_hand("jumprelu", weights, residual(served, PROMPTS[0]), config)[0])
    weights, config, mlp = made(tmp_path / "mlp", "standard", hook="blocks.1.hook_mlp_out")
    place = (served.names.layer(1, served.names.mlp), "output")
    plain = served.run(PROMPTS[0], [place])[1][place][0]
    found = sae_features(served.model, PROMPTS[0], mlp, features=range(24))
    close(found.activation.values[0], by_hand("standard", weights, plain, config)[0])


def test_heads_side_by_side_are_one_activation(served: Both, tmp_path: Path) -> None:
    place = (served.names.layer(1, served.names.out.replace("attention.", "")), "input")
    heads = served.run(PROMPTS[0], [place])[1][place]
    weights = weights_of("standard", size=heads.shape[-1])
    hook = "blocks.1.attn.hook_z"
    config = config_of("standard", weights, hook, reshape_activations="hook_z")
    sae = load_sae(write_lens(tmp_path, config, weights))
    found = sae_features(served.model, PROMPTS[0], sae, features=range(24))
    close(found.activation.values[0], by_hand("standard", weights, heads[0], config)[0])
    edited = splice_sae(served.model, sae)
    with edited.trace(PROMPTS[0]):
        ours = served.model.lm_head.output[0].save()
    own = served.run(PROMPTS[0], changes={place: lambda x: by_hand("standard", weights, x, config)[1]})[0]
    close(ours, own)
    assert float((own - served.run(PROMPTS[0])[0]).abs().max()) > 0.05


@pytest.mark.parametrize("kind", ["transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder"])
def test_a_transcoder_stands_in_for_the_mlp(llama: Both, tmp_path: Path, kind: str) -> None:
    weights = weights_of(kind, out=32)
    more = {"hf_hook_name": "model.layers.1.pre_feedforward_layernorm.output", "hook_name_out": "blocks.1.hook_mlp_out"}
    config = config_of(kind, weights, "blocks.1.hook_mlp_in", d_out=32)
    config["metadata"] |= more
    sae = load_sae(write_lens(tmp_path, config, weights))
    mlp, layer = (llama.names.layer(1, "mlp"), "input"), (llama.names.layer(1, "mlp"), "output")
    plain = llama.run(PROMPTS[0], [mlp])[1][mlp]
    features, own = by_hand(kind, weights, plain, config)
    with splice_sae(llama.model, sae).trace(PROMPTS[0]):
        ours = llama.model.lm_head.output[0].save()
    close(ours, llama.run(PROMPTS[0], changes={layer: lambda x: own})[0])
    number = int(features[0, -1].argmax())
    with ablate_features(llama.model, sae, number).trace(PROMPTS[0]):
        ours = llama.model.lm_head.output[0].save()
    with pytest.raises(GraphError, match=r"do not say where it belongs: sae\.at\(\.\.\., gives=LayerPoint"):
        splice_sae(llama.model, replace(sae, gives=None, config={}))
    less = features[..., number : number + 1] * weights["W_dec"][number]
    close(ours, llama.run(PROMPTS[0], changes={layer: lambda x: x - less})[0])


def test_a_wide_sae_in_several_constants_is_the_same(
    llama: Both, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in KINDS:
        _, _, sae = made(tmp_path / kind, kind)
        whole = sae_features(llama.model, PROMPTS, sae, top_k=6)
        spliced = last_logits(llama.model, splice_sae(llama.model, sae))
        monkeypatch.setattr("polytrace.methods.saes.autoencoder._BLOCK_BYTES", 32 * 4 * 5)
        _, _, cut = made(tmp_path / kind, kind)
        parts = sae_features(llama.model, PROMPTS, cut, top_k=6)
        again = last_logits(llama.model, splice_sae(llama.model, cut))
        monkeypatch.undo()
        assert len(cut._blocks()) == 5 and len(sae._blocks()) == 1
        close(parts.activation.fillna(0.0), torch.tensor(whole.activation.fillna(0.0).values))
        assert whole.feature is not None and parts.feature is not None
        active = whole.activation.values > 0
        assert (parts.feature.values[active] == whole.feature.values[active]).all()
        close(again, spliced)


def test_only_what_was_asked_for_comes_back(llama: Both, tmp_path: Path) -> None:
    weights = weights_of("jumprelu", features=2048)
    config = config_of("jumprelu", weights, f"blocks.{LAYER}.hook_resid_post")
    sae = load_sae(write_lens(tmp_path, config, weights))
    few = sae_features(llama.model, PROMPTS[0], sae, features=[5, 1999])
    strongest = sae_features(llama.model, PROMPTS[0], sae, top_k=3)
    assert few.receipt.result_bytes <= 7 * 2 * 4 + 1024 and strongest.receipt.result_bytes <= 7 * 3 * 8 + 1024
    assert strongest.receipt.result_bytes < 7 * 2048 * 4 / 40
    wanted = by_hand("jumprelu", weights, residual(llama, PROMPTS[0]), config)[0][:, [5, 1999]]
    close(few.activation.values[0], wanted)


def test_the_strongest_tokens_of_a_dataset_are_found(llama: Both, tmp_path: Path) -> None:
    weights, config, sae = made(tmp_path, "standard")
    draw = torch.Generator().manual_seed(2)
    dataset = [torch.randint(3, 96, (4 + n % 5,), generator=draw).tolist() for n in range(40)]
    rows = [by_hand("standard", weights, residual(llama, ids), config)[0] for ids in dataset]
    for once in (True, False):
        found = top_activations(llama.model, iter(dataset), sae, [3, 8], 6, once=once, context=2)
        for feature in (3, 8):
            scores = [(row[:, feature].max(), n, int(row[:, feature].argmax())) for n, row in enumerate(rows)]
            if not once:
                scores = [(row[place, feature], n, place) for n, row in enumerate(rows) for place in range(len(row))]
            best = sorted(scores, key=lambda one: -float(one[0]))[:6]
            own = found.activation.sel(feature=feature)
            close(own, torch.stack([one[0] for one in best]))
            assert own.prompt.values.tolist() == [one[1] for one in best]
            assert own.position.values.tolist() == [one[2] for one in best]
    assert set(found.table(3)) >= {"activation", "prompt", "position", "before", "token", "after"}
    assert len(found.table()) == 12


@pytest.mark.parametrize("start", [0, 1])
def test_quality_is_that_of_plain_numbers(llama: Both, tmp_path: Path, start: int) -> None:
    weights, config, sae = made(tmp_path, "topk")
    place = (llama.names.layer(LAYER), "output")
    prompts = [*PROMPTS, [4, 4, 9, 20, 61, 7, 8]]
    xs, active, errors, losses, kls = [], [], [], [], []
    for ids in prompts:

        def spliced(hidden: Tensor) -> Tensor:
            hidden[:, start:] = by_hand("topk", weights, hidden[:, start:], config)[1]
            return hidden

        def nothing(hidden: Tensor) -> Tensor:
            hidden[:, start:] = 0
            return hidden

        x = residual(llama, ids)[start:].double()
        features, own = by_hand("topk", weights, x.float(), config)
        xs.append(x)
        active.append((features > 0).sum(-1))
        errors.append((own - x).square().sum(-1))
        runs = [llama.run(ids)[0], *(llama.run(ids, changes={place: one})[0] for one in (spliced, nothing))]
        told = [run.double().log_softmax(-1)[start:] for run in runs]
        losses.append(torch.stack([-one[:-1].gather(-1, torch.tensor(ids)[start + 1 :, None])[:, 0] for one in told]))
        kls.append((told[0].exp() * (told[0] - told[1])).sum(-1))
    x, loss = torch.cat(xs), torch.cat(losses, 1).mean(1)
    wanted = {
        "tokens": len(x),
        "l0": float(torch.cat(active).double().mean()),
        "explained_variance": float(1 - torch.cat(errors).sum() / (x - x.mean(0)).square().sum()),
        "mse": float(torch.cat(errors).mean() / 32),
        "loss": float(loss[0]),
        "loss_spliced": float(loss[1]),
        "loss_without": float(loss[2]),
        "recovered": float((loss[2] - loss[1]) / (loss[2] - loss[0])),
        "kl": float(torch.cat(kls).mean()),
    }
    found = sae_quality(llama.model, prompts, sae, start=start)
    assert found.measure.values.tolist() == list(wanted)
    for name, value in wanted.items():
        assert float(found.sel(measure=name)) == pytest.approx(value, rel=2e-5, abs=1e-5), name
    assert wanted["kl"] > 0.01


def test_a_change_of_the_users_own_goes_between_encoder_and_decoder(llama: Both, tmp_path: Path) -> None:
    weights, config, sae = made(tmp_path, "standard")
    edited = splice_sae(llama.model, sae, change=lambda features: features * 2, name="twice")
    wanted = changed(llama, lambda x: 2 * (by_hand("standard", weights, x, config)[1] - sae.b_dec) + sae.b_dec)
    close(last_logits(llama.model, edited), wanted)
    with llama.model.trace(PROMPTS, edits=["twice"]):
        again = llama.model.lm_head.output[:, -1].save()
    assert torch.equal(again, last_logits(llama.model, edited))


def test_an_sae_is_a_function_of_plain_tensors_too(tmp_path: Path) -> None:
    for kind in KINDS:
        weights, config, sae = made(tmp_path / kind, kind, apply_b_dec_to_input=True)
        x = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(1))
        features, own = by_hand(kind, weights, x, config)
        close(sae.encode(x), features)
        close(sae.decode(features), own)
        close(sae(x), own)
        heads = x.unflatten(-1, (4, 8))
        close(sae.forward(heads), own.unflatten(-1, (4, 8)))
        close(sae.encode(heads, [2, 0]), features[..., [2, 0]])


def test_what_does_not_fit_is_told(llama: Both, tmp_path: Path) -> None:
    _, _, sae = made(tmp_path / "a", "standard")
    with pytest.raises(GraphError, match=r"no feature 24; this SAE has features 0-23"):
        ablate_features(llama.model, sae, [1, 24])
    with pytest.raises(GraphError, match="each once"):
        ablate_features(llama.model, sae, [1, 1])
    with pytest.raises(GraphError, match="top_k is 1-24, not 25"):
        sae_features(llama.model, PROMPTS, sae, top_k=25)
    with pytest.raises(GraphError, match="mode is one of add, set, scale"):
        steer_features(llama.model, sae, [1, 2], [1.0, 2.0, 3.0])
    with pytest.raises(GraphError, match="there is no layer 9"):
        sae_features(llama.model, PROMPTS, sae.at("resid_post", 9))
    with pytest.raises(GraphError, match="this SAE is of 32 numbers at mlp_post of layer 1, where"):
        sae_features(llama.model, PROMPTS, sae.at("mlp_post", 1))
    with pytest.raises(GraphError, match="no point 'pattern'"):
        sae.at("pattern", 1)
    _, _, lost = made(tmp_path / "b", "standard", hook="blocks.2.hook_elsewhere")
    with pytest.raises(GraphError, match=r"name the place 'blocks\.2\.hook_elsewhere'"):
        splice_sae(llama.model, lost)
    _, _, normed = made(tmp_path / "c", "standard", normalize_activations="layer_norm")
    with pytest.raises(GraphError, match=r"decode\(features, like=x\)"):
        normed.decode(torch.zeros(3, 24))
    with pytest.raises(GraphError, match=r"takes 32 numbers, and these are of shape \[3, 8\]"):
        sae.encode(torch.zeros(3, 8))
    with pytest.raises(GraphError, match=r"threshold of the SAE is missing"):
        SparseAutoencoder(W_enc=sae.W_enc, W_dec=sae.W_dec, b_enc=sae.b_enc, b_dec=sae.b_dec, architecture="jumprelu")
    with pytest.raises(GraphError, match="two tokens from `start` on, and the shortest has 4"):
        sae_quality(llama.model, PROMPTS, sae, start=3)
