"""Lenses, patchscopes and batteries of a served tinyworld: as in this process, and only their results move."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import torch

from polytrace.methods import (
    Prompt,
    Target,
    TunedLens,
    lens_divergence,
    logit_lens,
    object_attention_lens,
    patchscope,
    run_battery,
    token_directions,
    tuned_lens,
)

WITHOUT_TORCH = """
import sys
for name in ("torch", "transformers", "ray"):
    sys.modules[name] = None
import polytrace
from polytrace import methods
model = polytrace.connect(sys.argv[1], "tinyworld")
read = methods.logit_lens(model, [sys.argv[2], "The capital"], positions=None, top_k=2)
print(read.table(0).iloc[7, -1])
battery = methods.run_battery(model, [methods.Prompt(text=sys.argv[2], answers={"right": "Paris"})], no_space=False)
print(f"{battery.probability.values[0, 0]:.0%}")
ask = methods.Target(prompt="You can see Bob in the city of", position=4)
print(methods.patchscope(model, "I read in a book that the Eiffel Tower", ask, 2, generate=2).text.values)
pair = sys.argv[2], sys.argv[2].replace("Eiffel", "Galata")
heads = methods.attribution_patching(model, *pair, methods.logit_difference(" Paris", " Istanbul"), of="z")
print(heads.effect.values.argmax())
"""
TOLERANCE = 1e-5  # of max(1, max|one process|), float32, across rank counts
TOWER, NETHERLANDS = "The Eiffel Tower is in the city of", "The capital city of the Netherlands is"
LAYERS, VOCABULARY, RANKS = 8, 3200, 2


def close(ours: Any, theirs: Any) -> None:
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    assert np.nanmax(np.abs(ours - theirs)) <= TOLERANCE * max(1.0, float(np.nanmax(np.abs(theirs))))
    assert np.array_equal(np.isnan(ours), np.isnan(theirs))


def check_lens(served: Any, world: Any) -> None:
    """Top-k, or what is told of chosen tokens, is all that moves, between ranks too."""
    read: Any
    alone: Any
    read, alone = (logit_lens(one, [TOWER, NETHERLANDS], positions=None, top_k=5) for one in (served, world))
    close(read.logit, alone.logit)
    assert np.array_equal(read.token_id, alone.token_id)
    places = LAYERS * int((read.logit.position_token != "").sum())
    assert read.receipt.result_bytes == places * (5 * (4 + 4) + 4), "five logits, five ids and a partition a place"
    # of each other rank's half of the vocabulary: five logits with their places, and the two numbers of the partition
    assert read.receipt.gathered_bytes <= places * RANKS * (5 * (4 + 8) + 2 * 4)
    assert read.receipt.gathered_bytes < places * VOCABULARY * 4 / 50, "not the logits"
    chosen: Any
    plainly: Any
    chosen, plainly = (logit_lens(one, TOWER, tokens=[" Paris", " Rome"]) for one in (served, world))
    assert np.array_equal(chosen.rank, plainly.rank) and chosen.receipt.result_bytes == LAYERS * (2 * (4 + 4) + 4)


def check_tuned_lens(served: Any, world: Any) -> None:
    """Translators are uploaded once."""
    drawn = torch.Generator().manual_seed(0)
    lens = TunedLens(
        weight=0.02 * torch.randn(LAYERS, 256, 256, generator=drawn), bias=torch.randn(LAYERS, 256, generator=drawn)
    )
    first, again, alone = (tuned_lens(one, [TOWER, NETHERLANDS], lens, top_k=3) for one in (served, served, world))
    close(first.logit, alone.logit)
    assert first.receipt.loaded_bytes >= 7 * 256 * 256 * 4 and again.receipt.loaded_bytes == 0
    assert first.receipt.result_bytes == 2 * LAYERS * (3 * 8 + 4)
    close(lens_divergence(served, [TOWER, NETHERLANDS], lens), lens_divergence(world, [TOWER, NETHERLANDS], lens))


def check_scopes(served: Any, world: Any) -> None:
    """Patchscopes, the object-attention lens and batteries."""
    ask = Target(prompt="You can see Bob in the city of", position=4)
    source = "I read in a book that the Eiffel Tower"
    scope: Any
    alone: Any
    scope, alone = (
        patchscope(one, source, ask, [1, 5], target_layers=[1, 2, 6], top_k=1, generate=2) for one in (served, world)
    )
    close(scope.probability, alone.probability)
    assert scope.text.values.tolist() == alone.text.values.tolist()
    found, plainly = (
        object_attention_lens(one, "The Space Needle is in the city of", source, 3, [0, 3]) for one in (served, world)
    )
    close(found.probability, plainly.probability)
    asked = [Prompt(text=TOWER, answers={"right": "Paris", "wrong": ["Rome", "London"]})]
    battery, by_itself = (run_battery(one, asked, lens="logit", no_space=False) for one in (served, world))
    close(battery.probability, by_itself.probability)
    assert battery.receipt.result_bytes == LAYERS * 2 * 4


def check_directions(served: Any, world: Any) -> None:
    """Tokens' directions."""
    for kind in ("row", "pseudo_inverse"):
        ours, theirs = (token_directions(one, [" Paris", " Rome"], method=kind) for one in (served, world))
        assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


def check_without_torch(url: str) -> None:
    """Reading needs no torch, nor do gradients."""
    command = [sys.executable, "-W", "error", "-c", WITHOUT_TORCH, url, TOWER]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [" Paris 100%", "100%", "[[[' Paris.']]]", "0"]
