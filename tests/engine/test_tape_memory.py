"""What passes keep for gradients: as much as the certificate says, and nothing once nobody asks for it any more."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, model_of
from programs import get, values_in_order
from taped import held_by_pass, held_bytes
from width import wide

from bench.cones.models import folder_of
from engine.local import LocalBackend
from polytrace.errors import TooLargeError
from polytrace.model import Model
from scheduling.policy import PassPolicy
from scheduling.scheduler import Outcome, Scheduler

EVERYONE = PassPolicy(budget_tokens=1 << 20, max_members=1000)
MOST = 1.5  # times what is held may the certificate say
PROMPTS = [[40], [120, 30, 7]]  # tokens of each; below that, tiles of experts that hold little tell the most


def ids(lengths: list[int], seed: int = 0) -> list[list[int]]:
    return [[3 + (7 * place + seed + token) % 80 for token in range(length)] for place, length in enumerate(lengths)]


def asked(model: Any, prompts: list[list[int]], reads: Any, logits: Any, *, losses: int = 2) -> Any:
    """The gradients of so many losses at what `reads(model)` gives, one backward each."""
    with model.trace(prompts, run=False) as tracer:
        found = reads(model)
        last = logits(model)[:, -1]
        for number in range(losses):
            with (last.tanh().sum() * (number + 1.0)).backward():
                for value in found:
                    value.grad.save()
    return tracer


def of_family(model: Any, family: str, prompts: list[list[int]], layers: list[int], losses: int = 2) -> Any:
    names = FAMILIES[family]
    return asked(
        model,
        prompts,
        lambda model: [get(model, names.residual(layer)) for layer in layers],
        lambda model: get(model, names.logits()),
        losses=losses,
    )


def check(backend: LocalBackend, tracer: Any) -> None:
    program = backend.work_out(tracer.built_request())
    assert backend.validate(tracer.built_request()).tape_bytes == program.tape_bytes
    there, back, last = held_by_pass(backend, program)
    assert 0 < there <= back <= program.tape_bytes <= MOST * back
    assert last == 0


@pytest.mark.parametrize(
    "family", ["llama", "gpt2", wide("gemma2"), wide("mixtral"), "gpt_oss", wide("opt"), wide("gpt_neox")]
)
def test_what_is_held_is_what_the_certificate_says(family: str, tmp_path: Path) -> None:
    model_of(family, positions=256).save_pretrained(tmp_path)
    backend = LocalBackend(str(tmp_path), threads=1)
    every = list(range(FAMILIES[family].num_layers))
    for lengths in PROMPTS:
        for layers in (every[:1], every, every[2:3]):
            check(backend, of_family(Model(backend), family, ids(lengths), layers))


def test_of_a_larger_model_too(tmp_path: Path) -> None:
    backend = LocalBackend(str(folder_of("8x512", cache=tmp_path)), threads=1)

    def reads(model: Any) -> list[Any]:
        return [layer.self_attn.o_proj.input for layer in model.model.layers]

    for lengths in PROMPTS:
        check(backend, asked(Model(backend), ids(lengths), reads, lambda model: model.lm_head.output))


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> LocalBackend:
    folder = tmp_path_factory.mktemp("llama")
    model_of("llama", positions=256).save_pretrained(folder)
    return LocalBackend(str(folder), threads=1, policy=EVERYONE)


@contextmanager
def room(backend: LocalBackend, tape_bytes: int) -> Iterator[None]:
    """Shards have so much memory for tapes."""
    scheduler, description = backend.scheduler, backend.description
    backend.description = replace(description, limits=replace(description.limits, tape_bytes=tape_bytes))
    backend.scheduler = Scheduler(backend.description, EVERYONE)
    try:
        yield
        assert backend.scheduler._room.tapes.taken_bytes == 0 and backend.shard._tapes.is_empty
    finally:
        backend.scheduler, backend.description = scheduler, description


def run(backend: LocalBackend, tracers: list[Any]) -> list[Outcome]:
    outcomes = backend.run_together([backend.work_out(tracer.built_request()) for tracer in tracers])
    assert [outcome.error for outcome in outcomes] == [None] * len(tracers)
    return outcomes


def test_with_less_memory_layers_run_again_with_the_same_bits_and_with_too_little_it_is_refused(
    local: LocalBackend,
) -> None:
    model = Model(local)
    tracer = of_family(model, "llama", ids([120, 100]), [0, 3])
    program = local.work_out(tracer.built_request())
    (whole,) = run(local, [tracer])
    assert whole.receipt is not None and whole.receipt.tape_bytes == program.tape_bytes
    held = max(held_by_pass(local, local.work_out(tracer.built_request())))
    assert not any(wave.reruns for wave in program.waves)
    with room(local, program.tape_bytes - 1):
        again = local.work_out(tracer.built_request())
        assert [wave.reruns for wave in again.waves] == [True, False, False]
        assert again.tape_bytes < 0.7 * program.tape_bytes
        between = held_by_pass(local, again)
        assert max(between) < 0.7 * held and max(between) <= again.tape_bytes
        (less,) = run(local, [tracer])
        for ours, theirs in zip(
            values_in_order(tracer, less.values), values_in_order(tracer, whole.values), strict=True
        ):
            assert torch.equal(ours, theirs)
    with room(local, again.tape_bytes - 1), pytest.raises(TooLargeError) as refused:
        local.work_out(tracer.built_request())
    assert f"{again.tape_bytes:,}" in refused.value.message and f"{again.tape_bytes - 1:,}" in refused.value.message
    assert "224 rows" in refused.value.message, "220, and four that fill up the pass"


def test_requests_wait_for_room_and_the_younger_ones_behind_them(local: LocalBackend) -> None:
    model = Model(local)
    large = [of_family(model, "llama", ids([120, 100], seed), [0]) for seed in (1, 2)]
    small = of_family(model, "llama", ids([20]), [0])
    one, little = (local.work_out(each.built_request()).tape_bytes for each in (large[0], small))
    with room(local, one + little):
        alone = [run(local, [each])[0] for each in (*large, small)]
        outcomes = run(local, [*large, small])
        for tracer, ours, theirs in zip((*large, small), outcomes, alone, strict=True):
            values = zip(values_in_order(tracer, ours.values), values_in_order(tracer, theirs.values), strict=True)
            assert all(torch.equal(mine, other) for mine, other in values)
        first, second, third = ([entry.pass_id for entry in o.receipt.passes] for o in outcomes if o.receipt)
        assert first[-1] < second[0], "there is no room for both"
        assert second[0] == third[0], "what is younger does not go before one that waits"
    assert held_bytes(local.shard) == 0
