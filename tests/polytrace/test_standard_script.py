"""examples/standard_names.py on six families, the model the only change, against each one's hooks over plain HF."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, few_of, model_of
from programs import difference
from torch import Tensor

import polytrace

SCRIPT = runpy.run_path(str(Path(__file__).resolve().parents[2] / "examples" / "standard_names.py"))
TOLERANCE = 1e-5  # of max(1, max|plain|), float32
CLEAN, CORRUPT, OTHER = [7, 3, 5, 9, 11], [7, 3, 8, 9, 2, 4], [1, 2, 3]
HEADS, SIZE = 4, 8
Hook = Callable[..., Any]


@pytest.fixture(scope="module", params=few_of(["gpt2", "llama", "gemma2", "qwen3", "gpt_neox", "mixtral"]))
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder, plain = tmp_path_factory.mktemp("model"), model_of(request.param)
    plain.save_pretrained(folder)
    return request.param, plain, polytrace.load(str(folder), threads=1)


def _run(
    plain: Any, prompt: list[int], after: dict[str, Hook] | None = None, before: dict[str, Hook] | None = None
) -> Tensor:
    """The logits `[tokens, vocabulary]`, with hooks by path."""
    with ExitStack() as stack, torch.no_grad():
        for path, hook in (after or {}).items():
            stack.callback(plain.get_submodule(path).register_forward_hook(hook).remove)
        for path, hook in (before or {}).items():
            stack.callback(plain.get_submodule(path).register_forward_pre_hook(hook).remove)
        logits: Tensor = plain(input_ids=torch.tensor([prompt]), use_cache=False).logits[0]
    return logits


def _hidden(plain: Any, family: str, layer: int, prompt: list[int]) -> Tensor:
    """What a layer gives, `[tokens, hidden]`."""
    seen: list[Tensor] = []
    _run(plain, prompt, {f"{FAMILIES[family].layers}.{layer}": lambda _m, _a, out: seen.append(out[0].clone())})
    return seen[0]


def test_the_logit_lens_is_that_of_hooks(served: Any) -> None:
    family, plain, model = served
    tokens, probabilities = SCRIPT["logit_lens"](model, CLEAN, top=5)
    norm = plain.get_submodule(FAMILIES[family].norm)
    for layer in range(FAMILIES[family].num_layers):
        with torch.no_grad():
            expected = plain.lm_head(norm(_hidden(plain, family, layer, CLEAN)[-1])).softmax(-1)
        assert difference([probabilities[layer]], [expected.topk(5).values]) <= TOLERANCE
        assert difference([expected[tokens[layer]]], [expected.topk(5).values]) <= TOLERANCE
    assert probabilities.shape == (4, 5)


def test_head_patching_is_that_of_hooks(served: Any) -> None:
    family, plain, model = served
    patched = SCRIPT["head_patching"](model, CLEAN, CORRUPT)
    bare = _run(plain, CORRUPT)[-1]
    for layer in range(FAMILIES[family].num_layers):
        path = f"{FAMILIES[family].layers}.{layer}.{FAMILIES[family].out_projection}"
        found: list[Tensor] = []
        _run(plain, CLEAN, before={path: lambda _m, args, found=found: found.append(args[0][:, -1].clone())})
        for head in range(HEADS):
            part = slice(head * SIZE, (head + 1) * SIZE)

            def patch(_module: Any, args: Any, part: slice = part, clean: Tensor = found[0]) -> Any:
                z = args[0].clone()
                z[:, -1, part] = clean[:, part]
                return (z, *args[1:])

            expected = _run(plain, CORRUPT, before={path: patch})[-1]
            assert difference([patched[layer, head]], [expected]) <= TOLERANCE, (layer, head)
            assert difference([expected], [bare]) > 10 * TOLERANCE, (layer, head)
    assert patched.shape == (4, HEADS, 96)


def test_steering_is_that_of_hooks(served: Any) -> None:
    family, plain, model = served
    steered = SCRIPT["steering"](model, OTHER, CLEAN, CORRUPT, 2, 1.5)
    vector = _hidden(plain, family, 2, CLEAN)[-1] - _hidden(plain, family, 2, CORRUPT)[-1]

    def steer(_module: Any, _args: Any, out: Tensor) -> Tensor:
        out = out.clone()
        out[:, -1] += 1.5 * vector
        return out

    expected = _run(plain, OTHER, {f"{FAMILIES[family].layers}.2": steer})[-1].softmax(-1)
    assert difference([steered], [expected]) <= TOLERANCE
    assert difference([expected], [_run(plain, OTHER)[-1].softmax(-1)]) > 10 * TOLERANCE
