"""Keys and values that a row may look at, at every step, in every packed family and over stages and ranks.

Against what the cache of Hugging Face holds, a sequence alone, in float32: max|a - b| <= 1e-5 max(1, max|b|).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import padded_families
import pytest
import torch
from families import CONFIGS, few_of, model_of
from processes import ProcessBackend, ProcessShards
from programs import difference
from small import close
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

import polytrace
from engine.local import LocalBackend
from polytrace.errors import GraphError
from polytrace.model import Model
from scheduling.plan import PAGE
from scheduling.policy import PassPolicy
from scheduling.scheduler import Outcome, Scheduler

LAYER, STEPS = 1, 4
PROMPTS = ([5, 9, 23, 4, 61, 7, 11, 12, 40], [8, 2, 30])
LONG = [number % 90 + 3 for number in range(7, 52)]  # of more than a page


def saved(folder: Path, family: str) -> str:
    model_of(family).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A window of 5, and two query heads a key."""
    return polytrace.load(saved(tmp_path_factory.mktemp("mistral"), "mistral"), dtype="float32", threads=1)


def by_hand(folder: str, prompt: list[int]) -> list[tuple[Tensor, Tensor]]:
    """Keys and values `[positions so far, heads, features]` at each step."""
    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    cache, given, found = DynamicCache(), torch.tensor([prompt]), []
    with torch.no_grad():
        for _ in range(STEPS):
            logits = plain(given, past_key_values=cache, use_cache=True).logits
            given = logits[:, -1:].argmax(-1)
            held = cache.layers[LAYER]
            found.append((held.keys[0].transpose(0, 1).clone(), held.values[0].transpose(0, 1).clone()))
    return found


def look(model: Any, tracer: Any) -> dict[str, list[Tensor]]:
    """What is there at each step."""
    found: dict[str, list[Tensor]] = {name: [] for name in ("keys", "values", "k_rot", "v")}
    for _ in tracer.iter[:]:
        attention = model.layers[LAYER].self_attn
        for name, own in found.items():
            own.append(getattr(attention, name).save())
    return found


def asked(model: Any, prompts: list[list[int]], **more: Any) -> dict[str, list[Tensor]]:
    with model.generate(prompts, max_new_tokens=STEPS, eos=(), **more) as tracer:
        return look(model, tracer)


@pytest.mark.parametrize("family", few_of(sorted(CONFIGS)))
def test_they_are_what_the_cache_of_hugging_face_holds_at_every_step(family: str, tmp_path: Path) -> None:
    folder = saved(tmp_path, family)
    model = polytrace.load(folder, dtype="float32", threads=1)
    found = asked(model, list(PROMPTS))
    assert torch.equal(found["keys"][0], found["k_rot"][0]) and torch.equal(found["values"][0], found["v"][0])
    for step in range(STEPS):
        for name, new in (("keys", "k_rot"), ("values", "v")):
            everything = torch.cat(found[new][: step + 1], 1)  # left-padded alike
            assert torch.equal(found[name][step], everything), (name, step)
    for place, prompt in enumerate(PROMPTS):
        for step, (keys, values) in enumerate(by_hand(folder, prompt)):
            assert len(keys) == len(prompt) + step
            close(found["keys"][step][place, -len(keys) :], keys)
            close(found["values"][step][place, -len(values) :], values)


