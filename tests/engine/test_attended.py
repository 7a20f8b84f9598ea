"""Scores and patterns behind the prompt: a query at each step, and all keys that there are by then."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import model_of
from torch import Tensor
from transformers import AutoModelForCausalLM

import polytrace
from polytrace.errors import GraphError

STEPS = 5
PROMPTS = ([5, 9, 23, 4, 61, 7], [8, 2, 30, 31, 12, 6])


@pytest.fixture(scope="module", params=["llama", "gemma2", "gpt2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    model_of(request.param).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return polytrace.load(str(folder), dtype="float32", threads=1)


def by_hand(folder: Path, layer: int) -> list[Tensor]:
    """What transformers' eager attention looks at, step by step, and the tokens."""
    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    ids = torch.tensor(PROMPTS)
    cache, given, patterns = None, ids, []
    with torch.no_grad():
        for _ in range(STEPS):
            out = plain(given, past_key_values=cache, use_cache=True, output_attentions=True)
            cache, given = out.past_key_values, out.logits[:, -1:].argmax(-1)
            patterns.append(out.attentions[layer])
    return patterns


def test_patterns_of_every_step_are_those_of_hugging_face(folder: Path, model: Any) -> None:
    expected = by_hand(folder, 1)
    seen: list[Any] = []
    with model.generate(list(PROMPTS), max_new_tokens=STEPS, eos=()) as tracer:
        for _ in tracer.iter[:]:
            seen.append(model.layers[1].self_attn.pattern.save())
    for step, (own, theirs) in enumerate(zip(seen, expected, strict=True)):
        queries = len(PROMPTS[0]) if step == 0 else 1
        assert own.shape == theirs.shape == (2, theirs.shape[1], queries, len(PROMPTS[0]) + step)
        assert float((own - theirs).abs().max()) <= 1e-5, step


def test_a_query_that_may_look_at_the_first_token_alone_gets_its_value(model: Any) -> None:
    with model.generate(list(PROMPTS), max_new_tokens=STEPS, eos=()) as tracer:
        for step in tracer.iter[1:]:
            attention = model.layers[0].self_attn
            if step == 2:
                attention.pattern[:] = 0.0
                attention.pattern[..., 0] = 1.0
                z = attention.z.save()
            if step == 3:
                after = attention.pattern.save()
    with model.trace(list(PROMPTS)):
        first = model.layers[0].self_attn.v[:, 0].save()  # the first token's value, of the key/value heads
    heads = z.shape[2] // first.shape[1]
    assert torch.equal(z[:, 0], first.repeat_interleave(heads, 1)), "at step 2 it has the value alone"
    assert float((after.sum(-1) - 1).abs().max()) <= 1e-5 and after.shape[-1] == len(PROMPTS[0]) + 3


def test_who_looks_has_the_bits_that_it_has_alone_and_changes_nobody(model: Any) -> None:
    def look(tracer: Any, seen: list[Any]) -> None:
        for _ in tracer.iter[:]:
            seen.append(model.layers[1].self_attn.pattern.save())

    def tell(tracer: Any, seen: list[Any]) -> None:
        for _ in tracer.iter[:]:
            seen.append(model.logits[:, -1].save())

    alone: list[list[Any]] = [[], []]
    for place, body in enumerate((look, tell)):
        with model.generate(list(PROMPTS[place : place + 1]), max_new_tokens=STEPS, eos=()) as tracer:
            body(tracer, alone[place])
    together: list[list[Any]] = [[], []]
    with model.generate(max_new_tokens=STEPS, eos=()) as tracer:
        for place, body in enumerate((look, tell)):
            with tracer.invoke(list(PROMPTS[place : place + 1])):
                body(tracer, together[place])
    for own, theirs in zip(alone, together, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(own, theirs, strict=True))


def test_what_has_another_shape_at_each_step_is_recorded_for_each(model: Any) -> None:
    with (
        pytest.raises(GraphError, match="another number of keys at each step"),
        model.generate(list(PROMPTS), max_new_tokens=3) as tracer,
        tracer.all(),
    ):
        model.layers[0].self_attn.pattern.save()


@pytest.mark.parametrize("point", ["scores", "pattern"])
def test_prompts_of_different_lengths_are_left_padded_at_every_step(model: Any, point: str) -> None:
    prompts = [PROMPTS[0], PROMPTS[1][:2]]

    def asked(prompts: list[list[int]]) -> list[Any]:
        seen: list[Any] = []
        with model.generate(prompts, max_new_tokens=STEPS, eos=()) as tracer:
            for _ in tracer.iter[:]:
                seen.append(getattr(model.layers[1].self_attn, point).save())
        return seen

    together, masked = asked(prompts), 0.0 if point == "pattern" else -torch.inf
    for place, prompt in enumerate(prompts):
        for step, (own, alone) in enumerate(zip(together, asked([prompt]), strict=True)):
            queries, pads = alone.shape[2], len(prompts[0]) - len(prompt)
            assert own.shape[2:] == ((len(prompts[0]) if step == 0 else 1), len(prompts[0]) + step)
            assert torch.equal(own[place, :, -queries:, pads:], alone[0])
            assert bool((own[place, :, -queries:, :pads] == masked).all())


def test_what_would_count_pads_is_refused_at_every_step(model: Any) -> None:
    with (
        pytest.raises(GraphError, match=r"mean runs over the tokens.*an invoke of its own .*test_attended.py"),
        model.generate([PROMPTS[0], PROMPTS[1][:2]], max_new_tokens=3) as tracer,
    ):
        for _ in tracer.iter[1:]:
            model.layers[0].self_attn.pattern.mean(-1).save()
