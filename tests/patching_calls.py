"""Every method of patching, called once on a served tinyworld and once in this process."""

from __future__ import annotations

import random
from typing import Any

import numpy as np

from polytrace.methods import (
    Sweep,
    ablate,
    divergence,
    knock_out_attention,
    logit_difference,
    loss,
    patch_activations,
    patch_heads,
    patch_paths,
    probability,
    trace_causes,
)

TOLERANCE = 1e-5  # of max(1, max|in one process|), float32
EIFFEL, GALATA = "The Eiffel Tower is in the city of", "The Galata Tower is in the city of"
PEOPLE = [pair.split() for pair in ("Mary John", "Tom Anna")]
GIVES = [f"When {a} and {b} went to the store, {b} gave a drink to" for a, b in PEOPLE]
SWAPPED = [f"When {a} and {b} went to the store, {a} gave a drink to" for a, b in PEOPLE]


def every_method(model: Any) -> dict[str, Sweep]:
    """A sweep by the name of what is swept."""
    city = logit_difference(" Paris", " Istanbul")
    who = logit_difference([f" {a}" for a, _ in PEOPLE], [f" {b}" for _, b in PEOPLE])
    rng = random.Random(0)
    halves = [rng.sample(range(3, 3200), 6) for _ in range(2)]
    twice: Any = [[0, *half, *half] for half in halves]
    some: Any = {"layers": [1, 5], "normalise": False}
    return {
        "activations": patch_activations(model, EIFFEL, GALATA, city, of="resid_mid", **some),
        "attention": patch_activations(model, GIVES, SWAPPED, divergence(), of="attention", positions=-1, **some),
        "patterns": patch_heads(model, GIVES, SWAPPED, who, of="pattern", direction="noise", **some),
        "keys": patch_heads(model, GIVES, SWAPPED, who, of="k", direction="noise", **some),
        "paths": patch_paths(model, GIVES, SWAPPED, who, positions=-1, layers=[1, 4]),
        "receivers": patch_paths(model, GIVES, SWAPPED, who, senders="mlps", receivers=[(5, 3, "q"), (7, "mlp")]),
        "causes": trace_causes(
            model, EIFFEL, "Eiffel Tower", probability(" Paris"), window=3, samples=3, layers=[2, 4]
        ),
        "means": ablate(model, twice, loss(8), layers=range(2)),
        "others' means": ablate(model, twice, loss(8), of="mlp", reference=[*GIVES, EIFFEL], layers=[0, 1]),
        "resampled": ablate(model, twice, loss(8), of="layer", method="resample", layers=[1, 6]),
        "knockout": knock_out_attention(
            model, [EIFFEL, GIVES[0]], -1, ["Eiffel Tower", "store"], city, window=3, layers=[3, 4]
        ),
    }


def check_equal(served: dict[str, Sweep], own: dict[str, Sweep]) -> None:
    """The numbers of one process, of runs that share rows, at the price of a number a run."""
    for name, here in own.items():
        there = served[name]
        assert there.effect.dims == here.effect.dims and there.effect.shape == here.effect.shape, name
        limit = TOLERANCE * max(1.0, float(abs(here.clean).max()), float(abs(here.effect).max()))
        assert np.nanmax(abs(there.effect.values - here.effect.values)) <= limit, name
        assert np.nanmax(abs(here.effect.values)) > 0.01, name
        assert there.receipt.token_layers < there.receipt.token_layers_alone, name
        assert there.receipt.result_bytes <= 4 * (here.effect.size * 3 + 64), name
