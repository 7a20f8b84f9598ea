"""`.inputs`: every argument of a call, against hand-written pre-hooks on the plain model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import FAMILIES, model_of
from programs import difference, find
from torch import Tensor

from engine.local import LocalBackend
from polytrace.errors import GraphError
from polytrace.model import Model

TOLERANCE = 1e-5  # of max(1, max|plain|), float32
PROMPTS = [[7, 3, 5, 9, 11, 2, 4], [7, 3, 5, 1]]
LAYER = 2

Change = Callable[[tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Any]]:
    made: dict[str, tuple[Any, Any]] = {}

    def get(family: str) -> tuple[Any, Any]:
        if family not in made:
            folder, plain = tmp_path_factory.mktemp(family), model_of(family)
            plain.save_pretrained(folder)
            made[family] = plain, Model(LocalBackend(str(folder), threads=1))
        return made[family]

    return get


def _by_hand(plain: Any, path: str, prompt: list[int], change: Change | None) -> tuple[Any, Tensor]:
    """The arguments of a module's call, and the logits behind what `change` makes of them."""
    seen: list[Any] = []

    def hook(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        seen.append((args, kwargs))
        return None if change is None else change(args, kwargs)

    handle = plain.get_submodule(path).register_forward_pre_hook(hook, with_kwargs=True)
    with torch.no_grad():
        logits = plain(input_ids=torch.tensor([prompt]), use_cache=False).logits
    handle.remove()
    return seen[0], logits


def _scaled(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The last token's rotation changed, for this call alone; and its hidden states."""
    cos, sin = kwargs["position_embeddings"]
    cos = torch.cat([cos[:, :-1], cos[:, -1:] * -3.0], 1)
    hidden = torch.cat([kwargs["hidden_states"][:, :-1], kwargs["hidden_states"][:, -1:] + 1.0], 1)
    return args, {**kwargs, "position_embeddings": (cos, sin), "hidden_states": hidden}


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3", "mixtral", "phi"])
def test_arguments_by_keyword_are_read_and_assigned_and_neighbours_change_no_bit(models: Any, family: str) -> None:
    plain, model = models(family)
    path = f"{FAMILIES[family].layers}.{LAYER}.self_attn"

    def ask(prompts: list[list[int]], *, changed: bool) -> list[Tensor]:
        with model.trace(prompts):
            attention = find(model, path)
            if changed:
                cos, sin = attention.inputs[1]["position_embeddings"]
                cos = cos.clone()
                cos[:, -1] *= -3.0
                attention.inputs[1]["position_embeddings"] = (cos, sin)
                attention.inputs[1]["hidden_states"] = attention.input + 0.0  # the input, by its name
                attention.input[:, -1] += 1.0
            rotation = attention.inputs[1]["position_embeddings"]
            return [
                attention.inputs[1]["hidden_states"].save(),
                rotation[0].save(),
                rotation[1].save(),
                attention.inputs[1]["position_ids"].save(),
                model.output.logits.save(),
            ]

    for changed in (False, True):
        together = ask(PROMPTS, changed=changed)
        for number, prompt in enumerate(PROMPTS):
            (_, kwargs), logits = _by_hand(plain, path, prompt, _scaled if changed else None)
            if changed:
                kwargs = _scaled((), kwargs)[1]
            cos, sin = kwargs["position_embeddings"]
            expected = [kwargs["hidden_states"], cos, sin, torch.arange(len(prompt))[None], logits]
            own = [value[number : number + 1, -len(prompt) :] for value in together]
            assert difference(own[:3] + own[4:], expected[:3] + expected[4:]) <= TOLERANCE
            assert torch.equal(own[3], expected[3])
            assert all(map(torch.equal, own, ask([prompt], changed=changed)))
            if changed:
                assert difference(own[4:], [_by_hand(plain, path, prompt, None)[1]]) > 1000 * TOLERANCE


@pytest.mark.parametrize("whole", [True, False])
def test_what_experts_are_given_is_changed_by_its_place(models: Any, whole: bool) -> None:
    plain, model = models("mixtral")
    path = f"model.layers.{LAYER}.mlp.experts"

    def by_hand(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        hidden, chosen, weights = args
        return (hidden, chosen, torch.cat([weights[:-1], weights[-1:] * 0.25])), kwargs

    with model.trace(PROMPTS):
        experts = find(model, path)
        if whole:
            weights = experts.inputs[0][2].clone()
            weights[:, -1] *= 0.25
            args = experts.inputs[0]
            experts.inputs = ((*args[:2], weights), {})
        else:
            experts.inputs[0][2][:, -1] *= 0.25
        weights = experts.inputs[0][2].save()
        logits = model.lm_head.output.save()
    for number, prompt in enumerate(PROMPTS):
        (args, _), expected = _by_hand(plain, path, prompt, by_hand)
        untouched = _by_hand(plain, path, prompt, None)[1]
        own = logits[number, -len(prompt) :]
        assert difference([own], [expected[0]]) <= TOLERANCE < difference([own], [untouched[0]]) / 1000
        assert difference([weights[number, -1]], [args[2][-1] * 0.25]) <= TOLERANCE


def test_all_arguments_are_saved_at_once(models: Any) -> None:
    plain, model = models("mixtral")
    path = f"model.layers.{LAYER}.self_attn"
    with model.trace(PROMPTS[0]):
        args, kwargs = find(model, path).inputs.save()
        of_experts = model.model.layers[LAYER].mlp.experts.inputs.save()
    (_, expected), _ = _by_hand(plain, path, PROMPTS[0], None)
    assert args == () and set(kwargs) == {"hidden_states", "position_ids", "position_embeddings"}
    assert difference([kwargs.hidden_states], [expected["hidden_states"]]) <= TOLERANCE
    assert difference([*kwargs["position_embeddings"]], [*expected["position_embeddings"]]) <= TOLERANCE
    assert [value.shape[:2] for value in of_experts[0]] == [(1, 7)] * 3 and of_experts[1] == {}


def test_the_first_argument_is_the_input_by_whichever_name(models: Any) -> None:
    _, model = models("llama")
    layer, path = model.model.layers[LAYER], "self_attn"
    with model.trace(PROMPTS[0]):
        layer.input[:, -1] *= 2.0
        layer.inputs[0][0][:, -1] += 1.0
        both = layer.inputs[0][0].save()
        attention = find(layer, path)
        named = (attention.inputs[1]["hidden_states"] - attention.input).abs().max().save()
        logits = model.lm_head.output.save()
    with model.trace(PROMPTS[0]):
        before = layer.input.save()
        layer.input[:, -1] = layer.input[:, -1] * 2.0 + 1.0
        expected = model.lm_head.output.save()
    assert torch.equal(both[:, -1], before[:, -1] * 2.0 + 1.0) and torch.equal(logits, expected) and float(named) == 0.0


REFUSALS: dict[str, Callable[[Any], object]] = {
    r"inputs\[1\]\.position_embeddings\[0\] cannot be changed in place: every layer": lambda layer: layer.inputs[1][
        "position_embeddings"
    ][0].mul_(2.0),
    r"no attention mask: .*tracer\.mask": lambda layer: layer.self_attn.inputs[1]["attention_mask"],
    "cannot be written: it holds token ids or positions": lambda layer: layer.inputs[1].__setitem__(
        "position_ids", layer.inputs[1]["position_ids"] * 2
    ),
    "no tensor at 'positions'; it has 'position_embeddings', 'position_ids'": lambda layer: layer.inputs[1][
        "positions"
    ],
    "0 for positional arguments, 1 for those by keyword": lambda layer: layer.inputs[2],
}


@pytest.mark.parametrize("told", REFUSALS)
def test_what_cannot_be_is_refused_by_name(models: Any, told: str) -> None:
    _, model = models("llama")
    with pytest.raises(GraphError, match=told), model.trace(PROMPTS[0]):
        REFUSALS[told](model.model.layers[LAYER])
