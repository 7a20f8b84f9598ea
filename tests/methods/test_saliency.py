"""Saliency and integrated gradients beside plain autograd with hooks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from patched_by_hand import PlainModel
from torch import Tensor

from polytrace.errors import GraphError
from polytrace.methods import (
    gradient_x_input,
    integrated_gradients,
    log_probability,
    logit_difference,
    saliency,
)

PROMPT, OTHER = [3, 17, 42, 5, 9, 30, 11], [3, 25, 42, 8, 9, 30, 11]
SHORT, SHORT_OTHER = [8, 25, 1, 60], [8, 17, 1, 60]
RIGHT, WRONG = 7, 21
METRIC = logit_difference(RIGHT, WRONG)
TOLERANCE = 1e-5  # float32, of max(1, max|plain|)


def lead(logits: Tensor) -> Tensor:
    return logits[-1, RIGHT] - logits[-1, WRONG]


def gradient(plain: PlainModel, ids: list[int], point: tuple[str, int]) -> tuple[Tensor, Tensor]:
    """A point of a prompt and the metric's gradient there, each `[tokens, ...]`."""
    logits, seen = plain.run(ids, has_gradients=True)
    (found,) = torch.autograd.grad(lead(logits), seen[point])
    return seen[point][0].detach(), found[0]


def along(plain: PlainModel, ids: list[int], point: tuple[str, int], start: Tensor, steps: int) -> Tensor:
    """What each token's row adds on its way from `start` `[tokens, ...]`."""
    end = plain.run(ids)[1][point][0]
    total = torch.zeros_like(end)
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    for node, weight in zip(nodes, weights, strict=True):
        value = (start + (end - start) * float(node + 1) / 2)[None].requires_grad_()
        logits, _ = plain.run(ids, {point: lambda _, value=value: value}, has_gradients=True)
        (found,) = torch.autograd.grad(lead(logits), value)
        total += found[0] * float(weight) / 2
    return (total * (end - start)).flatten(1).sum(1)


def agree(ours: Any, theirs: Any) -> None:
    wanted = np.array(theirs.tolist() if isinstance(theirs, Tensor) else theirs, dtype=float)
    assert ours.shape == wanted.shape, (ours.shape, wanted.shape)
    assert (np.isnan(ours) == np.isnan(wanted)).all()
    assert np.nanmax(abs(ours - wanted)) <= TOLERANCE * max(1.0, float(np.nanmax(abs(wanted))))
    assert np.nanmax(wanted) - np.nanmin(wanted) > 0.005, "tokens matter"


def test_each_token_has_the_length_of_its_gradient(both: tuple[Any, PlainModel]) -> None:
    model, plain = both
    value, found = gradient(plain, PROMPT, ("embed", 0))
    lengths = saliency(model, PROMPT, METRIC)
    assert lengths.effect.dims == ("position",) and lengths.corrupt is None
    agree(lengths.effect.values, found.norm(dim=-1))
    agree(gradient_x_input(model, PROMPT, METRIC).effect.values, (found * value).sum(-1))
    assert abs(float(lengths.clean) - float(lead(plain.run(PROMPT)[0]))) < 1e-4


def test_points_of_layers_and_prompts_of_several_lengths(both: tuple[Any, PlainModel]) -> None:
    model, plain = both
    prompts = [PROMPT, SHORT]
    lengths = saliency(model, prompts, METRIC, of="z", layers=[1, 3])
    products = gradient_x_input(model, prompts, METRIC, of="v", layers=[1, 3])
    assert lengths.effect.dims == products.effect.dims == ("prompt", "layer", "position")
    of_lengths, of_products = [], []
    for ids in prompts:
        pads = [float("nan")] * (7 - len(ids))
        found = [gradient(plain, ids, ("z", layer))[1].flatten(1).norm(dim=1).tolist() for layer in (1, 3)]
        of_lengths.append([pads + row for row in found])
        pairs = [gradient(plain, ids, ("v", layer)) for layer in (1, 3)]
        of_products.append([pads + (value * found).sum((1, 2)).tolist() for value, found in pairs])
    agree(lengths.effect.values, of_lengths)
    agree(products.effect.values, of_products)


def test_steps_have_names_and_sums(llama: tuple[Any, PlainModel]) -> None:
    model, plain = llama
    value, found = gradient(plain, PROMPT, ("resid_pre", 2))
    steps = {"middle": [2, 3], "last": -1}
    ours = gradient_x_input(model, PROMPT, METRIC, of="resid_pre", layers=2, positions=steps)
    products = (found * value).sum(1)
    assert ours.effect.position.values.tolist() == ["middle", "last"]
    agree(ours.effect.values, [[float(products[2] + products[3]), float(products[-1])]])


