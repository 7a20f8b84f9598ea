"""Patching finds in tinyworld what it was trained with."""

from __future__ import annotations

import random
from typing import Any

import pytest

from bench.tinyworld.facts import RELATIONS
from polytrace.methods import (
    ablate,
    knock_out_attention,
    logit_difference,
    loss,
    patch_activations,
    patch_heads,
    patch_paths,
    probability,
    top_k_table,
    trace_causes,
)

EIFFEL, GALATA = "The Eiffel Tower is in the city of", "The Galata Tower is in the city of"
PEOPLE = [pair.split() for pair in ("Mary John", "Tom Anna", "Paul Lucy", "Laura Frank", "Simon Karen")]
GIVES = [f"When {a} and {b} went to the store, {b} gave a drink to" for a, b in PEOPLE]
SWAPPED = [f"When {a} and {b} went to the store, {a} gave a drink to" for a, b in PEOPLE]
LEAD = logit_difference([f" {a}" for a, _ in PEOPLE], [f" {b}" for _, b in PEOPLE])


@pytest.fixture(scope="module")
def model(world: Any) -> Any:
    return world


def repeated(count: int) -> list[list[int]]:
    """Random tokens, said twice."""
    rng = random.Random(0)
    halves = [rng.sample(range(3, 3200), 12) for _ in range(count)]
    return [[0, *half, *half] for half in halves]


def heads(found: Any, number: int, **how: Any) -> set[tuple[int, int]]:
    table = top_k_table(found.mean("prompt"), number, **how)
    return set(zip(table["layer"].tolist(), table["head"].tolist(), strict=True))


def test_a_fact_goes_from_its_subject_to_the_last_token_in_the_middle_layers(model: Any) -> None:
    steps = {"subject": "Eiffel Tower", "last": -1}
    paris = logit_difference(" Paris", " Istanbul")
    restored = patch_activations(model, EIFFEL, GALATA, paris, of="resid_post", positions=steps).effect
    subject, last = restored.sel(position="subject").values, restored.sel(position="last").values
    assert subject[:3].min() > 0.9 and subject[-1] < 0.05
    assert abs(last[:2]).max() < 0.05 and last[-3:].min() > 0.7
    causes = trace_causes(model, EIFFEL, "Eiffel Tower", probability(" Paris"), window=3, samples=4, positions=[3, -1])
    mlp, attention = causes.effect.sel(restored="mlp", position=3), causes.effect.sel(restored="attention", position=-1)
    assert mlp[:3].min() > 0.5 > 0.3 > mlp[3:].max(), "early MLPs at the subject's end know the city"
    assert attention[3:6].min() > 0.7 > 0.2 > attention[:2].max(), "attention in the middle carries it"


def test_the_city_goes_to_the_last_token_in_the_middle_layers(model: Any) -> None:
    landmarks = next(relation.pairs for relation in RELATIONS if relation.name == "landmark_city")
    encode = model.tokenizer.encode
    facts = {
        one: " " + city for one, city in landmarks.items() if len(encode(" " + city, add_special_tokens=False)) == 1
    }
    subjects, cities = list(facts)[:12], list(facts.values())[:12]
    prompts = [f"You can see {subject} in the city of" for subject in subjects]
    change = knock_out_attention(model, prompts, -1, subjects, probability(cities), window=3).effect.mean("prompt")
    assert (
        float(abs(change[:2]).max()) < 0.05 and int(change.values.argmin()) in (3, 4, 5) and float(change.min()) < -0.3
    )


def test_the_induction_head_and_the_head_before_it_are_needed(model: Any) -> None:
    harm = ablate(model, repeated(4), loss(14), method="mean").effect
    assert heads(harm, 2) == {(0, 0), (1, 0)}
    assert float(abs(harm.sel(layer=slice(2, None)).mean("prompt")).max()) < 0.2


def test_heads_that_decide_who_receives_speak_to_later_queries(model: Any) -> None:
    kept = patch_heads(model, GIVES, SWAPPED, LEAD, of="z", positions=-1, direction="noise").effect
    assert {(2, 0), (2, 1)} < heads(kept, 3, smallest=True)
    direct = patch_paths(model, GIVES, SWAPPED, LEAD, senders=[(2, 0), (2, 1)], positions=-1, mlps="frozen")
    queries = patch_paths(
        model, GIVES, SWAPPED, LEAD, senders=[(2, 0), (2, 1)], positions=-1, receivers="q", mlps="frozen"
    )
    assert direct.effect.mean() > -1 and queries.effect.mean() < -5
