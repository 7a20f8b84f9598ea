"""Random programs with gradients: merged and alone the same bits, on one process and on stages and ranks; and the
numbers of plain autograd.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, few_of, model_of
from gradient_programs import GradientProgram, programs, record, run_by_hand
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from processes import ProcessBackend, ProcessShards
from programs import difference, values_in_order
from taped import MeasuredShard
from torch import Tensor
from width import examples, wide

from engine.local import LocalBackend
from polytrace.model import Model
from scheduling.policy import PassPolicy

FLOAT32_TOLERANCE = 1e-5  # of max(1, max|plain|)
EVERYONE = PassPolicy(budget_tokens=1 << 20, max_members=1000)
GRIDS = [  # stages, ranks
    ("llama", 2, 2),
    ("gemma2", 2, 1),
    ("gpt_oss", 1, 2),
]
MORE_GRIDS = [("gpt2", 4, 1), ("mixtral", 1, 4), ("qwen3", 2, 1), ("phi3", 1, 2)]
few = settings(
    max_examples=examples(4, 6),
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate],
)


def run(backend: Any, users: list[GradientProgram]) -> list[list[Tensor]]:
    """What all save, merged as far as that goes."""
    model = Model(backend)
    tracers = [record(model, program, run=False) for program in users]
    outcomes = backend.run_together([backend.work_out(tracer.built_request()) for tracer in tracers])
    for outcome, program in zip(outcomes, users, strict=True):
        assert outcome.error is None, (outcome.error, program)
    return [values_in_order(tracer, outcome.values) for tracer, outcome in zip(tracers, outcomes, strict=True)]


def check(backend: Any, plain: Any, users: list[GradientProgram]) -> list[list[Tensor]]:
    """Each twice beside all others and alone, and against plain autograd; returns the values."""
    merged = run(backend, [*users, *users])
    for program, ours, again in zip(users, merged, merged[len(users) :], strict=False):
        (alone,) = run(backend, [program])
        assert all(map(torch.equal, ours, alone)) and all(map(torch.equal, again, alone)), program
        assert difference(ours, run_by_hand(plain, program)) <= FLOAT32_TOLERANCE, program
    return merged


@pytest.fixture(scope="module", params=few_of(["llama", "gpt2", "gemma2", "mixtral", "gpt_oss", "opt", "qwen3_moe"]))
def local(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("model")
    plain = model_of(request.param)
    plain.save_pretrained(folder)
    return request.param, plain, LocalBackend(str(folder), threads=1, policy=EVERYONE)


@few
@given(data=st.data())
def test_gradients_are_those_of_plain_autograd(local: Any, data: st.DataObject) -> None:
    family, plain, backend = local
    check(backend, plain, data.draw(st.lists(programs(FAMILIES[family]), min_size=2, max_size=4)))


@pytest.fixture(scope="module", params=[*GRIDS, *map(wide, MORE_GRIDS)], ids=lambda grid: "-".join(map(str, grid)))
def deployed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    family, stages, ranks = request.param
    folder = tmp_path_factory.mktemp("model")
    plain = model_of(family)
    plain.save_pretrained(folder)
    kinds = {(stage, rank): MeasuredShard for stage in range(stages) for rank in range(ranks)}
    shards = ProcessShards(str(folder), stages=stages, ranks=ranks, kinds=kinds)
    yield family, plain, ProcessBackend(str(folder), shards, Path(folder), EVERYONE), ranks, str(folder)
    shards.close()


@few
@given(data=st.data())
def test_stages_and_ranks_give_the_same_gradients(deployed: Any, data: st.DataObject) -> None:
    """And hold no more for them than certificates say (`MeasuredShard`)."""
    family, plain, backend, ranks, folder = deployed
    users = data.draw(st.lists(programs(FAMILIES[family]), min_size=2, max_size=3))
    merged = check(backend, plain, users)
    if ranks == 1:  # stages change no bit
        one = LocalBackend(folder, threads=1, policy=EVERYONE)
        for ours, theirs in zip(merged, run(one, users), strict=False):
            assert all(map(torch.equal, ours, theirs))
