"""The language beside tensor operations in the body of a map: each prompt gets what a trace of it alone gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small import small_llama

import polytrace

PROMPTS = [[5, 9, 2, 7, 1], [3, 4, 8], [60, 13, 44, 7], [2, 50]]
SEED = 11


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder: Path = tmp_path_factory.mktemp("llama")
    small_llama(num_hidden_layers=2).save_pretrained(folder)
    with polytrace.load(str(folder), threads=1) as loaded:
        yield loaded


def chosen(model: Any) -> Any:
    """By a number of each prompt's own."""
    hidden = model.model.layers[0].output[0]
    return polytrace.cond(hidden[:, -1, 0] > 0, hidden[:, -1], hidden[:, 0] * 3)


def chosen_for_all(model: Any) -> Any:
    hidden = model.model.layers[0].output[0]
    return polytrace.cond(model.lm_head.weight.sum() > 0, hidden[:, -1], hidden[:, 0])


def heads_of_an_operation(model: Any) -> Any:
    """A call inside of a forward, whose tokens are in dimension 2: [1, heads, tokens, features]."""
    return model.model.layers[0].self_attn.source.transpose_0.output[:, 2, -1]


def an_operation_changed(model: Any) -> Any:
    model.model.layers[0].self_attn.source.transpose_0.output[:, 1] = 0.0
    return model.lm_head.output[:, -1]


def a_layer_skipped(model: Any) -> Any:
    model.model.layers[1].skip(model.model.layers[0].output * 2)
    return model.lm_head.output[:, -1]


def weights_of_attention(model: Any) -> Any:
    return model.model.layers[1].self_attn.pattern[:, :, -1].mean(1).amax(-1)


def a_module_called(model: Any) -> Any:
    return model.lm_head(model.model.norm(model.model.layers[0].output[0][:, -1]))


def drawn(model: Any) -> Any:
    return torch.nn.functional.dropout(model.model.layers[0].output[0][:, -1], 0.5)


BODIES = (
    chosen,
    chosen_for_all,
    heads_of_an_operation,
    an_operation_changed,
    a_layer_skipped,
    weights_of_attention,
    a_module_called,
    drawn,
)


@pytest.mark.parametrize("body", BODIES, ids=lambda body: str(body.__name__))
def test_a_map_gives_each_prompt_what_a_trace_of_it_gives(model: Any, body: Callable[[Any], Any]) -> None:
    alone = []
    for number, prompt in enumerate(PROMPTS):
        with model.trace(prompt, seed=SEED + number):  # a map's draws are by the seed and the prompt's number
            value = body(model).save()
        alone.append(value)
    parts = list(model.map(PROMPTS, lambda: {"value": body(model)}, seed=SEED))
    assert not any(part.is_whole for part in parts)
    rows = [row for part in parts for row in part.rows("value")]
    assert all(torch.equal(row, one[0]) for row, one in zip(rows, alone, strict=True))
    assert len({tuple(row.flatten().tolist()) for row in rows}) == len(PROMPTS)


@pytest.mark.parametrize(
    "body",
    [
        lambda model: polytrace.cond(model.model.layers[0].output[0].sum() > 0, *[model.lm_head.output[:, -1]] * 2),
        lambda model: model.model.layers[0].self_attn.source.transpose_0.output.mean(0, keepdim=True),
        lambda model: torch.nn.functional.batch_norm(model.lm_head.output.mT, None, None, training=True),
    ],
)
def test_a_body_that_looks_at_several_prompts_takes_all_of_them_at_once(model: Any, body: Callable[[Any], Any]) -> None:
    prompts = [prompt[:2] for prompt in PROMPTS]
    (part,) = model.map(prompts, lambda: {"value": body(model)})
    with model.trace(prompts):
        value = body(model).save()
    assert part.is_whole and torch.equal(torch.as_tensor(part["value"]), value)


def test_what_stands_on_the_service_is_told_apart(model: Any) -> None:
    """A state has no content here: two of one shape are two constants all the same."""
    width = model.config["hidden_size"]
    first, second = model.state("first", torch.ones(width)), model.state("second", torch.full((width,), 3.0))

    def body() -> Any:
        return {"value": model.model.layers[0].output[0][:, -1] * first - second}

    rows = [row for part in model.map(PROMPTS, body) for row in part.rows("value")]
    for row, prompt in zip(rows, PROMPTS, strict=True):
        with model.trace(prompt):
            plain = model.model.layers[0].output[0][:, -1].save()
        assert torch.equal(row, plain[0] - 3.0)
