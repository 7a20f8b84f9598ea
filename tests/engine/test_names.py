"""Named points and weights of every family against the same written out by hand over plain Hugging Face."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from families import FAMILIES, few_of, model_of
from names import POINTS, change, points_by_hand, weights_by_hand
from programs import difference, find
from torch import Tensor

from engine.local import LocalBackend
from polytrace.codec import from_json, to_json
from polytrace.description import ModelDescription
from polytrace.errors import GraphError
from polytrace.model import Model

TOLERANCE = 1e-5  # of max(1, max|plain|), float32
PROMPTS = [[7, 3, 5, 9, 11, 2, 4], [7, 3, 5, 1]]
LAYER = 1


@pytest.fixture(scope="module", params=few_of(sorted(POINTS)))
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder, plain = tmp_path_factory.mktemp("model"), model_of(request.param)
    plain.save_pretrained(folder)
    return request.param, plain, Model(LocalBackend(str(folder), threads=1))


@pytest.fixture(scope="module")
def of_family(tmp_path_factory: pytest.TempPathFactory) -> Any:
    def make(family: str) -> Model:
        folder = tmp_path_factory.mktemp(family)
        model_of(family).save_pretrained(folder)
        return Model(LocalBackend(str(folder), threads=1))

    return make


def _ask(model: Any, family: str, prompts: list[list[int]], edit: str | None) -> dict[str, Tensor]:
    with model.trace(prompts):
        layer = find(model, f"{FAMILIES[family].layers}.{LAYER}")
        if edit is not None:
            change(edit, getattr(layer, edit))
        found = {name: getattr(layer, name).save() for name in (*POINTS[family], "head_out")}
        found["logits"] = model.output.logits.save()
    return found


def test_every_name_reads_and_takes_edits_as_by_hand_and_neighbours_change_no_bit(served: Any) -> None:
    family, plain, model = served
    for edit in (None, *POINTS[family], "head_out"):
        together = _ask(model, family, PROMPTS, edit)
        for number, prompt in enumerate(PROMPTS):
            expected = points_by_hand(plain, family, LAYER, prompt, edit)
            untouched = points_by_hand(plain, family, LAYER, prompt, None)
            own = {name: value[number : number + 1, -len(prompt) :] for name, value in together.items()}
            for name, value in own.items():
                assert difference([value], [expected[name]]) <= TOLERANCE, (edit, name)
            alone = _ask(model, family, [prompt], edit)
            assert all(torch.equal(own[name], alone[name]) for name in own), edit
            if edit is not None:
                assert difference([own["logits"]], [untouched["logits"]]) > 10 * TOLERANCE, edit


def test_assigning_a_name_is_the_same_edit(served: Any) -> None:
    family, _, model = served
    for name in (*POINTS[family], "head_out"):
        in_place = _ask(model, family, PROMPTS, name)
        with model.trace(PROMPTS):
            layer = find(model, f"{FAMILIES[family].layers}.{LAYER}")
            value = getattr(layer, name).clone()
            change(name, value)
            setattr(layer, name, value)
            logits = model.output.logits.save()
        assert torch.equal(logits, in_place["logits"]), name


def test_reading_every_name_changes_no_bit_and_names_its_dimensions(served: Any) -> None:
    family, _, model = served
    with model.trace(PROMPTS):
        bare = model.lm_head.output.save()
    saved: dict[str, Tensor] = {}
    with model.trace(PROMPTS):
        for number in range(FAMILIES[family].num_layers):
            layer = find(model, f"{FAMILIES[family].layers}.{number}")
            assert set(POINTS[family]) < set(layer.points)
            for name, dims in layer.points.items():
                value = getattr(layer, name)
                assert value.dims == dims and len(dims) == value.ndim, name
                assert f"{name}: [{', '.join(dims)}]" in repr(layer)
                saved[f"{number}.{name}"] = value.save()
        read = model.lm_head.output.save()
    assert torch.equal(bare, read) and len(saved) > 40


def test_weights_by_name_are_views_of_the_models_own(served: Any) -> None:
    family, plain, model = served
    layer = find(model, f"{FAMILIES[family].layers}.{LAYER}")
    owners = {"W_E": model, "W_U": model}
    with model.trace(PROMPTS):
        attention = find(layer, FAMILIES[family].attention)
        expected = weights_by_hand(plain, family, LAYER)
        own = {name: getattr(owners.get(name, layer), name).save() for name in expected}
        circuit = attention.W_V_by_head[1] @ layer.W_O[1]
        found, z = circuit.save(), attention.z[:, :, 1].save()
        by_head = attention.head_out[:, :, 1].save()
        value = attention.v.save()
    for name, weight in own.items():
        assert torch.equal(weight, expected[name]), name
    assert difference([z @ own["W_O"][1]], [by_head]) <= TOLERANCE
    assert found.shape == (32, 32) and value.shape[3] == own["W_O"].shape[1]


def test_a_point_that_a_family_cannot_have_says_why(of_family: Any) -> None:
    phi, mixtral = of_family("phi"), of_family("mixtral")
    why = "no resid_mid: attention and MLP of this layer run side by side"
    with pytest.raises(GraphError, match=why), phi.trace([1, 2]):
        _ = phi.model.layers[0].resid_mid
    assert "resid_mid: not here, attention and MLP" in repr(phi.model.layers[0].points)
    for name in ("mlp_pre", "mlp_post"):
        with pytest.raises(GraphError, match="rows are sorted by expert"), mixtral.trace([1, 2]):
            _ = getattr(mixtral.model.layers[0], name)


def test_a_routers_logits_are_read_and_what_it_chose_is_changed_where_it_is(of_family: Any) -> None:
    mixtral = of_family("mixtral")
    with mixtral.trace([[1, 2, 3]]):
        layer = mixtral.model.layers[0]
        logits, same = layer.router.save(), layer.mlp.gate.output[0].save()
    assert torch.equal(logits, same) and logits.shape == (1, 3, 4)
    why = r"chosen experts by then: .* model\.layers\.0\.mlp\.gate\.output"
    with pytest.raises(GraphError, match=why), mixtral.trace([1, 2]):
        mixtral.model.layers[0].router[:, -1] = 0.0


def test_what_norms_behind_attention_do_to_head_out_is_told(of_family: Any) -> None:
    gemma = of_family("gemma2")
    assert "head_out: [sequence, token, head, feature]; before post_attention_layernorm" in repr(gemma.model.layers[0])


def test_two_names_of_one_matrix_at_one_visit_are_written_in_the_models_order(of_family: Any) -> None:
    """What the projection gives is written first, then its part by name, wherever the lines stand."""
    gpt2 = of_family("gpt2")
    attention = gpt2.transformer.h[LAYER].attn
    with gpt2.trace(PROMPTS[0]):
        attention.q[:, -1] += 1.0
        attention.c_attn.output[:, -1] *= 2.0
        whole, part = attention.c_attn.output.save(), attention.q.save()
        logits = gpt2.output.logits.save()
    with gpt2.trace(PROMPTS[0]):
        given = attention.c_attn.output.clone()
        given[:, -1] *= 2.0
        given[:, -1, :32] += 1.0
        attention.c_attn.output = given
        expected = gpt2.output.logits.save()
    assert torch.equal(logits, expected)
    assert difference([part[0, -1].flatten()], [whole[0, -1, :32] + 1.0]) == 0.0


def test_buffers_are_read(of_family: Any) -> None:
    llama = of_family("llama")
    plain = model_of("llama")
    with llama.trace([1, 2]):
        inv_freq = llama.model.rotary_emb.inv_freq.save()
    assert torch.equal(inv_freq, plain.model.rotary_emb.inv_freq)


def test_names_travel_with_the_description(of_family: Any) -> None:
    description = of_family("phi3").description
    assert from_json(ModelDescription, json.loads(json.dumps(to_json(description)))) == description
