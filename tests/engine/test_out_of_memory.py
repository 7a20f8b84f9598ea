"""Too little memory: the pass is cut, the request that is too large alone is refused, and bits stay. The allocator's
own error, in one process.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import model_of
from programs import few_rows, values_in_order
from torch import Tensor, nn

from engine.local import LocalBackend
from engine.memory import told_out_of_memory
from polytrace.errors import CapacityError, TooLargeError
from polytrace.model import Model
from scheduling.policy import PassPolicy
from scheduling.scheduler import Outcome, Scheduler

ABSURD = 1 << 46  # bytes: no machine has them, and the allocator says so


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> LocalBackend:
    folder: Path = tmp_path_factory.mktemp("llama")
    model_of("llama").save_pretrained(folder)
    return LocalBackend(str(folder), threads=1)


@contextmanager
def little_memory(backend: LocalBackend, most_rows: int) -> Iterator[list[int]]:
    """A layer asks for more than there is when it gets more rows. Gives the rows of all passes that got there."""
    seen: list[int] = []

    def greedy(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0].shape[1])
        if seen[-1] > most_rows:
            torch.empty(ABSURD, dtype=torch.uint8)

    scheduler, description = backend.scheduler, backend.description
    backend.scheduler = Scheduler(backend.description, PassPolicy(least_tokens=16))
    handle = backend.shard.loaded.model.get_submodule("model.layers.1.mlp").register_forward_pre_hook(greedy)
    try:
        yield seen
    finally:
        handle.remove()
        backend.scheduler, backend.description = scheduler, description
    assert backend.shard.store.held_bytes == 0 and not backend.shard._states, "a shard that forgot nothing"


def recorded(backend: LocalBackend, tokens: int, seed: int) -> Any:
    """Changes a layer, and saves another and the logits."""
    model: Any = Model(backend)
    rng = random.Random(seed)
    with model.trace([rng.randrange(90) for _ in range(tokens)], run=False) as tracer:
        model.model.layers[0].output[0][:, -1] *= 2.0
        model.model.layers[2].output[0].save()
        model.lm_head.output[:, -1].save()
    return tracer


def run(backend: LocalBackend, tracers: list[Any]) -> list[Outcome]:
    return backend.run_together([backend.work_out(tracer.built_request()) for tracer in tracers])


def values(tracer: Any, outcome: Outcome) -> list[Tensor]:
    assert outcome.error is None, outcome.error
    return values_in_order(tracer, outcome.values)


def test_a_pass_that_does_not_fit_is_cut_and_every_request_gets_its_bits(backend: LocalBackend) -> None:
    tracers = [recorded(backend, 20, seed) for seed in range(12)]
    alone = [values(tracer, *run(backend, [tracer])) for tracer in tracers]
    with little_memory(backend, 96) as rows:
        together = run(backend, tracers)
        assert max(rows) > 200, "it began with all in one pass"
        assert backend.scheduler.budget_tokens <= 120
        rows.clear()
        again = run(backend, tracers)
        assert max(rows) <= 128, "what does not fit is not tried each time"
    for tracer, expected, *found in zip(tracers, alone, together, again, strict=True):
        for outcome in found:
            assert all(map(torch.equal, values(tracer, outcome), expected))


def test_a_request_that_is_too_large_alone_is_refused_with_numbers(backend: LocalBackend) -> None:
    tracers = [recorded(backend, tokens, tokens) for tokens in (20, 60, 21, 22)]
    with little_memory(backend, 48):
        small, large, *others = run(backend, tracers)
    assert isinstance(large.error, TooLargeError)
    assert all(part in large.error.message for part in ("60 rows", f"{ABSURD:,} bytes", "fewer or shorter prompts"))
    assert all(outcome.error is None for outcome in (small, *others))


def test_a_sweep_of_several_passes_starts_again_and_gets_its_bits(backend: LocalBackend) -> None:
    """Its trunks and what it holds between two passes are gone with the pass that did not fit."""
    model: Any = Model(backend)
    with few_rows(backend, 60):
        with model.trace(run=False) as tracer:
            with tracer.invoke([[*range(20)]]):
                clean = [layer.output[0] for layer in model.model.layers]
            for number, layer in enumerate(model.model.layers):
                for token in (4, 9, 19):
                    with tracer.invoke([[*range(10), *range(30, 40)]]):
                        layer.output[0][:, token] += clean[number][:, token]
                        model.lm_head.output[:, -1].save()
        sweep = backend.work_out(tracer.built_request())
        (whole,) = backend.run_together([replace(sweep, request="again")])  # type: ignore[arg-type]
        crowd = [recorded(backend, 9, seed) for seed in range(4)]
        programs = [backend.work_out(one.built_request()) for one in crowd]
        with little_memory(backend, 64) as rows:
            outcome, *others = backend.run_together([sweep, *programs])
        assert max(rows) > 64 and len(sweep.waves) > 2
    assert all(map(torch.equal, values(tracer, outcome), values(tracer, whole)))
    assert all(other.error is None for other in others)


def test_a_value_that_does_not_fit_fails_its_request_alone_with_its_line(backend: LocalBackend) -> None:
    description = backend.description
    unlimited = replace(description.limits, max_value_bytes=1 << 60, max_live_bytes=1 << 61)
    backend.description = replace(description, limits=unlimited)
    try:
        model: Any = Model(backend)
        with model.trace([*range(20)], run=False) as absurd:
            model.model.layers[1].output[0].repeat(1 << 20, 1 << 10, 1 << 10).sum().save()
        neighbours = [recorded(backend, 20, seed) for seed in range(2)]
        first, failed, second = run(backend, [neighbours[0], absurd, neighbours[1]])
    finally:
        backend.description = description
    assert isinstance(failed.error, TooLargeError)
    assert failed.error.where is not None and failed.error.where.startswith("test_out_of_memory.py:")
    assert "bytes more were asked for" in failed.error.message
    for tracer, outcome in zip(neighbours, (first, second), strict=True):
        assert all(map(torch.equal, values(tracer, outcome), values(tracer, *run(backend, [tracer]))))


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has"), "20.00 MiB more"),
        (RuntimeError("CPUAllocator: can't allocate memory: you tried to allocate 4096 bytes."), "4,096 bytes"),
        (RuntimeError("CUDA error: out of memory"), "out of memory"),
        (MemoryError(), "out of memory"),
        (CapacityError("keys and values of this pass need 5 bytes"), "need 5 bytes"),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None),
        (ValueError("out of memory"), None),
    ],
)
def test_only_what_means_too_little_memory_is_taken_for_it(error: Exception, told: str | None) -> None:
    found = told_out_of_memory(error)
    assert found is None if told is None else told in str(found)


def test_a_sweep_whose_passes_are_too_large_alone_takes_more_of_them(backend: LocalBackend) -> None:
    model: Any = Model(backend)

    def sweep() -> tuple[list[Tensor], Any]:
        with model.trace() as tracer:
            saved = []
            for first in range(10):
                with tracer.invoke([[*range(first, first + 12)]]):
                    model.model.layers[0].output[0][:, -1] *= 2.0
                    saved.append(model.lm_head.output[:, -1].save())
        return saved, tracer.receipt

    whole, receipt = sweep()
    with little_memory(backend, 48):
        cut, more = sweep()
    assert len(receipt.passes) == 1 and len(more.passes) > 2
    assert all(map(torch.equal, cut, whole))
