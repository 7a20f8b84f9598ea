"""`rename=`: other names for modules, beside their own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from small import IDS, loaded, small_gpt2

import polytrace
from polytrace.errors import GraphError

RULES = {"transformer.h": "layers", "mlp": "feedforward", ".transformer": ["model", "mdl"], "ln_1": ".norm1"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with loaded(small_gpt2(), tmp_path_factory.mktemp("gpt2"), rename=RULES) as made:
        yield made


def test_aliases_stand_beside_native_names(model: Any) -> None:
    native = model.transformer.h[1].mlp
    for same in (
        model.layers[1].feedforward,
        model.model.layers[1].mlp,
        model.mdl.h[1].feedforward,
        model.get_submodule("layers.1.feedforward"),
        model.transformer.get_submodule("layers.1.mlp"),
    ):
        assert same == native and same._path == "transformer.h.1.mlp"
    with model.trace(IDS):
        a = model.layers[0].feedforward.output.save()
        b = model.transformer.h[0].mlp.output.save()
        model.mdl.layers[1].norm1.output[:, -1] = 0.0
        c = model.transformer.h[1].ln_1.output.save()
    assert torch.equal(a, b) and not c[:, -1].any() and c[:, 0].any()


def test_printing_shows_both_names(model: Any) -> None:
    text = repr(model)
    assert "(transformer/model/mdl): GPT2Model(" in text and "(h/layers): ModuleList(" in text
    assert "(mlp/feedforward): GPT2MLP(" in text and "(ln_1/norm1): LayerNorm()" in text
    assert {"layers", "model", "mdl"} <= set(dir(model)) and "feedforward" in dir(model.layers[0])


@pytest.mark.parametrize(
    ("rules", "told"),
    [
        ({"mpl": "feedforward"}, "no module 'mpl'; did you mean mlp"),
        ({".transformer.layers": "x"}, r"no module '\.transformer\.layers'"),
        ({"transformer.h": "lm_head"}, "has 'lm_head' already"),
        ({"mlp": "output"}, "has 'output' already"),
        ({"mlp": "trace.x"}, "an alias is one name"),
        ({"ln_1": "norm", "ln_2": "norm"}, "'norm' would be two modules"),
        ({".transformer": "trace"}, "has 'trace' already"),
    ],
)
def test_what_leads_nowhere_or_to_two_places_is_refused_at_once(model: Any, rules: Any, told: str) -> None:
    with pytest.raises(GraphError, match=told) as error:
        polytrace.Model(model.backend, rename=rules)
    assert error.value.where is not None and error.value.where.startswith("test_aliases.py")


def test_an_unknown_name_is_told_with_aliases_among_the_nearest(model: Any) -> None:
    with pytest.raises(AttributeError, match="did you mean feedforward"):
        model.layers[0].feedfoward  # noqa: B018
