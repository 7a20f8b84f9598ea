"""Patchscopes and the object-attention lens against plain Hugging Face and hooks, and what they find on tinyworld."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES
from torch import Tensor
from transformers import PreTrainedModel

from polytrace.errors import GraphError
from polytrace.methods import Target, object_attention_lens, patchscope, repeat_target
from polytrace.methods.patchscopes import generated_text

TOLERANCE = 1e-5  # of max(1, max|plain|), float32
SOURCES = [[5, 17, 42, 5, 9, 30, 11], [8, 25, 1, 60]]
TARGET, HOLE = [3, 9, 70, 14, 22], 2
ATTENTION = {"llama": "self_attn", "gpt2": "attn", "gemma2": "self_attn"}
Hook = tuple[str, str, Callable[[Tensor], Tensor]]


def run(plain: PreTrainedModel, ids: list[int], *hooks: Hook) -> Tensor:
    """The last logits `[vocabulary]` with the outputs or inputs of modules seen and changed."""
    with ExitStack() as stack, torch.no_grad():
        for path, side, change in hooks:
            module = plain.get_submodule(path)
            if side == "output":
                handle = module.register_forward_hook(lambda m, a, out, change=change: _out(out, change))
            else:
                handle = module.register_forward_pre_hook(
                    lambda m, a, k, change=change: _in(a, k, change), with_kwargs=True
                )
            stack.callback(handle.remove)
        logits: Tensor = plain(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
    return logits


def _out(out: Any, change: Callable[[Tensor], Tensor]) -> Any:
    return change(out) if isinstance(out, Tensor) else (change(out[0]), *out[1:])


def _in(args: tuple[Any, ...], kwargs: dict[str, Any], change: Callable[[Tensor], Tensor]) -> Any:
    if args:
        return (change(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}


def state_of(plain: PreTrainedModel, path: str, side: str, ids: list[int], position: int = -1) -> Tensor:
    seen: list[Tensor] = []

    def look(value: Tensor) -> Tensor:
        seen.append(value[:, position].clone())
        return value

    run(plain, ids, (path, side, look))
    return seen[0]


def put(state: Tensor, *places: int) -> Callable[[Tensor], Tensor]:
    def change(value: Tensor) -> Tensor:
        value = value.clone()
        value[:, list(places)] = state[:, None]
        return value

    return change


def close(ours: Any, theirs: Any) -> None:
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= TOLERANCE * max(1.0, np.abs(theirs).max())


def test_states_put_into_a_target_say_what_hooks_make_them_say(pair: Any) -> None:
    family, plain, model = pair
    layers = FAMILIES[family].layers
    target = Target(prompt=TARGET, position=HOLE)
    scope: Any = patchscope(model, SOURCES, target, positions=[-1, 1], tokens=list(range(96)))
    crossed: Any = patchscope(model, SOURCES, target, [0, 2], target_layers=[3, 1], tokens=list(range(96)))
    assert scope.probability.dims == ("prompt", "layer", "position", "token")
    assert crossed.probability.dims == ("prompt", "layer", "position", "target_layer", "token")
    unpatched = run(plain, TARGET).softmax(-1)
    for number, source in enumerate(SOURCES):
        for layer in range(4):
            for place, position in enumerate([-1, 1]):
                state = state_of(plain, f"{layers}.{layer}", "output", source, position)
                wanted = run(plain, TARGET, (f"{layers}.{layer}", "output", put(state, HOLE))).softmax(-1)
                close(scope.probability[number, layer, place], wanted)
                if layer < 3:  # behind the last layer nothing looks at another position
                    assert (wanted - unpatched).abs().max() > 1e-4, "the patch matters"
        for row, layer in enumerate([0, 2]):
            state = state_of(plain, f"{layers}.{layer}", "output", source)
            for column, goal in enumerate([3, 1]):
                wanted = run(plain, TARGET, (f"{layers}.{goal}", "output", put(state, HOLE))).softmax(-1)
                close(crossed.probability[number, row, 0, column], wanted)


def test_a_state_may_be_mapped_on_its_way_and_put_into_several_places(pair: Any) -> None:
    family, plain, model = pair
    layers = FAMILIES[family].layers
    matrix = torch.randn(32, 32, generator=torch.Generator().manual_seed(1))

    def mapping(state: Any, layer: int, target_layer: int) -> Any:
        return state @ matrix * (1 + layer) + target_layer

    scope: Any = patchscope(
        model,
        SOURCES[0],
        Target(prompt=TARGET, position=[1, HOLE]),
        1,
        target_layers=2,
        mapping=mapping,
        tokens=list(range(96)),
    )
    state = state_of(plain, f"{layers}.1", "output", SOURCES[0]) @ matrix * 2 + 2
    wanted = run(plain, TARGET, (f"{layers}.2", "output", put(state, 1, HOLE))).softmax(-1)
    close(scope.probability.values.ravel(), wanted)


def test_a_vector_of_ones_own_is_asked_about(pair: Any) -> None:
    family, plain, model = pair
    vector = 3 * torch.randn(32, generator=torch.Generator().manual_seed(5))
    target = Target(prompt=TARGET, position=HOLE)
    scope = patchscope(model, SOURCES[0], target, 1, mapping=lambda *_: vector, tokens=list(range(96)))
    wanted = run(plain, TARGET, (f"{FAMILIES[family].layers}.1", "output", put(vector[None], HOLE))).softmax(-1)
    close(scope.probability.values.ravel(), wanted)


def test_generation_keeps_the_patch_in_its_position(pair: Any) -> None:
    family, plain, model = pair
    layers = FAMILIES[family].layers
    scope: Any = patchscope(model, SOURCES, Target(prompt=TARGET, position=HOLE), [0, 1], generate=4, top_k=3)
    assert len(scope.receipts) <= 4
    for number, source in enumerate(SOURCES):
        for row, layer in enumerate([0, 1]):
            state = state_of(plain, f"{layers}.{layer}", "output", source)
            ids: list[int] = []
            for _ in range(4):
                logits = run(plain, [*TARGET, *ids], (f"{layers}.{layer}", "output", put(state, HOLE)))
                ids.append(int(logits.argmax()))
                if len(ids) == 1:
                    assert scope.token_id[number, row, 0].values.tolist() == logits.topk(3).indices.tolist()
                if ids[-1] == model.config.eos_token_id:
                    ids.pop()
                    break
            if family == "llama":  # the others come with a tokenizer of transformers' without words
                assert scope.text[number, row, 0].item() == "".join(map(str, ids))


def test_attention_given_another_prompts_token_says_what_hooks_make_it_say(pair: Any) -> None:
    family, plain, model = pair
    layers, attention = FAMILIES[family].layers, ATTENTION[family]
    lens: Any = object_attention_lens(model, TARGET, SOURCES[0], HOLE, window=2, tokens=list(range(96)))
    unpatched = run(plain, TARGET).softmax(-1)
    for first in range(4):
        hooks: list[Hook] = []
        for layer in range(first, min(4, first + 2)):
            path = f"{layers}.{layer}.{attention}"
            hooks.append((path, "input", put(state_of(plain, path, "input", SOURCES[0]), HOLE)))
        wanted = run(plain, TARGET, *hooks).softmax(-1)
        close(lens.probability[0, first], wanted)
        assert (wanted - unpatched).abs().max() > 1e-4, "the patch matters"


def test_on_tinyworld_a_patchscope_reads_the_city_where_the_lens_reads_nothing(world: Any) -> None:
    ask = Target(prompt="You can see Bob in the city of", position=4)
    sources = ["I read in a book that the Eiffel Tower", "I read in a book that the Colosseum"]
    scope: Any = patchscope(world, sources, ask, slice(0, 8), top_k=1, generate=2)
    first = scope.token.isel(position=0, rank=0).values
    assert first[0, :4].tolist() == [" Paris"] * 4 and first[1, :4].tolist() == [" Rome"] * 4
    assert " Paris" not in first[0, 6:].tolist(), "late states come too late for the layers that would read them"
    assert scope.text.values[0, 1, 0] == " Paris." and len(scope.receipts) == 2
    assert scope.receipts[0].token_layers < scope.receipts[0].token_layers_alone / 2, "the asking prompt runs once"


def test_on_tinyworld_attention_reads_the_object_in_the_middle(world: Any) -> None:
    source = "I read in a book that the Eiffel Tower"
    lens: Any = object_attention_lens(
        world, "The Space Needle is in the city of", source, 3, window=5, tokens=[" Paris", " Seattle"]
    )
    paris, seattle = (lens.probability.isel(prompt=0).sel(token=city) for city in (" Paris", " Seattle"))
    assert (paris.sel(layer=[0, 1, 2, 3]) > 0.05).all() and (paris.sel(layer=[5, 6, 7]) < 0.01).all()
    assert (seattle.sel(layer=[0, 1, 2, 3]) < 0.7).all() and (seattle.sel(layer=[5, 6, 7]) > 0.95).all()


def test_what_does_not_fit_is_refused(world: Any) -> None:
    ask = Target(prompt="You can see Bob", position=4)
    with pytest.raises(GraphError, match="no position 9"):
        patchscope(world, "a b", Target(prompt="You can see Bob", position=9))
    with pytest.raises(GraphError, match="one prompt, not 2"):
        patchscope(world, "a b", Target(prompt=["a", "b"]))
    with pytest.raises(GraphError, match="tokens="):
        patchscope(world, "a b", ask, tokens=[" Paris"], generate=2)
    with pytest.raises(GraphError, match="one length"):
        patchscope(world, ["a b", "a b c d"], ask, positions=None)
    with pytest.raises(GraphError, match="3 sources"):
        object_attention_lens(world, ["a", "b"], ["a", "b", "c"], 1)
    assert repeat_target(["a", "b"], "x").prompt == "a a\nb b\nx"
    assert repeat_target(["a", "b"], "x", between="->", separator=" | ").prompt == "a->a | b->b | x"


def test_a_character_that_lies_in_several_tokens_is_one_in_generated_text(world: Any) -> None:
    before, said = (world.tokenizer.encode(text, add_special_tokens=False).ids for text in ("The", " caf\u00e9"))
    apart = [world.tokenizer.decode([token]) for token in said]
    assert "\ufffd" in "".join(apart)
    assert generated_text(world, before, said) == " caf\u00e9"
    assert generated_text(world, said[:-1], said[-1:]) == apart[-1]
