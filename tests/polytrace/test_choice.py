"""polytrace.cond takes one side whole, by a number that only the run knows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import polytrace
from polytrace.errors import GraphError

PROMPT, OTHER = [1, 2, 3], [4, 5, 6]


@pytest.fixture(scope="module")
def plain() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=32, n_positions=64, n_embd=8, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=1,
        initializer_range=0.5,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


@pytest.fixture(scope="module")
def model(plain: GPT2LMHeadModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder: Path = tmp_path_factory.mktemp("gpt2")
    plain.save_pretrained(folder)
    with polytrace.load(str(folder), threads=1) as loaded:
        yield loaded


def by_hand(plain: GPT2LMHeadModel, prompt: list[int], threshold: float) -> Tensor:
    """Logits with the first layer's output halved where its norm is above the threshold."""

    def edit(module: Any, args: Any, output: Tensor) -> Tensor:
        return output * 0.5 if float(output.norm()) > threshold else output

    handle = plain.transformer.h[0].register_forward_hook(edit)
    with torch.no_grad():
        logits: Tensor = plain(torch.tensor([prompt])).logits
    handle.remove()
    return logits


def norm_of(plain: GPT2LMHeadModel, prompt: list[int]) -> float:
    with torch.no_grad():
        return float(plain(torch.tensor([prompt]), output_hidden_states=True).hidden_states[1].norm())


@pytest.mark.parametrize("prompt", [PROMPT, OTHER])
def test_an_edit_by_a_gate_is_the_edit_of_a_hook_with_an_if(
    model: Any, plain: GPT2LMHeadModel, prompt: list[int]
) -> None:
    threshold = (norm_of(plain, PROMPT) + norm_of(plain, OTHER)) / 2
    with model.trace(prompt):
        hidden = model.transformer.h[0].output[0]
        model.transformer.h[0].output[0][:] = polytrace.cond(hidden.norm() > threshold, lambda: hidden * 0.5, hidden)
        logits = model.lm_head.output.save()
    expected = by_hand(plain, prompt, threshold)
    assert float((logits - expected).abs().max()) <= 1e-5 * max(1.0, float(expected.abs().max()))  # float32
    other = by_hand(plain, prompt, -1.0 if norm_of(plain, prompt) < threshold else 1e9)
    assert float((expected - other).abs().max()) > 0.1


def test_nothing_of_the_other_side_leaks_and_structures_are_kept(model: Any) -> None:
    with model.trace(PROMPT):
        hidden = model.transformer.h[0].mlp.output
        broken = hidden / 0 * 0
        is_positive = (hidden - hidden).sum() == 0
        first = polytrace.cond(is_positive, {"h": hidden, "pair": (hidden[0], [hidden[:, 0]])},
                               lambda: {"h": broken, "pair": (broken[0], [broken[:, 0]])})  # fmt: skip
        second = polytrace.cond(~is_positive, broken, lambda: torch.zeros_like(hidden))
        by_count = polytrace.cond((hidden > 1e9).sum(), torch.ones(3), (hidden[0, :, 0] * 0 + 2))
        nested = polytrace.cond(is_positive, lambda: polytrace.cond(~is_positive, broken, hidden), broken)
        whole, inner = hidden.save(), first["pair"][1][0].save()
        h, zeros, number, chosen = first["h"].save(), second.save(), by_count.save(), nested.save()
        assert isinstance(first["pair"], tuple) and first["pair"][0].shape == (3, 8)
    assert torch.equal(h, whole) and torch.equal(inner, whole[:, 0]) and torch.equal(chosen, whole)
    assert not zeros.any() and number.tolist() == [2, 2, 2]


def test_a_body_may_change_what_it_made_itself(model: Any) -> None:
    def body(hidden: Any) -> Any:
        made = hidden.clone()
        made[..., 0] = 7
        made += 1
        return made

    with model.trace(PROMPT):
        hidden = model.transformer.h[0].mlp.output
        out = polytrace.cond(hidden.norm() > 0, lambda: body(hidden), hidden).save()
        before = hidden.save()
    assert torch.equal(out[..., 1:], before[..., 1:] + 1) and torch.equal(out[..., 0], torch.full((1, 3), 8.0))


def refused(model: Any, program: Any, message: str) -> None:
    with pytest.raises(GraphError, match=message) as caught, model.trace(PROMPT):
        program(model.transformer.h[0].mlp.output).save()
    assert caught.value.where is not None and caught.value.where.startswith("test_choice.py")


def test_what_cannot_be_chosen_is_refused_at_the_user_s_line(model: Any) -> None:
    cond = polytrace.cond
    refused(model, lambda h: cond(True, h, h), "a bool is known now: write `if`")
    refused(model, lambda h: cond(h > 0, h, h), r"has shape \[1, 3, 8\]: reduce it with \.any\(\)")
    refused(model, lambda h: cond(h.sum() > 0, h, h[0]), r"float32\[1, 3, 8\] and float32\[3, 8\]: they need one shape")
    refused(model, lambda h: cond(h.sum() > 0, h, h.half()), r"float32\[1, 3, 8\] and float16\[1, 3, 8\]")
    refused(model, lambda h: cond(h.sum() > 0, h, 0.0), r"is a float: both are values .*; write torch\.full_like")
    refused(model, lambda h: cond(h.sum() > 0, [h], [h, h])[0], "have 1 and 2 values")
    refused(model, lambda h: cond(h.sum() > 0, {"a": h}, {"b": h})["a"], "differ in keys: a, b")
    refused(model, lambda h: cond(h.sum() > 0, {"a": [h]}, {"a": [h[0]]})["a"][0], r"at \['a'\]\[0\]")


def test_in_place_code_on_what_is_not_its_own_is_refused_in_a_body(model: Any) -> None:
    def edge(hidden: Any) -> Any:
        model.transformer.h[1].mlp.output = hidden
        return hidden

    def site(hidden: Any) -> Any:
        hidden[:] = 0
        return hidden

    def value(hidden: Any) -> Any:
        scaled = hidden * 2

        def body() -> Any:
            scaled.add_(1)
            return scaled

        return polytrace.cond(hidden.sum() > 0, body, hidden)

    for body in (edge, site):
        refused(model, lambda h, body=body: polytrace.cond(h.sum() > 0, lambda: body(h), h), "whichever side is taken")
    refused(model, value, "whichever side is taken")
