"""Attribution patching beside plain autograd: the difference of two runs times the gradient of one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from patched_by_hand import PlainModel
from torch import Tensor

from polytrace.errors import GraphError
from polytrace.methods import (
    attribution_patching,
    divergence,
    log_probability,
    logit_difference,
    loss,
    patch_activations,
    patch_heads,
)

CLEAN, CORRUPT = [3, 17, 42, 5, 9, 30, 11], [3, 25, 42, 8, 9, 30, 11]
SHORT, SHORT_CORRUPT = [8, 25, 1, 60], [8, 17, 1, 60]
RIGHT, WRONG = 7, 21
TOLERANCE = 1e-5  # float32, of max(1, max|plain|)


def lead(logits: Tensor) -> Tensor:
    return logits[-1, RIGHT] - logits[-1, WRONG]


def changes(
    plain: PlainModel,
    base: list[int],
    giver: list[int],
    point: str,
    layers: list[int],
    metric: Callable[[Tensor], Tensor] = lead,
) -> tuple[list[Tensor], float]:
    """By layer `(given - value) * gradient` of each element, and the metric that they change."""
    given = plain.run(giver)[1]
    logits, seen = plain.run(base, has_gradients=True)
    measured = metric(logits)
    values = [seen[point, layer] for layer in layers]
    gradients = torch.autograd.grad(measured, values)
    products = [
        torch.where(gradient == 0, 0.0, given[point, layer] - value.detach())[0] * gradient[0]
        for layer, value, gradient in zip(layers, values, gradients, strict=True)
    ]
    return products, float(measured.detach())


def agree(ours: Any, theirs: Any) -> None:
    wanted = np.array(theirs.tolist() if isinstance(theirs, Tensor) else theirs, dtype=float)
    assert ours.shape == wanted.shape, (ours.shape, wanted.shape)
    assert (np.isnan(ours) == np.isnan(wanted)).all()
    assert np.nanmax(abs(ours - wanted)) <= TOLERANCE * max(1.0, float(np.nanmax(abs(wanted))))
    assert np.nanmax(wanted) - np.nanmin(wanted) > 0.005, "the patches matter"


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize(
    ("of", "by", "lost"),
    [
        ("resid_pre", None, [1]),
        ("attention", None, [1]),
        ("mlp", "position", [1]),
        ("z", "position", [1, 2]),
        ("z", None, [0, 2]),
        ("v", "head", [0, 2]),
        ("pattern", None, [1, 2]),
        ("pattern", "position", [0, 2]),
        ("scores", None, [1, 2]),
        ("mlp_post", None, [0]),
        ("z", ("position", "head"), [2]),
    ],
)
def test_estimates_are_differences_times_gradients(
    both: tuple[Any, PlainModel], of: str, by: Any, lost: list[int], direction: str
) -> None:
    model, plain = both
    base, giver = (CORRUPT, CLEAN) if direction == "denoise" else (CLEAN, CORRUPT)
    products, start = changes(plain, base, giver, of, [1, 3])
    metric = logit_difference(RIGHT, WRONG)
    found = attribution_patching(
        model, CLEAN, CORRUPT, metric, of=of, by=by, layers=[1, -1], direction=direction, normalise=False
    )
    wanted = torch.stack([start + product.sum(lost) for product in products])
    assert found.effect.dims[0] == "layer" and found.effect.layer.values.tolist() == [1, 3]
    agree(found.effect.values, wanted)
    best, least = (float(lead(plain.run(ids)[0])) for ids in (CLEAN, CORRUPT))
    agree(np.array([float(found.clean), float(found.corrupt)]), [best, least])
    whole = attribution_patching(model, CLEAN, CORRUPT, metric, of=of, by=by, layers=[1, -1], direction=direction)
    shares = (wanted.numpy() - least) / (best - least)
    assert np.abs(whole.effect.values - shares).max() <= 5e-5 * np.abs(shares).max()
    assert whole.effect.dims == found.effect.dims


def test_pairs_of_several_lengths_are_estimated_at_once(both: tuple[Any, PlainModel]) -> None:
    model, plain = both
    metric = logit_difference(RIGHT, WRONG)
    pairs: Any = ([CLEAN, SHORT], [CORRUPT, SHORT_CORRUPT])
    found = attribution_patching(model, *pairs, metric, layers=2, normalise=False)
    assert found.effect.dims == ("prompt", "layer", "position")
    heads = attribution_patching(model, *pairs, metric, of="z", layers=2, positions=[1, -1], normalise=False)
    every = attribution_patching(model, *pairs, metric, of="pattern", layers=2, normalise=False)
    rows, of_heads, of_all = [], [], []
    for clean, corrupt in zip(*pairs, strict=True):
        (own,), start = changes(plain, corrupt, clean, "resid_pre", [2])
        rows.append([[float("nan")] * (7 - len(clean)) + (start + own.sum(1)).tolist()])
        (own,), start = changes(plain, corrupt, clean, "z", [2])
        of_heads.append([(start + own[[1, -1]].sum((0, 2))).tolist()])
        (own,), start = changes(plain, corrupt, clean, "pattern", [2])
        of_all.append([(start + own.sum((1, 2))).tolist()])
    agree(found.effect.values, rows)
    agree(heads.effect.values, of_heads)
    agree(every.effect.values, of_all)


def test_positions_of_pairs_that_differ_in_length_are_put_beside_each_other(llama: tuple[Any, PlainModel]) -> None:
    model, plain = llama
    longer = [3, 25, 25, 42, 8, 9, 30, 11]
    where = {"third": -5, "end": [-2, -1]}
    found = attribution_patching(
        model, CLEAN, longer, logit_difference(RIGHT, WRONG), layers=[0, 2], positions=where, normalise=False
    )
    given = plain.run(CLEAN)[1]
    logits, seen = plain.run(longer, has_gradients=True)
    start, wanted = lead(logits), []
    for layer in (0, 2):
        (gradient,) = torch.autograd.grad(start, seen["resid_pre", layer], retain_graph=True)
        change = (given["resid_pre", layer][0, -5:] - seen["resid_pre", layer][0, -5:].detach()) * gradient[0, -5:]
        tokens = float(start.detach()) + change.sum(1)
        wanted.append([float(tokens[0]), float(tokens[-2] + tokens[-1] - start.detach())])
    assert found.effect.position.values.tolist() == ["third", "end"]
    agree(found.effect.values, wanted)


def test_metrics_are_those_of_patching(llama: tuple[Any, PlainModel]) -> None:
    model, plain = llama
    clean = plain.run(CLEAN)[0].log_softmax(-1)

    def apart(logits: Tensor) -> Tensor:
        total: Tensor = (clean[-1].exp() * (clean[-1] - logits[-1].log_softmax(-1))).sum()
        return total

    def surprise(logits: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(CORRUPT[1:]))

    metrics: list[tuple[Any, Callable[[Tensor], Tensor]]] = [
        (divergence(), apart),
        (loss(), surprise),
        (log_probability(RIGHT), lambda logits: logits[-1].log_softmax(-1)[RIGHT]),
        (lambda logits: logits.square().mean(-1), lambda logits: logits[-1].square().mean()),
    ]
    for metric, by_hand in metrics:
        found = attribution_patching(model, CLEAN, CORRUPT, metric, of="z", heads=[1, -1], layers=1, normalise=False)
        (own,), start = changes(plain, CORRUPT, CLEAN, "z", [1], by_hand)
        assert found.effect["head"].values.tolist() == [1, 3]
        agree(found.effect.values, [(start + own.sum((0, 2)))[[1, 3]].tolist()])


def test_small_patches_are_estimated_well(llama: tuple[Any, PlainModel]) -> None:
    """What is estimated is what patching does, to first order: it is compared with patching itself."""
    model, _ = llama
    metric = logit_difference(RIGHT, WRONG)
    near = [3, 17, 42, 5, 9, 30, 11]
    far = [3, 17, 42, 5, 9, 29, 11]
    some: Any = {"layers": 3, "normalise": False}
    for ours, theirs in (
        (attribution_patching(model, near, far, metric, **some), patch_activations(model, near, far, metric, **some)),
        (attribution_patching(model, near, far, metric, of="z", **some), patch_heads(model, near, far, metric, **some)),
    ):
        assert ours.effect.dims == theirs.effect.dims and ours.effect.shape == theirs.effect.shape
        assert theirs.corrupt is not None
        moved = abs(theirs.effect - theirs.corrupt).max()
        assert moved > 0.01 and abs(ours.effect - theirs.effect).max() < 0.5 * moved


def test_all_heads_of_tinyworld_are_ranked_as_by_patching_them_in_one_request(world: Any) -> None:
    pairs = "The Eiffel Tower is in the city of", "The Galata Tower is in the city of"
    lead = logit_difference(" Paris", " Istanbul")
    for direction in ("denoise", "noise"):
        estimated = attribution_patching(world, *pairs, lead, of="z", direction=direction)
        true = patch_heads(world, *pairs, lead, of="z", direction=direction)
        assert estimated.effect.shape == true.effect.shape == (8, 8)
        ranks = [np.argsort(np.argsort(found.effect.values, axis=None)) for found in (estimated, true)]
        assert np.corrcoef(ranks)[0, 1] > 0.98, "Spearman's correlation; measured: 0.993 and 0.992"
        # two forwards and one backward, beside 64 runs
        assert len(estimated.receipt.passes) == 2 and estimated.receipt.token_layers < true.receipt.token_layers / 3


def test_what_cannot_be_estimated_is_said(llama: tuple[Any, PlainModel]) -> None:
    model, _ = llama
    metric = logit_difference(RIGHT, WRONG)
    for more, told in (
        ({"of": "router"}, "has no row for each token"),
        ({"by": "head"}, "patches of 'resid_pre' are by 'position', not 'head'"),
        ({"of": "z", "by": "neuron"}, "are by 'position', 'head', \\('position', 'head'\\), not 'neuron'"),
        ({"direction": "up"}, "the direction is 'denoise' or 'noise'"),
        ({"of": "z", "heads": 9}, "there is no head 9"),
    ):
        with pytest.raises(GraphError, match=told):
            attribution_patching(model, CLEAN, CORRUPT, metric, **more)
    with pytest.raises(GraphError, match="7 tokens in the clean prompt and 4 in the corrupt one"):
        attribution_patching(model, CLEAN, SHORT, metric)
