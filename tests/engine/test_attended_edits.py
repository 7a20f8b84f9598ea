"""Edits inside of attention at a step: what is put down is what later steps attend to, a row's scores are its own.

Against Hugging Face with a cache and hooks of the test's own, a sequence alone, in float32: max|a - b| <= 1e-5 max(1,
max|b|).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attended_by_hand
import pytest
import torch
from attended_by_hand import LAYER, ByHand, Edit
from families import model_of
from small import close
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import polytrace

STEPS = 5
PROMPTS = ([5, 9, 23, 4, 61, 7, 11, 12, 40], [8, 2, 30])


@pytest.fixture(scope="module", params=["gpt2", "gemma2", "qwen3", "mistral"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    model_of(request.param).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return polytrace.load(str(folder), dtype="float32", threads=1)


@pytest.fixture(scope="module")
def plain(folder: Path) -> PreTrainedModel:
    return attended_by_hand.use(AutoModelForCausalLM.from_pretrained(folder).eval())


@pytest.fixture(scope="module")
def base(plain: PreTrainedModel) -> list[ByHand]:
    return [attended_by_hand.run(plain, prompt, STEPS) for prompt in PROMPTS]


def changed(point: str, value: Any) -> Any:
    """What an edit makes of a point; of the last token, and in columns that pads do not move."""
    value = value.clone()
    if point == "scores":
        value[:, 0, :, -3:-1] = -torch.inf
        value[:, 1:] *= 0.25
    elif point == "pattern":
        value[:, :, :, -1] = 0.75
        value[:, 1, :, -3:-1] *= 2.0
    else:
        value[:, -1] *= -3.0
    return value


def at(point: str, step: int) -> Edit:
    return lambda own, now, value: changed(point, value) if (own, now) == (point, step) else value


def edited(model: Any, point: str, step: int) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """Logits of the last tokens, keys and values at each step; logits of somebody beside it who edits nothing."""
    logits, keys, values, beside = [], [], [], []
    with model.generate(max_new_tokens=STEPS, eos=()) as tracer:
        with tracer.invoke([list(prompt) for prompt in PROMPTS]):
            for now in tracer.iter[:]:
                attention = model.layers[LAYER].self_attn
                keys.append(attention.keys.save())
                values.append(attention.values.save())
                if now == step:
                    setattr(attention, point, changed(point, getattr(attention, point)))
                logits.append(model.logits[:, -1].save())
        with tracer.invoke(list(PROMPTS[0])):
            for _ in tracer.iter[:]:
                beside.append(model.logits[0, -1].save())
    return logits, keys, values, beside


@pytest.mark.parametrize("step", [0, 2])
@pytest.mark.parametrize("point", ["k", "k_rot", "v"])
def test_an_edit_of_a_key_or_a_value_is_what_later_steps_attend_to(
    model: Any, plain: PreTrainedModel, base: list[ByHand], point: str, step: int
) -> None:
    logits, keys, values, beside = edited(model, point, step)
    for now in range(STEPS):
        close(beside[now], base[0].logits[now])
    for place, prompt in enumerate(PROMPTS):
        by_hand = attended_by_hand.run(plain, prompt, STEPS, at(point, step))
        for now in range(STEPS):
            close(logits[now][place], by_hand.logits[now])
            close(keys[now][place, -len(by_hand.keys[now]) :], by_hand.keys[now])
            close(values[now][place, -len(by_hand.values[now]) :], by_hand.values[now])
        moved = [
            float((own - other).abs().max()) for own, other in zip(by_hand.logits, base[place].logits, strict=True)
        ]
        assert max(moved[:step], default=0.0) == 0.0
        assert min(moved[step + 1 :]) > 1e-3, "later steps attend to what it has become"


@pytest.mark.parametrize("point", ["scores", "pattern"])
def test_an_edit_of_scores_or_a_pattern_behind_the_prompt_is_of_its_step(
    model: Any, plain: PreTrainedModel, base: list[ByHand], point: str
) -> None:
    step = 2
    logits, keys, _, beside = edited(model, point, step)
    for now in range(STEPS):
        close(beside[now], base[0].logits[now])
    for place, prompt in enumerate(PROMPTS):
        by_hand = attended_by_hand.run(plain, prompt, STEPS, at(point, step))
        for now in range(STEPS):
            close(logits[now][place], by_hand.logits[now])
            close(keys[now][place, -len(by_hand.keys[now]) :], by_hand.keys[now])
        assert float((by_hand.logits[step] - base[place].logits[step]).abs().max()) > 1e-3


def test_the_formula_by_hand_is_that_of_eager_attention(
    folder: Path, plain: PreTrainedModel, base: list[ByHand]
) -> None:
    eager = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    for prompt, by_hand in zip(PROMPTS, base, strict=True):
        with torch.no_grad():
            logits = eager(torch.tensor([[*prompt, *by_hand.tokens[:-1]]])).logits[0, len(prompt) - 1 :]
        close(torch.stack(by_hand.logits), logits)
