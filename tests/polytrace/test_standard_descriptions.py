"""Standard names as descriptions may have them: withdrawn, hidden by the model's own names, given by the user."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from polytrace.codec import from_json, to_json
from polytrace.description import FactInfo, ModelDescription, ModuleInfo, PartInfo, PointInfo
from polytrace.errors import GraphError
from polytrace.graph import Port, Read, Site, Write
from polytrace.model import Model

LAYERS = [f"model.layers.{number}" for number in range(4)]
ROOT = {"embed_tokens": "model.embed_tokens", "layers": "model.layers", "lm_head": "lm_head"}
WHY = "an edit there changes no logits"


def _described(backend: Any, **more: Any) -> ModelDescription:
    """The tiny model with standard names."""
    points = [PointInfo(module=path, name="resid_post", site=Site(module=path, port=Port.OUTPUT)) for path in LAYERS]
    for path in LAYERS:
        site = Site(module=f"{path}.mlp", port=Port.OUTPUT)
        points.append(PointInfo(module=path, name="mlp_output", site=site, refusal=WHY if path == LAYERS[2] else None))
    parts = [
        PartInfo(module=path, name="mlp", path=f"{path}.mlp", refusal=WHY if path == LAYERS[2] else None)
        for path in LAYERS
    ]
    facts = (
        FactInfo(name="num_heads", values=(4,)),
        FactInfo(name="num_kv_heads", values=(4, 2, 4, 2)),
        FactInfo(name="head_dim", values=(6,), refusal="queries and values of a head have 6 and 4 features"),
    )
    fields = {
        "standard": ROOT,
        "not_standard": {"ln_final": "nothing gives what the head takes"},
        "points": tuple(points),
        "parts": tuple(parts),
        "facts": facts,
    }
    backend.description = replace(backend.description, **fields | more)
    described: ModelDescription = backend.description
    return described


def test_what_is_withdrawn_says_why_wherever_it_is_asked_for(backend: Any) -> None:
    _described(backend)
    model = Model(backend)
    with model.trace([1, 2, 3], run=False):
        model.mlps_output[1].save()
        with pytest.raises(GraphError, match=WHY):
            _ = model.mlps_output[2]
        with pytest.raises(GraphError, match=WHY):
            model.mlps_output[-2] = model.layers_output[1]
    with pytest.raises(AttributeError, match=rf"there is no mlps\[2\]: {WHY}"):
        _ = model.mlps[2]
    with pytest.raises(AttributeError, match="no ln_final: nothing gives what the head takes"):
        _ = model.ln_final
    with pytest.raises(GraphError, match="no ln_final: nothing gives"), model.trace([1, 2], run=False):
        model.project_on_vocab(model.layers_output[1])
    text = repr(model)
    assert f"mlps[2]: not here, {WHY}" in text and f"mlps_output[2]: not here, {WHY}" in text
    assert "ln_final: not here, nothing gives what the head takes" in text
    assert "attention_probabilities[0-3]: not here, nothing in it gives a pattern" in text
    assert not model.attn_probs_available


def test_facts_that_vary_are_lists_and_ambiguous_ones_are_refused(backend: Any) -> None:
    _described(backend)
    model = Model(backend)
    assert (model.num_layers, model.num_heads, model.num_kv_heads) == (4, 4, [4, 2, 4, 2])
    assert (model.hidden_size, model.vocab_size) == (8, 32)
    with pytest.raises(GraphError, match="no head_dim: queries and values of a head have 6 and 4 features"):
        _ = model.head_dim
    assert "num_kv_heads: [4, 2, 4, 2]" in repr(model) and "head_dim: not here, queries and values" in repr(model)


def test_the_models_own_module_of_a_standard_name_stays_and_is_told(backend: Any) -> None:
    other = ModuleInfo(path="layers", class_name="Other", is_list=False, is_decoder_layer=False, first_stage=0)
    modules = backend.description.modules
    _described(backend, modules=(*modules, other))
    model = Model(backend)
    assert model.layers._path == "layers" and model.standard["layers"]._path == "model.layers"
    with model.trace([1, 2, 3], run=False) as tracer:
        model.layers_output[1].save()
    assert _sites(tracer, Read) == {Site(module=LAYERS[1], port=Port.OUTPUT)}
    told = "layers: model.layers; model.layers is a module of its own: write model.standard['layers']"
    assert told in repr(model) and model.num_layers == 4


def test_another_list_of_layers_is_what_the_user_says(backend: Any) -> None:
    """What the service took for the layers is not what the user means by them."""
    tree: Mapping[str, ModuleInfo] = {info.path: info for info in backend.description.modules}
    described = _described(backend)
    moved = [replace(info, path=_moved(path)) for path, info in tree.items() if path.startswith("model.layers")]
    sites = [
        replace(info, module=_moved(info.module), order=info.order + 100)
        for info in described.sites
        if info.module.startswith("model.layers")
    ]
    backend.description = replace(
        described, modules=(*described.modules, *moved), sites=(*described.sites, *sites), points=(), parts=()
    )
    model = Model(backend, rename={"model.blocks": "layers", "mlp": "feed", "self_attn": "seen"})
    assert model.layers._path == model.standard["layers"]._path == "model.blocks" and model.num_layers == 4
    with model.trace([1, 2, 3], run=False) as tracer:
        model.layers_output[2] = model.layers_input[2]
        model.layers_output[3].save()
    assert Site(module="model.blocks.2", port=Port.INPUT) in _sites(tracer, Read)
    assert _sites(tracer, Write) == {Site(module="model.blocks.2", port=Port.OUTPUT)}


def _moved(path: str) -> str:
    return path.replace("model.layers", "model.blocks")


def _sites(tracer: Any, kind: type) -> set[Site]:
    assert tracer.request is not None
    return {node.site for node in tracer.request.graph.nodes if isinstance(node, kind)}  # type: ignore[attr-defined]


def test_standard_names_travel_with_the_description(backend: Any) -> None:
    described = _described(backend)
    assert from_json(ModelDescription, to_json(described)) == described
