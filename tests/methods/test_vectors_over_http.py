"""Vectors and attribution on tinyworld: what they find in it, and the same numbers on 2 x 2 shards over HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hooked import close

import polytrace
from bench.service import running_service
from bench.tinyworld import FOLDER
from bench.tinyworld.facts import RELATIONS
from polytrace.methods import (
    Gate,
    Task,
    ablate_direction,
    collect,
    contrastive_vectors,
    decompose,
    function_vector,
    logit_attribution,
    steer,
    steering_edit,
)

CITIES = next(relation.pairs for relation in RELATIONS if relation.name == "landmark_city")
ROMAN = [f"You can see {place} in the city of" for place, city in CITIES.items() if city == "Rome"]
OTHERS = [f"You can see {place} in the city of" for place, city in CITIES.items() if city != "Rome"][:30]
PEOPLE = [
    ("Mary", "John"),
    ("Tom", "Anna"),
    ("Paul", "Lucy"),
    ("Laura", "Frank"),
    ("Simon", "Karen"),
    ("Nina", "Oscar"),
]
GIVING = [f"When {a} and {b} went to the store, {b} gave a drink to" for a, b in PEOPLE]
NAMES: Any = ([f" {a}" for a, _ in PEOPLE], [f" {b}" for _, b in PEOPLE])


@pytest.fixture(scope="module")
def here() -> Iterator[Any]:
    with polytrace.load(FOLDER, threads=1) as model:
        yield model


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    log = tmp_path_factory.mktemp("service") / "serve.log"
    with running_service(FOLDER, name="tinyworld", stages=2, ranks=2, log=log) as service:
        yield polytrace.connect(service.url, "tinyworld")


def test_a_vector_makes_rome_of_every_landmarks_city(here: Any) -> None:
    found = contrastive_vectors(here, ROMAN, OTHERS[:15])
    assert float(found.separation.sel(layer=5, measure="accuracy")) > 0.9
    told = (
        steer(here, OTHERS[15:], found, 5, -1, [0.0, 3.0], tokens=[" Rome"])
        .probabilities.mean("prompt")
        .sel(token=rome(here))
    )
    assert float(told.sel(factor=0.0)) < 0.01 and float(told.sel(factor=3.0)) > 0.9
    without = ablate_direction(here, found[7] / found[7].norm())
    with without.trace(ROMAN):
        left = here.lm_head.output[:, -1].softmax(-1)[:, rome(here)].mean().save()
    assert float(left) < 0.2, "and without its direction hardly a landmark is in Rome"


def test_attribution_finds_the_induction_head(here: Any) -> None:
    draw = torch.Generator().manual_seed(0)
    rows = [(300 + torch.randperm(2700, generator=draw)[:24]).tolist() for _ in range(16)]
    found = logit_attribution(here, [[*row, *row[:12]] for row in rows], [row[12] for row in rows], by="head")
    effects = found.parts.mean("prompt")
    best = effects.stack(place=("layer", "head")).idxmax("place").item()
    assert best == (1, 0), "the head that the model's card names"
    others = effects.where(effects != effects.sel(layer=1, head=0), 0.0)
    assert float(effects.sel(layer=1, head=0)) > 20 * float(abs(others).max())


def test_attribution_finds_who_names_the_one_that_receives(here: Any) -> None:
    heads = logit_attribution(here, GIVING, NAMES, by="head").parts.mean("prompt")
    assert heads.stack(place=("layer", "head")).idxmax("place").item() == (4, 6)
    assert float(heads.sel(layer=1, head=0)) < -2, "the induction head says the one that was named twice"
    direct = abs(heads.sel(layer=2, head=[0, 1]))
    assert float(direct.max()) < 0.3, "the heads that decide, which path patching finds, hardly speak to the answer"


def test_a_facts_city_is_written_by_late_layers(here: Any) -> None:
    one = {place: city for place, city in CITIES.items() if len(pieces(here, city)) == 1 and city != "Rome"}
    prompts = [f"You can see {place} in the city of" for place in one]
    found = logit_attribution(here, prompts, ([f" {city}" for city in one.values()], " Rome")).parts.mean("prompt")
    attention, mlp = (found.sel(part=part) for part in ("attention", "mlp"))
    assert float(attention.sel(layer=[3, 4, 5, 7]).sum()) > 0.7 * float(attention.sum())
    assert float(mlp.sel(layer=[6, 7]).sum()) > 0.9 * float(mlp.sum())


def test_shards_give_the_same_numbers_over_http(here: Any, there: Any, tmp_path: Path) -> None:
    task = Task(clean=ROMAN, corrupted=OTHERS[:3], answers=[" Rome"] * 3)
    found = {}
    for name, model in (("here", here), ("there", there)):
        own = found[name] = {}
        vectors = contrastive_vectors(model, ROMAN, OTHERS[:10])
        own["vectors"], own["separation"] = vectors.tensor, vectors.separation
        own["main"] = contrastive_vectors(model, ROMAN, OTHERS[:5], layers=[2, 5], method="pca").tensor
        gate = Gate(direction=vectors[2], layer=2, position=-1, threshold=float(vectors[2] @ vectors[2]) / 8)
        told = steer(model, OTHERS[10:], vectors, [4, 5], [1, -1], [0.0, 2.0], gate=gate, tokens=[" Rome"])
        own["logits"], own["top"] = told.logits, told.top
        changes = (steering_edit(model, vectors, 5, factor=2.0, name="roman"), ablate_direction(model, vectors[5]))
        for number, edited in enumerate(changes):
            with edited.trace(OTHERS[:3]):
                own[f"edited {number}"] = edited.lm_head.output[:, -1, :50].save()
        with model.trace(OTHERS[:3], edits=["roman"]):
            own["by name"] = model.lm_head.output[:, -1, :50].save()
        for by in ("layer", "head", "neuron"):
            told = logit_attribution(model, GIVING, NAMES, by=by, top=4 if by == "neuron" else None)
            own[f"logit by {by}"], own[f"rest by {by}"] = told.parts, told.rest
            own[f"bytes by {by}"], carried = told.receipt.result_bytes, told.receipt.carried_bytes
            assert carried < 110_000, "numbers go from stage to stage, no heads' vectors and no weights"
        told = decompose(model, GIVING, by="head", onto=vectors[5][None])
        own["decomposed"] = told.parts
        vector = function_vector(model, task, heads=4, score="log_probability")
        own["function"], own["effects"], own["heads"] = vector.vector, vector.effects, vector.heads
        kept = collect(model, OTHERS[:20], to=tmp_path / name, of=["resid_post", "z"], layers=[2, 6], positions=-1)
        own |= {key: kept.array(key) for key in kept.names}
    for name, mine in found["there"].items():
        theirs = found["here"][name]
        if isinstance(mine, (int, tuple)):
            assert mine == theirs, name
        else:
            close(mine, theirs if isinstance(theirs, torch.Tensor) else torch.tensor(theirs.values))
    assert found["there"]["top"].coords["text"].equals(found["here"]["top"].coords["text"])
    assert found["there"]["bytes by head"] < 3000  # 8 x 8 numbers of 6 prompts


def pieces(model: Any, city: str) -> list[int]:
    return list(model.tokenizer.encode(f" {city}", add_special_tokens=False).ids)


def rome(model: Any) -> int:
    (token,) = pieces(model, "Rome")
    return token
