"""Promise 1 on a GPU, in one process: shared, merged and alone have the same bits, and Hugging Face's numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from by_hand import run_by_hand
from families import FAMILIES, model_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from points import furthest, look_by_hand, looks, record_look
from programs import crowds, difference, few_rows, serve, values_in_order

from engine.local import LocalBackend
from polytrace.model import Model
from scheduling.policy import PassPolicy

pytestmark = pytest.mark.gpu

TOLERANCE = 1e-5  # of max(1, max|plain|), float32
KINDS = [
    ("llama", "float32"),
    ("gemma2", "float32"),
    ("gpt_oss", "float32"),
    ("gpt2", "float32"),
    ("llama", "bfloat16"),
]
ONCE = settings(max_examples=2, deadline=None, suppress_health_check=list(HealthCheck))


@dataclass
class OnGpu:
    """A tiny model on the GPU, and the plain one on the CPU."""

    family: str
    dtype: torch.dtype
    plain: Any
    backend: LocalBackend
    model: Model


@pytest.fixture(scope="module", params=KINDS, ids="-".join)
def on_gpu(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OnGpu]:
    family, name = request.param
    folder: Path = tmp_path_factory.mktemp("model")
    plain = model_of(family, getattr(torch, name))
    plain.save_pretrained(folder)
    backend = LocalBackend(str(folder), device="cuda", policy=PassPolicy(budget_tokens=1 << 20, max_members=1000))
    assert backend.description.has_exact_rows, backend.description.notes
    assert backend.description.has_forks, backend.description.notes
    yield OnGpu(family, plain.dtype, plain, backend, Model(backend))
    backend.close()


def _cpu(values: list[torch.Tensor]) -> list[torch.Tensor]:
    return [value.cpu() for value in values]


@ONCE
@given(data=st.data())
def test_programs_on_a_gpu_keep_their_bits_in_company_and_hugging_faces_numbers(
    on_gpu: OnGpu, data: st.DataObject
) -> None:
    users = data.draw(crowds(FAMILIES[on_gpu.family], 16))
    shared = serve(on_gpu.model, on_gpu.backend, users, on_gpu.dtype)
    merged = serve(on_gpu.model, on_gpu.backend, users, on_gpu.dtype, sharing="off")
    for program, ours, apart in zip(users, shared, merged, strict=True):
        (alone,) = serve(on_gpu.model, on_gpu.backend, [program], on_gpu.dtype)
        assert ours.has_bits_of(alone) and apart.has_bits_of(alone), program
        with few_rows(on_gpu.backend, 24):
            (kept,) = serve(on_gpu.model, on_gpu.backend, [program], on_gpu.dtype)
        assert kept.has_bits_of(alone), program
        if on_gpu.dtype is torch.float32:
            assert difference(_cpu(ours.values), run_by_hand(on_gpu.plain, program)) <= TOLERANCE, program


def test_points_inside_of_attention_on_a_gpu(on_gpu: OnGpu) -> None:
    family = FAMILIES[on_gpu.family]
    own = looks(family, [(tuple(range(1, 41)),), ((7, 3, 5, 9, 11, 2, 4), (7, 3, 5, 1))])

    def run(some: list[Any]) -> list[list[torch.Tensor]]:
        tracers = [record_look(on_gpu.model, family, look, run=False)[0] for look in some]
        outcomes = on_gpu.backend.run_together([on_gpu.backend.work_out(tracer.built_request()) for tracer in tracers])
        for outcome in outcomes:
            if outcome.error is not None:
                raise outcome.error
        return [_cpu(values_in_order(tracer, o.values)) for tracer, o in zip(tracers, outcomes, strict=True)]

    for look, ours in zip(own, run(own), strict=True):
        (alone,) = run([look])
        assert all(map(torch.equal, ours, alone)), look
        if on_gpu.dtype is torch.float32:
            assert furthest(ours, look_by_hand(on_gpu.plain, family, look)) <= TOLERANCE, look
