"""Tuned lenses: a trained one says more than the logit lens; files are the package's own and never run code."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES
from torch import Tensor

from bench.tinyworld.facts import RELATIONS
from polytrace.errors import GraphError, TooLargeError
from polytrace.methods import TunedLens, lens_divergence, logit_lens, train_tuned_lens, tuned_lens

TOLERANCE = 1e-5  # of max(1, max|plain|), float32
PROMPTS = [[5, 17, 42, 5, 9, 30, 11], [8, 25, 1, 60]]
TRAINED = [p.format(s=s, o=o) for r in RELATIONS for p in r.train for s, o in list(r.pairs.items())[::40]]
HELD_OUT = [p.split("{o}")[0].format(s=s).rstrip() for r in RELATIONS for p in r.held_out for s in list(r.pairs)[1::60]]


def random_lens(count: int = 4, size: int = 32) -> TunedLens:
    drawn = torch.Generator().manual_seed(0)
    config = {"d_model": size, "num_hidden_layers": count, "bias": True, "lens_type": "linear_tuned_lens"}
    return TunedLens(
        weight=0.2 * torch.randn(count, size, size, generator=drawn),
        bias=torch.randn(count, size, generator=drawn),
        config=config,
    )


def by_hand(plain: Any, family: str, ids: list[int], lens: TunedLens) -> tuple[Tensor, Tensor]:
    """Logits `[layers, tokens, vocabulary]` of the translators on hidden_states, as the package counts; the model's."""
    norm = plain.get_submodule(FAMILIES[family].norm)
    cap = getattr(plain.config, "final_logit_softcapping", None)
    rows = []
    with torch.no_grad():
        out = plain(input_ids=torch.tensor([ids]), use_cache=False, output_hidden_states=True)
        for number, hidden in enumerate(out.hidden_states[:-1]):
            moved = hidden + torch.nn.functional.linear(hidden, lens.weight[number], lens.bias[number])
            logits = plain.lm_head(norm(moved))[0]
            rows.append(torch.tanh(logits / cap) * cap if cap else logits)
    return torch.stack(rows), out.logits[0]


def test_translators_are_of_the_hidden_states_that_the_package_counts(pair: Any) -> None:
    family, plain, model = pair
    lens = random_lens()
    every = list(range(96))
    for number, ids in enumerate(PROMPTS):
        wanted, own = by_hand(plain, family, ids, lens)
        before = tuned_lens(model, ids, lens, positions=None, tokens=every, of="resid_pre").logit.values[0]
        behind = tuned_lens(model, ids, lens, positions=None, tokens=every).logit.values[0]
        limit = TOLERANCE * max(1.0, float(wanted.abs().max()))
        assert np.abs(before - wanted.numpy()).max() <= limit, number
        assert np.abs(behind[:3] - wanted[1:].numpy()).max() <= limit
        assert np.abs(behind[3] - own.numpy()).max() <= limit, "the last layer has no translator"
    plain_lens = logit_lens(model, PROMPTS[0], positions=None, tokens=every).logit.values[0]
    tuned = tuned_lens(model, PROMPTS[0], lens, positions=None, tokens=every).logit.values[0]
    assert np.abs(plain_lens - tuned).max() > 0.1


def test_the_divergence_is_that_of_plain_numbers(pair: Any) -> None:
    family, plain, model = pair
    lens = random_lens()
    parts = []
    for ids in PROMPTS:
        logits, own = by_hand(plain, family, ids, lens)
        said, read = own.double().log_softmax(-1), logits.double().log_softmax(-1)
        parts.append((said.exp() * (said - read)).sum(-1))
    wanted = torch.cat(parts, 1).mean(1)
    found = lens_divergence(model, PROMPTS, lens, of="resid_pre")
    assert np.abs(found.values - wanted.numpy()).max() <= 1e-5 * max(1.0, float(wanted.max()))


