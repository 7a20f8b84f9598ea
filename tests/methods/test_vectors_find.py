"""Vectors and attribution on tinyworld: what they find in it."""

from __future__ import annotations

from typing import Any

import torch
from vector_calls import CITIES, GIVING, NAMES, OTHERS, ROMAN

from polytrace.methods import (
    ablate_direction,
    contrastive_vectors,
    logit_attribution,
    steer,
)


def test_a_vector_makes_rome_of_every_landmarks_city(world: Any) -> None:
    found = contrastive_vectors(world, ROMAN, OTHERS[:15])
    assert float(found.separation.sel(layer=5, measure="accuracy")) > 0.9
    told = (
        steer(world, OTHERS[15:], found, 5, -1, [0.0, 3.0], tokens=[" Rome"])
        .probability.mean("prompt")
        .sel(token=" Rome")
    )
    assert float(told.sel(factor=0.0)) < 0.01 and float(told.sel(factor=3.0)) > 0.9
    without = ablate_direction(world, found[7] / found[7].norm())
    with without.trace(ROMAN):
        left = world.lm_head.output[:, -1].softmax(-1)[:, rome(world)].mean().save()
    assert float(left) < 0.2, "and without its direction hardly a landmark is in Rome"


def test_attribution_finds_the_induction_head(world: Any) -> None:
    draw = torch.Generator().manual_seed(0)
    rows = [(300 + torch.randperm(2700, generator=draw)[:24]).tolist() for _ in range(16)]
    found = logit_attribution(world, [[*row, *row[:12]] for row in rows], [row[12] for row in rows], by="head")
    effects = found.parts.mean("prompt")
    best = effects.stack(place=("layer", "head")).idxmax("place").item()
    assert best == (1, 0), "the head that the model's card names"
    others = effects.where(effects != effects.sel(layer=1, head=0), 0.0)
    assert float(effects.sel(layer=1, head=0)) > 20 * float(abs(others).max())


def test_attribution_finds_who_names_the_one_that_receives(world: Any) -> None:
    heads = logit_attribution(world, GIVING, NAMES, by="head").parts.mean("prompt")
    assert heads.stack(place=("layer", "head")).idxmax("place").item() == (4, 6)
    assert float(heads.sel(layer=1, head=0)) < -2, "the induction head says the one that was named twice"
    direct = abs(heads.sel(layer=2, head=[0, 1]))
    assert float(direct.max()) < 0.3, "the heads that decide, which path patching finds, hardly speak to the answer"


def test_a_facts_city_is_written_by_late_layers(world: Any) -> None:
    one = {place: city for place, city in CITIES.items() if len(pieces(world, city)) == 1 and city != "Rome"}
    prompts = [f"You can see {place} in the city of" for place in one]
    found = logit_attribution(world, prompts, ([f" {city}" for city in one.values()], " Rome")).parts.mean("prompt")
    attention, mlp = (found.sel(part=part) for part in ("attention", "mlp"))
    assert float(attention.sel(layer=[3, 4, 5, 7]).sum()) > 0.7 * float(attention.sum())
    assert float(mlp.sel(layer=[6, 7]).sum()) > 0.9 * float(mlp.sum())


def pieces(model: Any, city: str) -> list[int]:
    return list(model.tokenizer.encode(f" {city}", add_special_tokens=False).ids)


def rome(model: Any) -> int:
    (token,) = pieces(model, "Rome")
    return token
