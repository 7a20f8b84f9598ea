"""Methods with gradients, called once on a served tinyworld and once in this process; a learnt vector flips a fact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from small import close

from polytrace.methods import (
    attribution_patching,
    edge_attribution_patching,
    gradient_x_input,
    integrated_gradients,
    interchange,
    learn_rotation,
    learn_steering_vector,
    logit_difference,
    steer,
)

EIFFEL, GALATA = "The Eiffel Tower is in the city of", "The Galata Tower is in the city of"
PLACES = ["Eiffel Tower", "Galata Tower", "Colosseum"]


def check_gradients(there: Any, here: Any, _folder: Path) -> None:
    """Attributions, what is learnt and what it does are those of this process."""
    lead = logit_difference(" Paris", " Istanbul")
    found: dict[str, dict[str, Any]] = {}
    for name, model in (("here", here), ("there", there)):
        own = found[name] = {}
        heads = attribution_patching(model, EIFFEL, GALATA, lead, of="z")
        own["heads"], own["edges"] = heads.effect, edge_attribution_patching(model, EIFFEL, GALATA, lead).effect
        own["tokens"] = gradient_x_input(model, [EIFFEL, "The capital of France is"], lead).effect
        way = integrated_gradients(model, EIFFEL, lead, of="resid_pre", layers=[2, 6], baseline=GALATA, steps=4)
        own["way"] = way.effect
        prompts = [f"You can see the {place} in the city of" for place in PLACES]
        learnt = learn_steering_vector(model, prompts, " London", layer=3, steps=25, lr=20.0, optimiser="sgd")
        told = steer(model, EIFFEL, learnt.vectors, factor=[0.0, 1.0], top_k=1)
        assert told.token.values.flatten().tolist() == [" Paris", " London"], name
        assert len(learnt.receipt.passes) == 51 and heads.receipt.result_bytes < 1000
        own["losses"], own["vector"] = learnt.losses, learnt.vector
        rotation = learn_rotation(model, EIFFEL, GALATA, " Istanbul", layer=5, size=2, steps=3, lr=0.5, optimiser="sgd")
        own["rotation"] = rotation.tensor.T @ rotation.tensor
        moved = interchange(model, EIFFEL, GALATA, lead, rotation=rotation)
        assert float(moved.clean - moved.effect) > 0.5, "it moves something"
        own["moved"] = moved.effect
    for what, mine in found["there"].items():
        one, other = (
            value if isinstance(value, torch.Tensor) else torch.tensor(value.fillna(0.0).values).float()
            for value in (mine, found["here"][what])
        )
        close(one, other)