def test_a_trained_lens_is_nearer_to_the_model_at_every_layer_and_the_same_for_the_same_seed(world: Any) -> None:
    losses: list[list[float]] = []
    lens = train_tuned_lens(
        world, TRAINED, batch_tokens=128, learning_rate=3e-3, report=lambda step, now: losses.append(list(now))
    )
    one, two, other = (
        train_tuned_lens(world, TRAINED[::12], layers=[3], batch_tokens=128, seed=seed) for seed in (0, 0, 1)
    )
    assert torch.equal(one.weight, two.weight) and torch.equal(one.bias, two.bias)
    assert not torch.equal(one.weight, other.weight)
    assert not one.weight[[0, 1, 2, 4, 5, 6, 7]].any() and one.weight[3].any()
    assert sum(losses[-1]) < sum(losses[0])
    assert not set(TRAINED) & set(HELD_OUT)
    before, after = lens_divergence(world, HELD_OUT), lens_divergence(world, HELD_OUT, lens)
    assert (after.values[:7] < 0.8 * before.values[:7]).all()
    assert abs(float(after[7])) < 1e-6 and abs(float(before[7])) < 1e-6
    tower = "The Eiffel Tower is in the city of"
    tuned = tuned_lens(world, tower, lens, 7, tokens=" Paris")
    assert tuned.probability.item() > 0.99


@pytest.mark.parametrize("safetensors", [False, True])
def test_a_lens_is_what_it_was_when_it_is_read_again(tmp_path: Path, safetensors: bool) -> None:
    lens = random_lens()
    lens.save(tmp_path, safetensors=safetensors)
    again = TunedLens.load(tmp_path)
    assert torch.equal(again.weight, lens.weight) and torch.equal(again.bias, lens.bias)
    assert again.config == lens.config


def test_the_packages_own_files_are_read(tmp_path: Path) -> None:
    """As tuned-lens 0.2 writes them: the state of a list of linear layers, and its config."""
    layers: Any = torch.nn.ModuleList([torch.nn.Linear(8, 8) for _ in range(3)])
    torch.save(layers.state_dict(), tmp_path / "params.pt")
    config = {"base_model_name_or_path": "gpt2", "d_model": 8, "num_hidden_layers": 3, "bias": True}
    config |= {"base_model_revision": None, "unembed_hash": "1f", "lens_type": "linear_tuned_lens"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    lens = TunedLens.load(tmp_path)
    assert all(torch.equal(lens.weight[n], layer.weight) for n, layer in enumerate(layers))
    assert all(torch.equal(lens.bias[n], layer.bias) for n, layer in enumerate(layers))
    lens.save(tmp_path / "again")
    fresh: Any = torch.nn.ModuleList([torch.nn.Linear(8, 8) for _ in range(3)])
    fresh.load_state_dict(torch.load(tmp_path / "again" / "params.pt", weights_only=True))
    assert torch.equal(fresh[1].weight, layers[1].weight)


class _Trap:
    def __reduce__(self) -> Any:
        return os.mkdir, ("trapped",)


def test_a_file_that_would_run_code_is_refused_unrun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    random_lens().save(tmp_path)
    torch.save({"0.weight": _Trap()}, tmp_path / "params.pt")
    with pytest.raises(GraphError, match="no file of tensors"):
        TunedLens.load(tmp_path)
    assert not (tmp_path / "trapped").exists()


def test_what_is_no_lens_of_this_model_is_told(tmp_path: Path, pair: Any) -> None:
    _, _, model = pair
    with pytest.raises(GraphError, match=r"3 layers with 16 features; .* has 4 with 32"):
        tuned_lens(model, PROMPTS, random_lens(3, 16))
    with pytest.raises(GraphError, match="not 'resid_mid'"):
        tuned_lens(model, PROMPTS, random_lens(), of="resid_mid")
    with pytest.raises(GraphError, match=r"no config\.json"):
        TunedLens.load(tmp_path / "nowhere")
    random_lens().save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 5}))
    with pytest.raises(GraphError, match=r"4\.weight of the tuned lens is missing"):
        TunedLens.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"d_model": 2, "num_hidden_layers": 1}))
    (tmp_path / "params.pt").write_bytes(bytes(2 << 20))
    with pytest.raises(TooLargeError, match="2,097,152 bytes"):
        TunedLens.load(tmp_path)
