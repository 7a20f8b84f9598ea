"""Methods of vectors, called once on a served tinyworld and once in this process; the prompts they are tried on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from hooked import close

from bench.tinyworld.facts import RELATIONS
from polytrace.methods import (
    Gate,
    Task,
    ablate_direction,
    collect_activations,
    contrastive_vectors,
    decompose_residual,
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


def check_vectors(there: Any, here: Any, folder: Path) -> None:
    """Vectors, attribution and collected activations of a service are those of this process, and little moves."""
    task = Task(clean=ROMAN, corrupt=OTHERS[:3], answers=[" Rome"] * 3)
    found = {}
    for name, model in (("here", here), ("there", there)):
        own = found[name] = {}
        vectors = contrastive_vectors(model, ROMAN, OTHERS[:10])
        own["vectors"], own["separation"] = vectors.tensor, vectors.separation
        own["main"] = contrastive_vectors(model, ROMAN, OTHERS[:5], layers=[2, 5], method="pca").tensor
        gate = Gate(direction=vectors[2], layer=2, position=-1, threshold=float(vectors[2] @ vectors[2]) / 8)
        told = steer(model, OTHERS[10:], vectors, [4, 5], [1, -1], [0.0, 2.0], gate=gate, tokens=[" Rome"])
        own["logits"], own["ranks"] = told.logit, told.rank
        changes = (steering_edit(model, vectors, 5, factor=2.0, name="roman"), ablate_direction(model, vectors[5]))
        for number, edited in enumerate(changes):
            with edited.trace(OTHERS[:3]):
                own[f"edited {number}"] = edited.lm_head.output[:, -1, :50].save()
        with model.trace(OTHERS[:3], edits=["roman"]):
            own["by name"] = model.lm_head.output[:, -1, :50].save()
        for by in ("layer", "head", "neuron"):
            told = logit_attribution(model, GIVING, NAMES, by=by, top_k=4 if by == "neuron" else None)
            own[f"logit by {by}"], own[f"rest by {by}"] = told.parts, told.rest
            own[f"bytes by {by}"], carried = told.receipt.result_bytes, told.receipt.carried_bytes
            assert carried < 110_000, "numbers go from stage to stage, no heads' vectors and no weights"
        told = decompose_residual(model, GIVING, by="head", onto=vectors[5][None])
        own["decomposed"] = told.parts
        vector = function_vector(model, task, top_k=4, score="log_probability")
        own["function"], own["effects"], own["heads"] = vector.vector, vector.effects, vector.heads
        kept = collect_activations(
            model, OTHERS[:20], to=folder / name, of=["resid_post", "z"], layers=[2, 6], positions=-1
        )
        own |= {key: kept.array(key) for key in kept.names}
    for name, mine in found["there"].items():
        theirs = found["here"][name]
        if isinstance(mine, (int, tuple)):
            assert mine == theirs, name
        else:
            close(mine, theirs if isinstance(theirs, torch.Tensor) else torch.tensor(theirs.values))
    assert found["there"]["bytes by head"] < 3000  # 8 x 8 numbers of 6 prompts
