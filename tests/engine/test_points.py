"""Points inside of attention against transformers' own formula, shared, merged and alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, few_of, model_of
from points import POINTS, Look, furthest, look_by_hand, looks, record_look
from programs import difference, find, values_in_order

from engine.local import LocalBackend
from polytrace.errors import GraphError, RunError, TooLargeError
from polytrace.model import Model
from scheduling.policy import PassPolicy

TOLERANCE = 1e-5  # of max(1, max|plain|), float32
LONG = tuple(range(1, 41))  # more than a page of keys
PROMPTS = [(LONG,), (LONG[:12], LONG[:5]), ((7, 3, 5, 9, 11, 2, 4),)]


SERVED = few_of(["llama", "gpt2", "gemma2", "mistral", "gpt_oss", "gpt_neox", "opt", "mixtral"])


@pytest.fixture(scope="module", params=SERVED)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("model")
    plain = model_of(request.param)
    plain.save_pretrained(folder)
    backend = LocalBackend(str(folder), threads=1, policy=PassPolicy(budget_tokens=1 << 16, max_members=1000))
    return request.param, plain, Model(backend), backend


def _run(model: Any, backend: Any, family: str, own: list[Look], **options: Any) -> list[list[torch.Tensor]]:
    tracers = [record_look(model, FAMILIES[family], look, run=False, **options)[0] for look in own]
    outcomes = backend.run_together([backend.work_out(tracer.built_request()) for tracer in tracers])
    for outcome in outcomes:
        if outcome.error is not None:
            raise outcome.error
    return [values_in_order(tracer, outcome.values) for tracer, outcome in zip(tracers, outcomes, strict=True)]


def test_every_point_reads_and_takes_edits_as_the_formula_has_it_and_neighbours_change_no_bit(served: Any) -> None:
    family, plain, model, backend = served
    own = looks(FAMILIES[family], PROMPTS)
    shared = _run(model, backend, family, own)
    for look, ours, merged in zip(own, shared, _run(model, backend, family, own, sharing="off"), strict=True):
        expected = look_by_hand(plain, FAMILIES[family], look)
        assert all(torch.equal(a.isneginf(), b.isneginf()) for a, b in zip(ours, expected, strict=True)), look
        assert furthest(ours, expected) <= TOLERANCE, look
        (alone,) = _run(model, backend, family, [look])
        assert all(map(torch.equal, ours, alone)) and all(map(torch.equal, merged, alone)), look
        if look.edit is not None:
            untouched = look_by_hand(plain, FAMILIES[family], replace(look, edit=None))
            others = [place for place in range(len(ours)) if place != POINTS.index(look.edit)]
            assert furthest([ours[i] for i in others], [untouched[i] for i in others]) > 10 * TOLERANCE, look


def test_a_sum_has_the_bits_it_has_alone_wherever_the_rows_lie_that_it_is_of(served: Any) -> None:
    """Rows that others share a beginning with do not lie one after another, and are copied; those alone are not."""
    family, _, model, backend = served

    def record(prompt: tuple[int, ...], *, changes: bool) -> Any:
        with model.trace(list(prompt), run=False) as tracer:
            if changes:
                _attention(model, family).output[0][:, -1] *= 0.5
            for point in POINTS:
                for dim in (1, 2):
                    getattr(_attention(model, family), point).nan_to_num(0.0, 0.0, 0.0).sum(dim).save()
        return tracer

    others = [record((*LONG[:6], 3, 4), changes=True) for _ in range(2)]
    own = [record(LONG[:8], changes=False) for _ in range(2)]
    crowd = [others[0], own[0], others[1]]
    merged = backend.run_together([backend.work_out(tracer.built_request()) for tracer in crowd])
    (alone,) = backend.run_together([backend.work_out(own[1].built_request())])
    pairs = zip(values_in_order(own[0], merged[1].values), values_in_order(own[1], alone.values), strict=True)
    assert [torch.equal(*pair) for pair in pairs] == [True] * 2 * len(POINTS)


def _attention(model: Any, family: str) -> Any:
    return find(model, f"{FAMILIES[family].layers}.2.{FAMILIES[family].attention}")


def test_reading_every_point_changes_no_bit_of_the_run(served: Any) -> None:
    family, _, model, _ = served
    with model.trace(list(LONG)):
        bare = model.lm_head.output.save()
    with model.trace(list(LONG)):
        for layer in range(FAMILIES[family].num_layers):
            attention = model.get_submodule(f"{FAMILIES[family].layers}.{layer}.{FAMILIES[family].attention}")
            for point in POINTS:
                getattr(attention, point).save()
        read = model.lm_head.output.save()
    assert torch.equal(bare, read)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = tmp_path_factory.mktemp("llama")
    model_of("llama").save_pretrained(folder)
    return Model(LocalBackend(str(folder), threads=1))


def test_a_patch_of_one_querys_pattern_runs_the_rows_behind_it_alone(llama: Any) -> None:
    with llama.trace() as tracer:
        with tracer.invoke(list(LONG)):
            clean = llama.lm_head.output[:, -1].save()
        with tracer.invoke(list(LONG)):
            llama.model.layers[1].self_attn.pattern[:, :, -1] *= 0.5
            changed = llama.lm_head.output[:, -1].save()
    assert tracer.receipt.token_layers < 4 * len(LONG) + 8
    assert not torch.equal(clean, changed)


@pytest.mark.parametrize("point", ["scores", "pattern"])
def test_weight_for_a_later_key_is_refused_with_its_place(llama: Any, point: str) -> None:
    with (
        pytest.raises(RunError, match=r"query at column 2 .* key at column 5, which comes later"),
        llama.trace([1] * 8),
    ):
        getattr(llama.model.layers[1].self_attn, point)[:, 1, 2, 5] = 0.5
        llama.lm_head.output[:, -1].save()


def test_a_point_that_a_module_does_not_have_is_named_with_those_that_it_has(llama: Any) -> None:
    with pytest.raises(GraphError, match="pattern"), llama.trace([1, 2]):
        _ = llama.model.layers[0].self_attn.patern
    with pytest.raises(GraphError, match="has no 'z'"), llama.trace([1, 2]):
        _ = llama.model.layers[0].mlp.z


def test_scores_of_ragged_prompts_are_scaled_as_those_of_each_alone(llama: Any) -> None:
    def scaled(prompts: list[list[int]]) -> torch.Tensor:
        with llama.trace(prompts):
            scores = llama.model.layers[1].self_attn.scores
            scores[:, 2] *= 0.2
            return llama.lm_head.output[:, -1].save()

    prompts = [list(LONG[:9]), list(LONG[3:7])]
    together = scaled(prompts)
    with llama.trace(prompts):
        untouched = llama.lm_head.output[:, -1].save()
    assert all(torch.equal(together[number], scaled([prompt])[0]) for number, prompt in enumerate(prompts))
    assert difference([together], [untouched]) > 10 * TOLERANCE


def test_positions_of_pairs_are_indexed(llama: Any) -> None:
    with llama.trace([list(LONG[:4]), list(LONG[:3])]):  # as many tokens as heads
        pattern = llama.model.layers[1].self_attn.pattern
        for value in (pattern, pattern * 2):
            with pytest.raises(GraphError, match=r"value\[:, :, -1\]"):
                value.at(1)
        pattern[:, :, -1].save()


def test_the_limit_of_a_value_is_held_against_the_queries_that_are_read(llama: Any) -> None:
    backend, description = llama.backend, llama.backend.description
    backend.description = replace(description, limits=replace(description.limits, max_value_bytes=10_000))
    try:
        with llama.trace(list(LONG)):
            last = llama.model.layers[1].self_attn.pattern[:, :, -1].save()
        assert last.shape == (1, 4, len(LONG))
        for whole in (lambda pattern: pattern[:, 1], lambda pattern: pattern * 1.0):
            with pytest.raises(TooLargeError, match=r"25600 bytes"), llama.trace(list(LONG)):
                whole(llama.model.layers[1].self_attn.pattern)[..., 0].save()
    finally:
        backend.description = description
