"""Steering of chosen prompts, and skipping layers that return more than hidden states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import padded_families
import pytest
import torch
from families import model_of
from torch import Tensor

import polytrace
from polytrace.errors import GraphError

TOLERANCE = 1e-5  # of max(1, max|plain|), float32
PROMPTS = [[7, 3, 5, 9, 11, 2], [7, 3, 5, 1], [8, 25, 1]]
VECTOR = torch.randn(32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("llama")
    model_of("llama").save_pretrained(folder)
    return polytrace.load(str(folder), threads=1)


@pytest.mark.parametrize(
    ("chosen", "places"),
    [
        ({"batch_index": 1}, {1: slice(None)}),
        ({"batch_index": [0, -1]}, {0: slice(None), 2: slice(None)}),
        ({"batch_index": torch.tensor([2])}, {2: slice(None)}),
        ({"batch_index": [0, 1], "token_positions": [2, -1]}, {0: [2], 1: [3]}),
        ({"batch_index": [1, 2], "positions": 0}, {1: [0], 2: [0]}),
        ({"batch_index": 2, "positions": torch.tensor([0, -1])}, {2: [0, 2]}),
        ({"token_positions": -2}, {0: [4], 1: [2], 2: [1]}),
    ],
)
def test_steered_prompts_are_those_that_were_chosen(llama: Any, chosen: Any, places: Any) -> None:
    with llama.trace(PROMPTS):
        llama.steer([1, 2], VECTOR, 2.0, **chosen)
        together = llama.logits.save()
    for number, prompt in enumerate(PROMPTS):
        with llama.trace(prompt):
            bare = llama.logits.save()
        with llama.trace(prompt):
            if number in places:
                for layer in (1, 2):
                    llama.layers_output[layer][:, places[number]] += 2.0 * VECTOR
            alone = llama.logits.save()
        assert torch.equal(together[number, -len(prompt) :], alone[0])
        assert torch.equal(alone, bare) == (number not in places)


@pytest.mark.parametrize(
    ("chosen", "told"),
    [
        ({"batch_index": 3}, "no prompt 3; there are 3"),
        ({"batch_index": [0, "a"]}, "no prompt 'a'"),
        ({"batch_index": [0, 1], "positions": [0, 1, 2]}, "3 positions do not go with 2 prompts"),
        ({"batch_index": 2, "positions": 3}, "no position 3 in prompt 2, which has 3 tokens"),
        ({"positions": 1, "token_positions": 1}, "are one thing"),
    ],
)
def test_prompts_and_positions_that_are_not_there_are_told(llama: Any, chosen: Any, told: str) -> None:
    with pytest.raises(GraphError, match=told), llama.trace(PROMPTS):
        llama.steer(1, VECTOR, **chosen)


@pytest.mark.parametrize("family", ["bloom", "gptj"])
def test_layers_that_return_tuples_are_skipped(family: str, tmp_path: Path) -> None:
    plain = padded_families.model_of(family)
    plain.save_pretrained(tmp_path)
    model = polytrace.load(str(tmp_path), threads=1)
    prompt, given = PROMPTS[0], torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(2))
    with model.trace(prompt):
        bare = model.logits.save()
    with model.trace(prompt):
        model.skip_layers(1, 2)
        skipped = model.logits.save()
    with model.trace(prompt):
        model.skip_layer(-1, given)
        replaced = model.logits.save()
    layers = plain.get_submodule(padded_families.FAMILIES[family].layers)
    for number, changed in (((1, 2), skipped), ((3,), replaced)):
        expected = _without(plain, [layers[one] for one in number], given if number == (3,) else None)
        assert (changed - expected).abs().max() <= TOLERANCE * expected.abs().max()
        assert (changed - bare).abs().max() > 100 * TOLERANCE * bare.abs().max()
    with pytest.raises(GraphError, match="is skipped"), model.trace(prompt):
        model.skip_layer(1)
        model.attentions_output[1].save()


def _without(plain: Any, layers: list[Any], given: Tensor | None) -> Tensor:
    def hand_on(_module: Any, args: Any, out: Any) -> Any:
        return (args[0] if given is None else given, *out[1:])

    handles = [layer.register_forward_hook(hand_on) for layer in layers]
    with torch.no_grad():
        logits: Tensor = plain(input_ids=torch.tensor(PROMPTS[:1]), use_cache=False).logits
    for handle in handles:
        handle.remove()
    return logits
