"""Patching of activations and heads: every cell equals a plain run with that one change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from patched_by_hand import PlainModel, placed
from small import FLOAT32_TOLERANCE
from torch import Tensor

from polytrace.errors import GraphError
from polytrace.methods import (
    divergence,
    log_probability,
    logit,
    logit_difference,
    loss,
    patch_activations,
    patch_heads,
    probability,
)

CLEAN, CORRUPT = [3, 17, 42, 5, 9, 30, 11], [3, 25, 42, 8, 9, 30, 11]
SHORT, SHORT_CORRUPT = [8, 25, 1, 60], [8, 17, 1, 60]
RIGHT, WRONG = 7, 21


def lead(logits: Tensor) -> float:
    return float(logits[-1, RIGHT] - logits[-1, WRONG])


def agree(ours: Any, theirs: list[Any]) -> None:
    """Within float32's tolerance of what plain runs gave; a share within that of what it is a share of."""
    wanted = np.array(theirs, dtype=float)
    assert ours.shape == wanted.shape, (ours.shape, wanted.shape)
    assert (np.isnan(ours) == np.isnan(wanted)).all()
    assert np.nanmax(abs(ours - wanted)) <= 5 * FLOAT32_TOLERANCE * max(1.0, float(np.nanmax(abs(wanted))))
    assert np.nanmax(wanted) - np.nanmin(wanted) > 0.005, "the edits matter"


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("of", ["resid_pre", "attention", "mlp", "z", "mlp_post"])
def test_each_layer_and_position_is_a_plain_run_with_that_value(
    both: tuple[Any, PlainModel], of: str, direction: str
) -> None:
    model, plain = both
    base, giver = (CORRUPT, CLEAN) if direction == "denoise" else (CLEAN, CORRUPT)
    best, least, given = lead(plain.run(CLEAN)[0]), lead(plain.run(CORRUPT)[0]), plain.run(giver)[1]
    metric = logit_difference(RIGHT, WRONG)
    found = patch_activations(model, CLEAN, CORRUPT, metric, of=of, layers=[0, -1], direction=direction)
    theirs = [
        [
            lead(plain.run(base, {(of, n): lambda v, n=n, p=p: placed(v, (0, p), given[of, n][0, p])})[0])
            for p in range(len(base))
        ]
        for n in (0, 3)
    ]
    assert found.effect.dims == ("layer", "position") and found.effect.layer.values.tolist() == [0, 3]
    agree(found.effect.values, [[(value - least) / (best - least) for value in row] for row in theirs])
    agree(np.array([float(found.clean), float(found.corrupt)]), [best, least])
    raw = patch_activations(model, CLEAN, CORRUPT, metric, of=of, layers=[0, -1], direction=direction, normalise=False)
    agree(raw.effect.values, theirs)


HEADS = {"z": "z", "q": "q_rot", "k": "k_rot", "v": "v", "pattern": "pattern"}


@pytest.mark.parametrize("of", HEADS)
def test_each_head_is_a_plain_run_with_that_head(both: tuple[Any, PlainModel], of: str) -> None:
    model, plain = both
    point = HEADS[of]
    given = plain.run(CORRUPT)[1]
    for positions, columns in ((None, slice(None)), ([1, -1], [1, 6]), (3, [3])):
        found = patch_heads(
            model,
            CLEAN,
            CORRUPT,
            log_probability(RIGHT),
            of=of,
            layers=range(1, 3),
            positions=positions,
            direction="noise",
            normalise=False,
        )

        def told_with(layer: int, head: int, columns: Any = columns) -> float:
            def edit(value: Tensor) -> Tensor:
                index = (0, head, columns) if of == "pattern" else (0, columns, head)
                return placed(value, index, given[point, layer][index])

            return float(plain.run(CLEAN, {(point, layer): edit})[0][-1].log_softmax(-1)[RIGHT])

        count = given[point, 1].shape[1 if of == "pattern" else 2]
        theirs = [[told_with(layer, head) for head in range(count)] for layer in (1, 2)]
        assert found.effect.dims == ("layer", "head")
        agree(found.effect.values, theirs)


def test_pairs_of_several_lengths_run_at_once_and_count_from_the_end(both: tuple[Any, PlainModel]) -> None:
    model, plain = both
    pairs = [(CLEAN, CORRUPT), (SHORT, SHORT_CORRUPT)]
    found = patch_activations(
        model,
        [CLEAN, SHORT],
        [CORRUPT, SHORT_CORRUPT],
        logit_difference([RIGHT, 9], [WRONG, 2]),
        layers=1,
        normalise=False,
    )
    assert found.effect.dims == ("prompt", "layer", "position")
    assert found.effect.position.values.tolist() == list(range(-7, 0))
    wanted = []
    for (clean, corrupt), good, bad in zip(pairs, (RIGHT, 9), (WRONG, 2), strict=True):
        given, row = plain.run(clean)[1], []
        for place in range(-7, 0):
            if -place > len(corrupt):
                row.append(float("nan"))
                continue
            edit = {("resid_pre", 1): lambda v, p=place, g=given: placed(v, (0, p), g["resid_pre", 1][0, p])}
            logits = plain.run(corrupt, edit)[0][-1]
            row.append(float(logits[good] - logits[bad]))
        wanted.append([row])
    agree(found.effect.values, wanted)


