"""Inside a pass on one GPU the host never waits for it: run by `make gpu-test` only."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from families import model_of
from programs import few_rows

from engine.local import LocalBackend
from polytrace.model import Model
from polytrace.wire import encode_request
from scheduling.loop import step
from scheduling.plan import Plan, Program, RequestId

pytestmark = pytest.mark.gpu

TOKENS = [*range(5, 45)]
CHANGED = [*TOKENS[:7], 91, *TOKENS[8:]]


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalBackend]:
    folder = tmp_path_factory.mktemp("llama")
    model_of("llama").save_pretrained(folder)
    backend = LocalBackend(str(folder), device="cuda")
    yield backend
    backend.close()


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Strict:
    """Shards on which a pass fails when the host waits for the GPU in it."""

    def __init__(self, shards: Any) -> None:
        self._shards = shards
        self.have_room, self.finished = shards.have_room, shards.finished
        self.num_passes = 0

    def submit(self, plan: Plan) -> None:
        self.num_passes += 1
        with waiting_is_an_error():
            self._shards.submit(plan)


def run(backend: LocalBackend, programs: list[Program], shards: Any) -> list[dict[str, Any]]:
    for program in programs:
        backend.scheduler.add(program)
    values: dict[RequestId, Any] = {}
    while len(values) < len(programs):
        step(backend.scheduler, shards)
        for outcome in backend.scheduler.take_outcomes():
            assert outcome.error is None, outcome.error
            values[outcome.request] = outcome.values
    return [values[program.request] for program in programs]


def merged(model: Any) -> list[Any]:
    """Requests that read, compute and write in most ways that do not hang on the values themselves."""
    layers = model.model.layers
    tracers = []
    with model.trace([TOKENS, TOKENS[:9]], run=False) as tracer:  # of unequal length, with the mask
        hidden = layers[1].output[0]
        (hidden * tracer.mask[..., None]).sum(1).save()
        layers[1].output[0][:, -1] += 0.5 * torch.ones(32)
        layers[2].mlp.output = layers[2].mlp.output * 2.0
        layers[2].mlp.output[:, [3, 5]].save()
        model.lm_head.output[:, -1].softmax(-1).topk(3).indices.save()
    tracers.append(tracer)
    with model.trace(run=False) as tracer:  # forks of one prompt, and values that flow between prompts
        with tracer.invoke([TOKENS]):
            clean = [layer.output[0] for layer in layers]
        for number, layer in enumerate(layers):
            with tracer.invoke([CHANGED]):
                layer.output[0][:, 20] = clean[number][:, 20]
                model.lm_head.output[:, -1].save()
    tracers.append(tracer)
    return tracers


def sweep(model: Any) -> Any:
    """Several passes, of which later ones fork from what the first left in the store."""
    with model.trace(run=False) as tracer:
        with tracer.invoke([TOKENS]):
            clean = [layer.output[0] for layer in model.model.layers]
        for number, layer in enumerate(model.model.layers):
            for token in (7, 20, 33, 39):
                with tracer.invoke([CHANGED]):
                    layer.output[0][:, token] += clean[number][:, token]
                    layer.output[0].save()
                    model.lm_head.output[:, -1].save()
    return tracer


def test_a_merged_pass_never_waits_and_saves_what_it_saves_without_the_check(
    backend: LocalBackend, tmp_path: Path
) -> None:
    """Saves go to files, constants come from them, as on a cluster."""
    tracers = merged(Model(backend))
    programs = [backend.work_out(tracer.built_request()) for tracer in tracers]
    expected = run(
        backend, [dataclasses.replace(p, request=RequestId(f"e{p.request}")) for p in programs], backend.shards
    )
    strict = Strict(backend.shards)
    stored = []
    for number, (tracer, program) in enumerate(zip(tracers, programs, strict=True)):
        source, result = tmp_path / f"{number}.request", tmp_path / f"{number}.result"
        source.write_bytes(b"".join(encode_request(tracer.built_request())))
        result.write_bytes(bytes(max(slot.offset + slot.facts.num_bytes for slot in program.saves)))
        stored.append(dataclasses.replace(program, constants={}, request_file=str(source), result_file=str(result)))
    run(backend, stored, strict)
    assert strict.num_passes >= 1
    for program, values in zip(stored, expected, strict=True):
        data = bytearray(Path(str(program.result_file)).read_bytes())
        for slot in program.saves:
            raw = data[slot.offset : slot.offset + slot.facts.num_bytes]
            found = torch.frombuffer(raw, dtype=getattr(torch, slot.facts.dtype)).reshape(slot.facts.shape)
            assert torch.equal(found, values[slot.name].cpu())


def test_a_sweep_over_several_passes_never_waits(backend: LocalBackend) -> None:
    with few_rows(backend, 60):
        program = backend.work_out(sweep(Model(backend)).built_request())
        (expected,) = run(backend, [dataclasses.replace(program, request=RequestId("e"))], backend.shards)
        strict = Strict(backend.shards)
        (values,) = run(backend, [program], strict)
    assert strict.num_passes > 2
    for name, value in expected.items():
        assert torch.equal(values[name], value)
