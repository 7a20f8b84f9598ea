"""The bytes of a shard that a certificate says are enough for what its pass allocates, and not many times too many."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

import polytrace
from polytrace.model import Model
from polytrace.tracing import Tracer

PROMPT = [number % 1900 + 1 for number in range(700)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    folder = tmp_path_factory.mktemp("memory")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2000,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=2048,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    model = polytrace.load(str(folder), threads=1)
    yield model
    model.close()


def plain(model: Model) -> None:
    model.model.layers[2].output[0][:, -1].save()


def logits(model: Model) -> None:
    model.lm_head.output.save()


def values(model: Model) -> None:
    hidden = model.model.layers[0].output[0]
    products = hidden @ hidden.transpose(1, 2)
    model.model.layers[1].output[0][:, -1] += products[:, -1, :256]
    model.model.layers[2].output[0][:, -1].save()


@pytest.mark.parametrize("program", [plain, logits, values])
def test_a_shards_bytes_are_enough(model: Model, program: Callable[[Model], None]) -> None:
    def run() -> Tracer:
        with model.trace(PROMPT) as tracer:
            program(model)
        return tracer

    run()  # what is made once is there
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        tracer = run()
    certified, measured = model.validate(tracer).shard_bytes, peak(profiled)
    assert measured <= certified <= 3 * measured, (measured, certified)


def peak(profiled: profile) -> int:
    """The most bytes that were allocated at once, beyond those that there were."""
    results = profiled.profiler.kineto_results  # type: ignore[union-attr]
    changes = sorted((event.start_ns(), event.nbytes()) for event in results.events() if event.name() == "[memory]")
    held = most = 0
    for _, change in changes:
        held += change
        most = max(most, held)
    return most
