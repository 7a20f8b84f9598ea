"""Edits as data, kept and taken up by later traces, are the lines that they were: random ones, bit for bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, model_of
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from programs import _act, programs, record, values_in_order

from engine.local import LocalBackend
from polytrace.model import Model


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(family: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
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
def test_traces_that_start_from_an_edit_have_the_bits_of_traces_with_its_lines(
    family: str, model: Any, data: st.DataObject
) -> None:
    program = data.draw(programs(FAMILIES[family]))
    edits = tuple(action for action in program.actions[0] if action.is_edit)
    assume(edits)
    reads = tuple(action for action in program.actions[0] if not action.is_edit)
    prompts = (program.prompts[0],) * 2  # two invokes, whose prompts have the columns that edits name
    without = replace(program, prompts=prompts, actions=(reads, ()))
    written = replace(program, prompts=prompts, actions=((*edits, *reads), edits))
    with model.edit("drawn"):
        for action in edits:
            list(_act(model, FAMILIES[family], action, {}, torch.float32))
    by_name, _ = record(model, without, run=False, edits=["drawn"])
    by_lines, _ = record(model, written, run=False)
    runs = [values_in_order(tracer, model.backend.run(tracer.request).values) for tracer in (by_name, by_lines)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True)), program
    model.delete_edit("drawn")