def test_a_prompt_that_begins_in_another_ones_cache_has_it_too(mistral: Any) -> None:
    """What several have in common lies in pieces: of a prefix, of their own, and of samples of one prompt."""
    prompts = [[*LONG, 5], [*LONG, 6]]
    begin = [asked(mistral, [prompt], sharing="off")["keys"][0][0] for prompt in prompts]
    with mistral.generate([LONG], max_new_tokens=2, eos=()):
        pass
    later: list[Tensor] = []
    new: list[Tensor] = []
    with mistral.generate(prompts, max_new_tokens=STEPS, eos=(), n=2, do_sample=True, seed=3) as tracer:
        for _ in tracer.iter[1:]:
            later.append(mistral.layers[LAYER].self_attn.keys.save())
            new.append(mistral.layers[LAYER].self_attn.k_rot.save())
    assert tracer.receipt.token_layers < 4 * len(LONG), (
        "less than one prompt alone: what they have in common ran before"
    )
    assert len(set(tracer.result.ids)) == 4
    for place in range(4):
        for step, own in enumerate(later, 1):
            everything = torch.cat([begin[place // 2], *(one[place] for one in new[:step])])
            assert torch.equal(own[place], everything), (place, step)


def test_merged_is_alone_and_who_has_ended_reads_zeros(mistral: Any) -> None:
    alone = [asked(mistral, [prompt]) for prompt in PROMPTS]
    with mistral.generate(max_new_tokens=STEPS, eos=()) as tracer:
        together = []
        for prompt in PROMPTS:
            with tracer.invoke([prompt]):
                together.append(look(mistral, tracer))
    for own, theirs in zip(together, alone, strict=True):
        assert all(torch.equal(*pair) for name in own for pair in zip(own[name], theirs[name], strict=True))
    ids = tracer.result.ids
    end = next(
        step for step in range(1, STEPS - 1) if ids[0][step] not in ids[1] and ids[0].index(ids[0][step]) == step
    )
    with mistral.generate(list(PROMPTS), max_new_tokens=STEPS, eos=(ids[0][end],)) as tracer:
        keys = look(mistral, tracer)["keys"]
    assert [len(own) for own in tracer.result.ids] == [end + 1, STEPS]
    for step, own in enumerate(keys):
        assert bool((own[0] == 0).all()) == (step > end)
        assert torch.equal(own[1, -len(PROMPTS[1]) - step :], alone[1]["keys"][step][0])


def test_positions_are_counted_in_each_sequence_and_shapes_are_known_ahead(mistral: Any) -> None:
    found = asked(mistral, list(PROMPTS))
    picked: list[Any] = []
    with mistral.generate(list(PROMPTS), max_new_tokens=STEPS, eos=()) as tracer:
        for step in tracer.iter[1:]:
            keys = mistral.layers[LAYER].self_attn.keys
            assert list(keys.shape) == [2, len(PROMPTS[0]) + step, 2, 8]
            norms = keys.norm(dim=-1)
            assert list(norms.shape) == [2, len(PROMPTS[0]) + step, 2]
            picked.append([keys.at(2).save(), keys[:, -1].save(), keys[:, :, 1].save(), norms.save()])
    for step, (third, last, head, norms) in enumerate(picked, 1):
        for place, prompt in enumerate(PROMPTS):
            whole = found["keys"][step][place, len(PROMPTS[0]) - len(prompt) :]
            assert torch.equal(third[place], whole[2]) and torch.equal(last[place], whole[-1])
        assert torch.equal(head, found["keys"][step][:, :, 1])
        assert torch.equal(norms, found["keys"][step].norm(dim=-1))


def test_they_are_read_only_and_recorded_for_each_step(mistral: Any) -> None:
    attention = mistral.layers[LAYER].self_attn
    with (
        pytest.raises(GraphError, match=r"keys cannot be written: .*edit `k` or `k_rot`.*test_keys_and_values.py"),
        mistral.trace([5, 6, 7]),
    ):
        attention.keys[:, 0] = 0.0
        mistral.logits.save()
    with (
        pytest.raises(GraphError, match=r"values cannot be written: .*edit `v`.*test_keys_and_values.py"),
        mistral.trace([5, 6, 7]),
    ):
        attention.values = 0.5 * attention.values
    with (
        pytest.raises(GraphError, match=r"for step in tracer\.iter"),
        mistral.generate([5, 6, 7], max_new_tokens=3) as tracer,
        tracer.all(),
    ):
        attention.keys.save()
    with (
        pytest.raises(GraphError, match="mean runs over the tokens of prompts of different lengths"),
        mistral.generate(list(PROMPTS), max_new_tokens=3) as tracer,
    ):
        for _ in tracer.iter[1:]:
            attention.values.mean(1).save()


def test_a_model_that_cannot_be_packed_says_why_it_has_none(tmp_path: Path) -> None:
    padded_families.model_of("bloom").save_pretrained(tmp_path)
    model = polytrace.load(str(tmp_path), dtype="float32", threads=1)
    for name in ("keys", "values"):
        with (
            pytest.raises(GraphError, match=f"has no {name}: each sequence runs alone here, with a cache"),
            model.trace([5, 6, 7]),
        ):
            getattr(model.layers[LAYER].self_attn, name).save()


def test_who_was_put_back_for_want_of_room_has_the_same_keys(tmp_path: Path) -> None:
    model_of("mistral", positions=128).save_pretrained(tmp_path)
    backend = LocalBackend(str(tmp_path), threads=1)
    model: Any = Model(backend)
    requests = []
    for number in range(4):
        with model.generate(LONG[number : number + 30], max_new_tokens=40, eos=(), run=False) as tracer:
            for step in tracer.iter[:]:
                if step % 8 == 7:
                    model.layers[LAYER].self_attn.keys.save()
        requests.append(tracer.built_request())

    put_back: list[object] = []

    class Counted(Scheduler):
        def _put_back(self, job: Any) -> None:
            put_back.append(job)
            super()._put_back(job)

    def outcomes(num_pages: int) -> list[Outcome]:
        kept = num_pages * PAGE * backend.scheduler._room.position_bytes
        limits = replace(backend.description.limits, trunk_bytes=kept)
        backend.scheduler = Counted(replace(backend.description, limits=limits), PassPolicy(prefix_bytes=0))
        return backend.run_together([backend.work_out(request) for request in requests])

    large = outcomes(64)
    assert not put_back
    for own, theirs in zip(outcomes(9), large, strict=True):
        assert own.values.keys() == theirs.values.keys() and len(own.values) == 5
        assert all(torch.equal(value, theirs.values[name]) for name, value in own.values.items())
    assert put_back, "there was no room for all"
    backend.close()


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("grid")
    source = saved(folder, "mistral")
    shards = ProcessShards(source, stages=2, ranks=2)
    yield Model(ProcessBackend(source, shards, folder, PassPolicy(budget_tokens=1 << 16, max_members=100)))
    shards.close()


@pytest.mark.parametrize("layer", [0, 3])
def test_over_stages_and_ranks_they_are_the_same_and_a_head_travels_alone(grid: Any, mistral: Any, layer: int) -> None:
    def values_of(model: Any, head: int | None) -> tuple[list[Tensor], int]:
        found = []
        with model.generate(list(PROMPTS), max_new_tokens=STEPS, eos=()) as tracer:
            for _ in tracer.iter[:]:
                own = model.layers[layer].self_attn.values
                found.append((own if head is None else own[:, :, head]).save())
        return found, tracer.receipt.gathered_bytes

    expected, _ = values_of(mistral, None)
    whole, all_bytes = values_of(grid, None)
    head, head_bytes = values_of(grid, 1)
    assert difference(whole, expected) <= 1e-5
    assert all(torch.equal(own, value[:, :, 1]) for own, value in zip(head, whole, strict=True))
    assert 0 < head_bytes < all_bytes
