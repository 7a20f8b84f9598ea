"""Looking at a value runs a part of its program: random programs' parts have the bits of the whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import FAMILIES, model_of
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from programs import programs, record, values_in_order

from engine.local import LocalBackend
from polytrace.model import Model


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(family: str, tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder: Path = tmp_path_factory.mktemp(family)
    model_of(family).save_pretrained(folder)
    return Model(LocalBackend(str(folder), threads=1))


@settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
)
@given(data=st.data())
def test_what_is_seen_of_each_value_has_the_bits_of_the_whole_run(
    family: str, model: Model, data: st.DataObject
) -> None:
    program = data.draw(programs(FAMILIES[family]))
    tracer, _ = record(model, program, run=False, peek=True)
    recording = tracer.recording
    nodes = list(dict.fromkeys(state.node for state, _, _ in recording.saved))
    seen = [recording.peeks.look(node) for node in nodes]
    whole = values_in_order(tracer, model.backend.run(tracer.request).values)
    for ours, value in zip(seen, whole, strict=True):
        assert torch.equal(ours, value), program
    assert all(receipt.token_layers <= receipt.token_layers_alone for receipt in tracer.peeks)