LIKELY = 3
METRICS: dict[str, tuple[Any, Callable[[Tensor, Tensor], Any]]] = {
    "logit": (logit(RIGHT), lambda logits, clean: logits[-1, RIGHT]),
    "probability": (probability(LIKELY), lambda logits, clean: logits[-1].softmax(-1)[LIKELY]),
    "log-probability": (log_probability(RIGHT), lambda logits, clean: logits[-1].log_softmax(-1)[RIGHT]),
    "divergence": (
        divergence(),
        lambda logits, clean: torch.nn.functional.kl_div(
            logits[-1].log_softmax(-1), clean[-1].log_softmax(-1), reduction="sum", log_target=True
        ),
    ),
    "loss": (loss(2), lambda logits, clean: torch.nn.functional.cross_entropy(logits[1:-1], torch.tensor(CORRUPT[2:]))),
    "own": (
        lambda logits: logits.amax(-1) - logits.mean(-1),
        lambda logits, clean: logits[-1].max() - logits[-1].mean(),
    ),
}


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_is_what_it_says(both: tuple[Any, PlainModel], name: str) -> None:
    model, plain = both
    metric, by_hand = METRICS[name]
    clean, given = plain.run(CLEAN)
    found = patch_activations(model, CLEAN, CORRUPT, metric, of="resid_post", layers=1, normalise=False)
    theirs = [
        float(
            by_hand(
                plain.run(
                    CORRUPT,
                    {("resid_post", 1): lambda v, p=p: placed(v, (0, p), given["resid_post", 1][0, p])},
                )[0],
                clean,
            )
        )
        for p in range(7)
    ]
    assert abs(found.effect.values[0] - np.array(theirs)).max() <= 5 * FLOAT32_TOLERANCE * max(1, max(map(abs, theirs)))
    assert max(theirs) - min(theirs) > 3e-4


def test_a_sweep_shares_rows_and_moves_little(llama: tuple[Any, PlainModel]) -> None:
    model, _ = llama
    found = patch_activations(model, CLEAN, CORRUPT, logit_difference(RIGHT, WRONG))
    receipt = found.receipt
    assert len(receipt.passes) == 1 and receipt.token_layers < 0.5 * receipt.token_layers_alone
    assert receipt.result_bytes < 4 * (28 + 2) + 64  # a number a run


def test_named_steps_are_of_each_pairs_own_tokens(llama: tuple[Any, PlainModel]) -> None:
    model, _ = llama
    steps = {"changed": [[1, 3], [1]], "last": -1}
    found = patch_activations(
        model,
        [CLEAN, SHORT],
        [CORRUPT, SHORT_CORRUPT],
        logit_difference(RIGHT, WRONG),
        of="resid_pre",
        layers=0,
        positions=steps,
    )
    assert found.effect.position.values.tolist() == ["changed", "last"]
    # all that differs at layer 0 is put back: the clean run, bit for bit
    assert found.effect.sel(position="changed").values.tolist() == [[1.0], [1.0]]
    assert found.effect.sel(position="last").values.tolist() == [[0.0], [0.0]]


def test_prompts_of_unequal_length_take_positions_from_the_end(llama: tuple[Any, PlainModel]) -> None:
    model, plain = llama
    longer = [50, *CORRUPT]
    found = patch_activations(
        model, CLEAN, longer, logit_difference(RIGHT, WRONG), layers=1, positions=[-1], normalise=False
    )
    given = plain.run(CLEAN)[1]["resid_pre", 1]
    logits = plain.run(longer, {("resid_pre", 1): lambda v: placed(v, (0, -1), given[0, -1])})[0]
    assert abs(float(found.effect[0, 0]) - lead(logits)) <= FLOAT32_TOLERANCE * max(1, abs(lead(logits)))
    with pytest.raises(GraphError, match=r"7 tokens in the clean prompt and 8 in the corrupt one.*test_patching"):
        patch_activations(model, CLEAN, longer, logit_difference(RIGHT, WRONG))


def test_mistakes_are_told_with_the_numbers(llama: tuple[Any, PlainModel]) -> None:
    model, _ = llama
    metric = logit_difference(RIGHT, WRONG)
    with pytest.raises(GraphError, match="there is no layer 9; this model has layers 0-3"):
        patch_activations(model, CLEAN, CORRUPT, metric, layers=9)
    with pytest.raises(GraphError, match="2 clean prompts and 1 corrupt ones"):
        patch_activations(model, [CLEAN, CLEAN], CORRUPT, metric)
    with pytest.raises(GraphError, match="no position 7 in this prompt, which has 7 tokens"):
        patch_activations(model, CLEAN, CORRUPT, metric, positions=[7])
    with pytest.raises(GraphError, match="'pattern' has no row for each token"):
        patch_activations(model, CLEAN, CORRUPT, metric, of="pattern")
    with pytest.raises(GraphError, match="'mlp' is of no head"):
        patch_heads(model, CLEAN, CORRUPT, metric, of="mlp")
    with pytest.raises(GraphError, match="no head 4; there are heads 0-3"):
        patch_heads(model, CLEAN, CORRUPT, metric, heads=4)
    with pytest.raises(GraphError, match="nothing to restore; normalise=False"):
        patch_activations(model, CLEAN, CLEAN, metric, layers=0)
    with pytest.raises(GraphError, match=r"gives \[1, 64\] for 1 prompts: it has to give one number a prompt, \[1\]"):
        patch_activations(model, CLEAN, CORRUPT, lambda logits: logits * 2, layers=0)
    with pytest.raises(GraphError, match="3 tokens for 1 prompts"):
        patch_activations(model, CLEAN, CORRUPT, logit([1, 2, 3]), layers=0)
