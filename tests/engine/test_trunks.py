"""Rows that one pass leaves for the next: a sweep of several passes runs what its forks have in common once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import model_of
from programs import few_rows
from torch import Tensor

from engine.local import LocalBackend
from polytrace.certificate import Receipt
from polytrace.model import Model

TOKENS = [*range(5, 45)]
CHANGED = [*TOKENS[:7], 91, *TOKENS[8:]]


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> LocalBackend:
    folder: Path = tmp_path_factory.mktemp("llama")
    model_of("llama").save_pretrained(folder)
    return LocalBackend(str(folder), threads=1)


def sweep(backend: LocalBackend, sharing: str = "tenant") -> tuple[list[Tensor], Receipt]:
    """Patches of one prompt with another's residuals, and reads of all that happens inside layers."""
    model: Any = Model(backend)
    layers = model.model.layers
    saved: list[Any] = []
    with model.trace(sharing=sharing) as tracer:
        with tracer.invoke([TOKENS]):
            clean = [layer.output[0] for layer in layers]
        with tracer.invoke([CHANGED]):
            saved.append(model.lm_head.output[:, -1].save())
        for number, layer in enumerate(layers):
            for token in (7, 20, 33, 39):
                with tracer.invoke([CHANGED]):
                    layer.output[0][:, token] += clean[number][:, token]
                    saved.append(model.lm_head.output[:, -1].save())
                    if token == 33:  # an output that the trunk has, and an inside that it has not
                        saved += [layer.output[0].save(), layers[-1].mlp.output[:, 3:].save()]
        with tracer.invoke([CHANGED]):  # not finite, far behind the beginning
            layers[0].self_attn.output[0][:, 36] = float("inf")
            saved.append(model.lm_head.output[:, 30:].save())
    assert tracer.receipt is not None
    return saved, tracer.receipt


def same(one: Tensor, other: Tensor) -> bool:
    """Bit for bit, what is not a number included."""
    return torch.equal(one.isnan(), other.isnan()) and torch.equal(one.nan_to_num(), other.nan_to_num())


def test_a_sweep_of_several_passes_runs_its_base_once(backend: LocalBackend) -> None:
    whole, one = sweep(backend, sharing="off")
    with few_rows(backend, 60):
        kept, several = sweep(backend)
        assert backend.scheduler._room.memory.taken_bytes == 0, "given back at the end"
    with few_rows(backend, 60, trunk_bytes=0):
        anew, without = sweep(backend)
    assert len(several.passes) > 5 and len(one.passes) == 1
    assert all(map(same, kept, whole))
    assert all(map(same, anew, whole))
    assert not torch.equal(whole[0], whole[1]), "an edit that was dropped would be seen"
    for receipt in (several, without):
        assert receipt.token_layers == sum(sum(entry.layer_rows) for entry in receipt.passes)
    assert several.token_layers < 0.6 * without.token_layers
    assert backend.shard.store.held_bytes == 0


def test_a_wave_that_needs_a_later_layer_goes_on_from_where_it_was(backend: LocalBackend) -> None:
    """A value of the last layer is written into the second, at the last token: only its row runs again."""
    model: Any = Model(backend)
    layers = model.model.layers

    def run(sharing: str) -> tuple[list[Tensor], Receipt]:
        with model.trace(sharing=sharing) as tracer:
            with tracer.invoke([TOKENS]):
                late = layers[-1].output[0][:, -1]
            with tracer.invoke([CHANGED]):
                first = layers[0].output[0].save()
                before = layers[0].mlp.output[:, -1].save()
                layers[1].output[0][:, -1] += late
                logits = model.lm_head.output[:, -1].save()
        assert tracer.receipt is not None
        return [first, before, logits], tracer.receipt

    values, receipt = run("tenant")
    expected, alone = run("off")
    assert all(map(torch.equal, values, expected))
    assert [len(each.passes) for each in (receipt, alone)] == [2, 2]
    tokens, layer_count = len(TOKENS), backend.description.num_layers
    # The first pass runs both prompts, their seven common tokens once; the second the last token from layer 2 on.
    assert receipt.token_layers == (2 * tokens - 7) * layer_count - (layer_count - 2) + layer_count - 2
    assert sum(receipt.passes[1].layer_rows) == layer_count - 2
    assert alone.token_layers > 1.3 * receipt.token_layers


def test_a_request_that_ends_between_its_waves_leaves_nothing(backend: LocalBackend) -> None:
    model: Any = Model(backend)
    layers = model.model.layers
    with model.trace(run=False) as tracer:
        with tracer.invoke([TOKENS]):
            late = layers[-1].output[0][:, -1]
            beyond = (late[:1, 0] > -1e9).sum() + 1000  # known only when it runs
        with tracer.invoke([CHANGED]):
            layers[1].output[0][:, -1] = late
            layers[0].output[0][:, -1] = torch.zeros(32)[beyond] + late
            model.lm_head.output[:, -1].save()
    (failed,) = backend.run_together([backend.work_out(tracer.built_request())])
    assert failed.error is not None
    sweep(backend)
    assert backend.shard.store.held_bytes == 0
    assert backend.scheduler._room.memory.taken_bytes == 0
