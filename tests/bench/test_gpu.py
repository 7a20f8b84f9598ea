"""The same numbers on a GPU: run by `make gpu-test` only."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

import polytrace
from bench import tinyworld
from bench.experiments import EXPERIMENTS, Experiment
from bench.plain import TOLERANCE, Plain, difference

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def model() -> Iterator[Any]:
    model = polytrace.load(str(tinyworld.FOLDER), device="cuda")
    yield model
    model.close()


@pytest.fixture(scope="module")
def plain() -> Plain:
    return Plain(tinyworld.FOLDER, device="cuda")


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda experiment: experiment.name)
def test_an_experiment_on_a_gpu_equals_its_hand_written_twin(experiment: Experiment, model: Any, plain: Plain) -> None:
    values, expected = experiment.ask(model, 0).values, experiment.check(plain, 0)
    for name, value in expected.items():
        assert difference(values[name], value) <= TOLERANCE, name