@pytest.mark.parametrize(("of", "point"), [("embedding", ("embed", 0)), ("mlp", ("mlp", 2))])
def test_integrated_gradients_are_a_sum_along_the_way(
    both: tuple[Any, PlainModel], of: str, point: tuple[str, int]
) -> None:
    model, plain = both
    layers = None if of == "embedding" else [2]
    width = plain.run(PROMPT)[1][point].shape[-1]
    flat = torch.randn(width, generator=torch.Generator().manual_seed(3))
    for baseline, start in (
        (OTHER, plain.run(OTHER)[1][point][0]),
        (flat, flat.expand(7, width)),
        (0.5, torch.full((7, width), 0.5)),
    ):
        found = integrated_gradients(model, PROMPT, METRIC, of=of, layers=layers, baseline=baseline, steps=6)
        wanted = along(plain, PROMPT, point, start, 6)
        agree(found.effect.values.reshape(-1), wanted)
        edited = float(lead(plain.run(PROMPT, {point: lambda _, start=start: start[None]})[0]))
        ends = float(lead(plain.run(PROMPT)[0])) - edited
        gap = float(found.gap.squeeze())
        assert abs(float(found.clean - found.baseline.squeeze()) - ends) < 1e-4
        assert abs(gap - (ends - float(wanted.sum()))) < 1e-4
        assert found.is_complete == (abs(gap) <= 0.05 * abs(ends))


def test_with_enough_steps_the_parts_add_up(llama: tuple[Any, PlainModel]) -> None:
    model, _ = llama
    some: Any = {"of": "resid_pre", "layers": [2, 3], "baseline": [OTHER, SHORT_OTHER]}
    found = integrated_gradients(model, [PROMPT, SHORT], METRIC, steps=48, **some)
    assert found.effect.dims == ("prompt", "layer", "position") and found.gap.dims == ("prompt", "layer")
    assert found.is_complete and float(abs(found.gap).max()) < 0.01 * float(abs(found.clean - found.baseline).min())
    whole = found.effect.sum("position") - (found.clean - found.baseline)
    assert float(abs(whole).max()) <= float(abs(found.gap).max()) + 1e-6
    part = integrated_gradients(model, [PROMPT, SHORT], METRIC, steps=48, positions={"end": [-2, -1]}, **some)
    assert np.allclose(part.effect.values[..., 0], found.effect.values[..., -2:].sum(-1), atol=1e-5)
    assert np.array_equal(part.gap.values, found.gap.values), "of all tokens, whichever are shown"


def test_few_steps_on_a_hard_way_are_told(llama: tuple[Any, PlainModel]) -> None:
    model, _ = llama
    found = integrated_gradients(model, PROMPT, METRIC, baseline=0.0, steps=1)
    assert not found.is_complete, "an RMS norm jumps at 0"


def test_mistakes_are_told(llama: tuple[Any, PlainModel]) -> None:
    model, _ = llama
    for call, told in (
        (lambda: saliency(model, PROMPT, METRIC, method="mean"), "method is 'norm' or 'dot'"),
        (lambda: saliency(model, PROMPT, METRIC, layers=2), "the embedding is of no layer"),
        (lambda: saliency(model, PROMPT, METRIC, of="pattern"), "'pattern' has no row for each token"),
        (lambda: integrated_gradients(model, PROMPT, METRIC, baseline=0.0, steps=0), "steps are 1-512, not 0"),
        (lambda: integrated_gradients(model, PROMPT, METRIC, baseline=[SHORT]), "7 tokens in the given prompt"),
        (
            lambda: integrated_gradients(model, PROMPT, METRIC, baseline=torch.zeros(5, 3)),
            r"the baseline has the shape \[5, 3\], and what each prompt has at embedding \[7, 32\].*test_saliency",
        ),
        (lambda: integrated_gradients(model, PROMPT, METRIC, baseline=[PROMPT, OTHER]), "2 baseline prompts for 1"),
        (lambda: saliency(model, PROMPT, lambda logits: logits.argmax(-1)), "int64"),
        (lambda: saliency(model, PROMPT, log_probability(99)), "99"),
    ):
        with pytest.raises(GraphError, match=told):
            call()
