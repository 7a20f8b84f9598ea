"""Every experiment of the demo and every kind of request of the benchmarks gives what plain Hugging Face gives."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

import polytrace
from bench import tinyworld
from bench.experiments import EXPERIMENTS, Experiment
from bench.experiments.patching import restored_share
from bench.plain import TOLERANCE, Plain, difference
from bench.workloads import KINDS, Kind, choice


@pytest.fixture(scope="module")
def model() -> Iterator[Any]:
    model = polytrace.load(str(tinyworld.FOLDER), threads=1)
    yield model
    model.close()


@pytest.fixture(scope="module")
def plain() -> Plain:
    return Plain(tinyworld.FOLDER)


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda experiment: experiment.name)
def test_an_experiment_equals_its_hand_written_twin(experiment: Experiment, model: Any, plain: Plain) -> None:
    answer = experiment.ask(model, 0)
    expected = experiment.check(plain, 0)
    assert answer.values.keys() == expected.keys()
    for name, value in expected.items():
        assert difference(answer.values[name], value) <= TOLERANCE, name
    assert answer.receipts
    assert experiment.tell(answer.values, model, 0)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_small_request_equals_its_hand_written_twin(kind: Kind, model: Any, plain: Plain) -> None:
    at = choice(KINDS.index(kind), plain)
    values, expected = kind.ask(model, at), kind.check(plain, at)
    assert values.keys() == expected.keys()
    for name, value in expected.items():
        assert difference(values[name], value) <= TOLERANCE, name


def test_patching_the_last_layer_of_the_last_token_restores_everything(plain: Plain) -> None:
    experiment = next(experiment for experiment in EXPERIMENTS if experiment.name == "patching")
    restored = restored_share(experiment.check(plain, 0))
    assert restored[-1, -1].item() == pytest.approx(1, abs=1e-4)
    assert restored[-1, :-1].abs().max() < 1e-4


def test_users_of_the_benchmark_ask_different_things(plain: Plain) -> None:
    choices = {(user % len(KINDS), choice(user, plain)) for user in range(32)}
    assert len(choices) == 32
