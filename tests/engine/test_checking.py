"""Standard names are tried on the served weights: they hold in every family, and what breaks one withdraws it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import CONFIGS, few_of, model_of
from odd_models import save_odd
from processes import ProcessShards
from torch import Tensor
from width import wide

import engine.named
from engine.anatomy import Anatomy, find_anatomy
from engine.local import LocalBackend
from engine.pages import PagedLayer
from engine.parts import Packed, Parts
from polytrace.codec import from_json, to_json
from polytrace.description import Checked, ModelDescription, Outcome
from polytrace.errors import GraphError
from polytrace.model import Model
from polytrace.points import DIMS

PROMPT = [5, 7, 11, 2]
SIDE_BY_SIDE = ("gpt_neox", "phi")
NORMED = ("gemma2", "gemma3")


@pytest.fixture(scope="module", params=few_of(CONFIGS))
def described(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ModelDescription]:
    folder = tmp_path_factory.mktemp("model")
    model_of(request.param).save_pretrained(folder)
    return request.param, LocalBackend(str(folder), threads=1).description


def said(description: ModelDescription, name: str, outcome: Outcome = Outcome.HOLDS) -> dict[str, Checked]:
    """What was said of a name, by its words."""
    return {check.says: check for check in description.checked if name in check.names and check.outcome is outcome}


def failing(description: ModelDescription) -> list[Checked]:
    return [check for check in description.checked if check.outcome is Outcome.FAILS]


def test_every_name_of_every_family_holds_on_its_weights(described: tuple[str, ModelDescription]) -> None:
    family, description = described
    unchecked = [check for check in description.checked if check.outcome is Outcome.UNCHECKED]
    assert not failing(description)
    assert all("cannot be written" in (check.told or "") for check in unchecked), unchecked  # a router that has chosen
    everywhere = tuple(range(4))
    changed = said(description, "pattern")["an edit of it changes the logits"]
    assert changed.layers == everywhere
    assert said(description, "resid_post")["what the layer gives changes the logits"].layers == everywhere
    pattern = next(check for says, check in said(description, "pattern").items() if says.startswith("pattern = "))
    has_sink = family == "gpt_oss"
    assert pattern.says.endswith("with a sink") == has_sink
    assert pattern.told == ("rows sum to less than 1: the rest is the sink's" if has_sink else "rows sum to 1")
    assert not description.not_standard
    tried = {name for check in description.checked for name in check.names}
    assert tried >= {"embed_tokens", "ln_final", "lm_head", "q", "k", "v", "z", "head_out", "resid_pre", "resid_post"}


def test_how_the_residual_adds_up_is_told_as_the_family_does_it(described: tuple[str, ModelDescription]) -> None:
    family, description = described
    (sums,) = (check for says, check in said(description, "resid_post").items() if says.startswith("resid_post = "))
    assert sums.layers == (0, 1, 2, 3)
    assert sums.says.endswith("side by side") == (family in SIDE_BY_SIDE)
    if family in SIDE_BY_SIDE:
        assert sums.says.startswith("resid_post = resid_pre + ")
        assert not said(description, "resid_mid")
        return
    (middle,) = (says for says in said(description, "resid_mid") if says.startswith("resid_mid = resid_pre + "))
    assert sums.says.startswith("resid_post = resid_mid + ")
    assert ("a norm" in middle, "a norm" in sums.says) == (family in NORMED,) * 2
    logits = next(says for says in said(description, "ln_final") if says.startswith("logits"))
    assert ("soft-capped at 30" in logits) == (family == "gemma2")


@pytest.mark.parametrize("family", ["gpt2", "gpt_oss", *map(wide, ("llama", "gemma2", "phi", "mixtral"))])
def test_in_half_precision_names_hold_or_are_told_to_be_unchecked(family: str, tmp_path: Path) -> None:
    model_of(family, torch.bfloat16).save_pretrained(tmp_path)
    description = LocalBackend(str(tmp_path), threads=1).description
    assert not failing(description)
    assert any("resid_post = " in says for says in said(description, "resid_post"))


def refused(model: Model, use: Callable[[Any], object]) -> str:
    """Why a trace that uses something of layer 1 is refused."""
    with pytest.raises(GraphError) as caught, model.trace(PROMPT):
        use(model.model.layers[1])
    return caught.value.message


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_that_scales_attention_by_feature_has_no_middle_of_its_residual(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    model = Model(LocalBackend(save_odd("layer_gain", tmp_path, dtype), threads=1))
    told = refused(model, lambda layer: layer.resid_mid.save())
    assert "withdrawn at load" in told
    assert "did not hold that resid_mid = resid_pre + self_attn.output (it is off by 0.62 of the size of what" in told
    assert "resid_mid = resid_pre" in refused(model, lambda layer: layer.head_out.save())
    assert from_json(ModelDescription, to_json(model.description)) == model.description  # so it is told over HTTP
    with model.trace(PROMPT):
        kept = model.model.layers[1].z.save()  # nothing is wrong with it
    assert kept.shape == (1, 4, 4, 8)
    withdrawn = {row.name for row in model.support() if row.fails and not row.is_readable}
    assert withdrawn >= {"resid_mid", "head_out"} and not withdrawn & {"z", "pattern", "resid_pre", "resid_post"}


def test_how_often_a_layer_adds_attention_is_told_for_each_layer(tmp_path: Path) -> None:
    description = LocalBackend(save_odd("layer_number", tmp_path), threads=1).description
    assert not failing(description)
    sums = [says for says in said(description, "resid_mid") if says.startswith("resid_mid = ")]
    assert sums == [f"resid_mid = resid_pre + {times}self_attn.output" for times in ("", "2 x ", "3 x ")]


def test_attention_that_gives_the_residual_with_it_is_told_as_such(tmp_path: Path) -> None:
    description = LocalBackend(save_odd("with_residual", tmp_path), threads=1).description
    assert not failing(description)
    sums = said(description, "resid_mid")
    assert sums["self_attn.output is resid_mid: it includes the residual"].layers == (0, 1, 2)
    assert "resid_mid = resid_pre + self_attn.o_proj.output" in sums


def test_heads_that_do_not_add_up_to_what_attention_gives_are_withdrawn(tmp_path: Path) -> None:
    model = Model(LocalBackend(save_odd("projection_gain", tmp_path), threads=1))
    told = refused(model, lambda layer: layer.head_out.save())
    assert "head_out, summed over heads = self_attn.o_proj.output (it is off by" in told
    with model.trace(PROMPT):
        model.model.layers[1].resid_mid.save()


def test_a_name_whose_edit_reaches_nobody_can_only_be_read(tmp_path: Path) -> None:
    model = Model(LocalBackend(save_odd("dead_activation", tmp_path), threads=1))
    with model.trace(PROMPT):
        model.model.layers[1].mlp_pre.save()

    def write(layer: Any) -> None:
        layer.mlp_pre = layer.mlp_pre * 2

    assert "did not hold that an edit of it changes the logits" in refused(model, write)
    (row,) = model.support()["mlp_pre"]
    assert row.layers == (0, 1, 2) and row.is_readable and not row.is_writable and "did not hold" in (row.why_not or "")


def with_parts(monkeypatch: pytest.MonkeyPatch, change: Callable[[Parts], Parts], **others: Any) -> None:
    """From now on the anatomy says something else of every layer, or of the model."""

    def wrong(config: Any, layers: str, attention: str) -> Anatomy:
        found = find_anatomy(config, layers, attention)
        kinds = {signature: change(parts) for signature, parts in found.kinds.items()}
        return replace(found, kinds=kinds, **others)

    monkeypatch.setattr(engine.named, "find_anatomy", wrong)


@pytest.fixture
def llama(tmp_path: Path) -> str:
    model_of("llama").save_pretrained(tmp_path)
    return str(tmp_path)


def test_a_wrong_middle_of_the_residual_is_withdrawn(llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with_parts(monkeypatch, lambda parts: replace(parts, mid="mlp"))
    model = Model(LocalBackend(llama, threads=1))
    assert "did not hold that resid_mid = resid_pre + " in refused(model, lambda layer: layer.resid_mid.save())
    assert {check.layers for check in failing(model.description)} == {(0, 1, 2, 3)}


def test_wrong_queries_are_withdrawn(llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(parts: Parts) -> Parts:
        return replace(parts, roles={**parts.roles, "q": Packed("self_attn.v_proj", ("q",))})

    with_parts(monkeypatch, wrong)
    model = Model(LocalBackend(llama, threads=1))
    told = refused(model, lambda layer: layer.q.save())
    assert "did not hold that an edit of one head changes that head of q_rot alone" in told


def test_a_wrong_final_norm_is_withdrawn(llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with_parts(monkeypatch, lambda parts: parts, final_norm="model.layers.3.input_layernorm")
    model = Model(LocalBackend(llama, threads=1))
    told = "the model has no ln_final: withdrawn at load.*logits = lm_head"
    with pytest.raises(GraphError, match=told), model.trace(PROMPT):
        model.ln_final.output.save()
    (row,) = model.support()["ln_final"]
    assert not row.is_readable and "withdrawn at load" in (row.why_not or "")
    assert model.description.standard.keys() == {"embed_tokens", "layers", "lm_head"}


def test_a_pattern_that_is_not_the_softmax_of_its_scores_is_withdrawn(
    llama: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = PagedLayer._pattern

    def wrong(self: PagedLayer, scores_GNW: Tensor) -> Tensor:
        return right(self, scores_GNW) * 0.9

    monkeypatch.setattr(PagedLayer, "_pattern", wrong)
    model = Model(LocalBackend(llama, threads=1))
    told = refused(model, lambda layer: layer.pattern.save())
    assert "did not hold that pattern = softmax(scores) (it is off by 0.1 " in told


def test_the_table_says_where_each_name_is_and_what_holds(described: tuple[str, ModelDescription]) -> None:
    family, description = described
    support = Model(_Described(description)).support()
    printed = repr(support)
    assert {row.name for row in support} >= {"embed_tokens", "ln_final", "lm_head", "resid_mid", "q", "pattern"}
    assert all(f"\n{name} " in printed for name in DIMS if any(row.name == name for row in support))
    (q,) = support["q"]
    assert q.layers == (0, 1, 2, 3) and q.dims == DIMS["q"] and q.sizes == (None, None, 4, 8)
    assert q.is_writable and "an edit of it changes the logits" in q.holds
    (mid,) = support["resid_mid"]
    assert mid.is_readable == (family not in SIDE_BY_SIDE)
    if family in SIDE_BY_SIDE:
        assert "not here: attention and MLP of this layer run side by side" in printed
    with pytest.raises(GraphError, match="no standard name"):
        support["resid_middle"]
    assert len(support.records()) == len(support) and not support.failing


class _Described:
    """A backend of which nothing but the description is asked."""

    def __init__(self, description: ModelDescription) -> None:
        self._description = description

    def describe(self) -> ModelDescription:
        return self._description


@pytest.fixture(scope="module", params=[wide("gpt2"), "mixtral"])
def split(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Any]]:
    folder = str(tmp_path_factory.mktemp("model"))
    model_of(request.param).save_pretrained(folder)
    shards = ProcessShards(folder, stages=2, ranks=2)
    yield shards.description, LocalBackend(folder, threads=1).description
    shards.close()


def test_shards_say_together_what_one_process_says(split: tuple[ModelDescription, ModelDescription]) -> None:
    ours, whole = split
    assert not failing(ours)
    before = "resid_pre = resid_post of the layer before"  # whose ends are on two stages once
    same = [
        {(c.names, c.says, c.outcome, c.told, c.layers) for c in one.checked if c.says != before}
        for one in (ours, whole)
    ]
    assert same[0] == same[1]
    assert said(whole, "resid_pre")[before].layers == (1, 2, 3)
    assert said(ours, "resid_pre")[before].layers == (1, 3)
