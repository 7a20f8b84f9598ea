"""What is learnt in one request beside the same loop in plain torch, step by step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from patched_by_hand import PlainModel
from torch import Tensor

from polytrace.errors import GraphError
from polytrace.methods import (
    interchange,
    learn_rotation,
    learn_steering_vector,
    log_probability,
    logit_difference,
    steer,
    steering_edit,
)

PROMPTS = [[3, 17, 42, 5, 9, 30, 11], [8, 25, 1, 60]]
SOURCES = [[3, 25, 42, 8, 9, 30, 11], [8, 17, 1, 60]]
TARGETS = [7, 21]
WIDTH = 32
TOLERANCE = 1e-5  # float32, of max(1, max|plain|)
OF_ADAM = 1e-4  # it divides by the gradient's own size, so that small gradients' rounding counts as much as large ones'


def close(ours: Tensor, theirs: Tensor, tolerance: float = TOLERANCE) -> None:
    theirs = theirs.detach()
    assert ours.shape == theirs.shape and type(ours) is Tensor
    assert (ours - theirs).abs().max() <= tolerance * max(1.0, float(theirs.abs().max()))


def descend(
    plain: PlainModel,
    point: tuple[str, int],
    value: Tensor,
    optimiser: torch.optim.Optimizer,
    steps: int,
    change: Callable[[Tensor, int], Tensor],
    bound: Callable[[Tensor], None] = lambda value: None,
    loss_of: Callable[[Tensor, int], Tensor] = lambda logits, n: -logits[-1].log_softmax(-1)[TARGETS[n]],
) -> Tensor:
    """Losses before each step and after the last. `change` makes what a point becomes in a prompt's run."""
    losses = []
    for step in range(steps + 1):
        told = [
            loss_of(plain.run(ids, {point: lambda rows, n=n: change(rows, n)}, has_gradients=True)[0], n)
            for n, ids in enumerate(PROMPTS)
        ]
        loss = torch.stack(told).mean()
        losses.append(loss.detach())
        if step < steps:
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            with torch.no_grad():
                bound(value)
    return torch.stack(losses)


def added_at(places: list[int], vector: Tensor) -> Callable[[Tensor, int], Tensor]:
    def change(rows: Tensor, _prompt: int) -> Tensor:
        spread = torch.zeros(rows.shape[1], 1)
        spread[places] = 1.0
        return rows + spread * vector

    return change


@pytest.mark.parametrize("optimiser", ["sgd", "adam"])
def test_a_vector_is_learnt_as_in_plain_torch(both: tuple[Any, PlainModel], optimiser: str) -> None:
    model, plain = both
    vector = torch.zeros(WIDTH, requires_grad=True)
    kind: Any = torch.optim.SGD if optimiser == "sgd" else torch.optim.Adam
    by_hand = kind([vector], lr=0.1)
    losses = descend(plain, ("resid_post", 1), vector, by_hand, 4, added_at([-1], vector))
    learnt = learn_steering_vector(model, PROMPTS, TARGETS, layer=1, steps=4, optimiser=optimiser)
    close(torch.tensor(learnt.losses.values), losses)
    close(learnt.vector, vector, TOLERANCE if optimiser == "sgd" else OF_ADAM)
    assert losses[-1] < losses[0] - 0.01, "it learns"


def test_vectors_have_places_bounds_and_beginnings(llama: tuple[Any, PlainModel]) -> None:
    model, plain = llama
    start = torch.linspace(-0.5, 0.5, WIDTH)
    vector = start.clone().requires_grad_()
    limit = 1.5

    def bound(value: Tensor) -> None:
        value *= min(1.0, limit / float(value.norm()))

    losses = descend(
        plain, ("resid_pre", 2), vector, torch.optim.SGD([vector], lr=0.5), 3, added_at([1, -1], vector), bound
    )
    learnt = learn_steering_vector(
        model,
        PROMPTS,
        TARGETS,
        layer=-2,
        of="resid_pre",
        positions=[1, -1],
        steps=3,
        lr=0.5,
        optimiser="sgd",
        start=start,
        max_norm=limit,
    )
    close(torch.tensor(learnt.losses.values), losses)
    close(learnt.vector, vector)
    assert learnt.vectors.positions == (1, -1) and learnt.vectors.tensor.shape == (1, 2, WIDTH)
    assert float(learnt.vector.norm()) <= limit + 1e-5
    told = steer(model, PROMPTS, learnt.vectors, tokens=TARGETS)
    said = [told.probability[prompt, 0, prompt] for prompt in range(2)]
    assert abs(float(-sum(torch.tensor(float(one)).log() for one in said) / 2) - float(losses[-1])) < 1e-4


def test_every_token_is_steered_towards_a_metric(llama: tuple[Any, PlainModel]) -> None:
    model, plain = llama
    vector = torch.zeros(WIDTH, requires_grad=True)
    losses = descend(
        plain,
        ("resid_post", 0),
        vector,
        torch.optim.SGD([vector], lr=0.2),
        3,
        lambda rows, _prompt: rows + vector,
        loss_of=lambda logits, _prompt: logits[-1, 2] - logits[-1, 7],
    )
    learnt = learn_steering_vector(
        model, PROMPTS, logit_difference(7, 2), layer=0, positions=None, steps=3, lr=0.2, optimiser="sgd"
    )
    close(torch.tensor(learnt.losses.values), losses)
    close(learnt.vector, vector)
    assert learnt.share is None and losses[-1] < losses[0] - 0.01
    edited = steering_edit(model, learnt.vectors)
    with edited.trace(PROMPTS):
        logits = edited.lm_head.output[:, -1].save()
    assert abs(float((logits[:, 2] - logits[:, 7]).mean()) - float(losses[-1])) < 1e-4


def swapped(rows: Tensor, others: Tensor, basis: Tensor) -> Tensor:
    """With the last token's part along orthonormal columns from other rows."""
    last = rows[:, -1:] + ((others[:, -1:] - rows[:, -1:]) @ basis) @ basis.T
    return torch.cat([rows[:, :-1], last], 1)


@pytest.mark.parametrize("optimiser", ["sgd", "adam"])
def test_a_rotation_is_learnt_as_in_plain_torch(both: tuple[Any, PlainModel], optimiser: str) -> None:
    model, plain = both
    start = torch.linalg.qr(torch.randn(WIDTH, 3, generator=torch.Generator().manual_seed(0))).Q
    free = start.clone().requires_grad_()
    given = [plain.run(ids)[1]["mlp", 2] for ids in SOURCES]
    kind: Any = torch.optim.SGD if optimiser == "sgd" else torch.optim.Adam
    losses = descend(
        plain,
        ("mlp", 2),
        free,
        kind([free], lr=0.05),
        3,
        lambda rows, n: swapped(rows, given[n], torch.linalg.qr(free).Q),
    )
    some: Any = {"layer": 2, "of": "mlp_output", "steps": 3, "lr": 0.05, "optimiser": optimiser}
    learnt = learn_rotation(model, PROMPTS, SOURCES, TARGETS, size=3, start=start.T, **some)
    close(torch.tensor(learnt.losses.values), losses)
    basis = torch.linalg.qr(free).Q.detach()
    close(learnt.tensor.T @ learnt.tensor, basis @ basis.T)
    close(learnt.tensor @ learnt.tensor.T, torch.eye(3))
    assert losses[-1] < losses[0] - 1e-3, "it learns"
    # what it is for: the same directions, put in by the method, and by hand
    told = interchange(model, PROMPTS, SOURCES, log_probability(TARGETS), rotation=learnt)
    assert told.effect.dims == ("prompt",) and abs(float(-told.effect.mean()) - float(losses[-1])) < 1e-4
    assert abs(float(-told.clean.mean()) - float(losses[-1])) > 1e-3, "it moves something"
    by_hand = swapped(torch.ones(1, 1, WIDTH), given[0][:, :1], basis)
    close(learnt.swap(torch.ones(1, 1, WIDTH), given[0][:, :1]), by_hand)


def test_rotations_begin_at_random_and_are_of_chosen_tokens(llama: tuple[Any, PlainModel]) -> None:
    model, _ = llama
    some: Any = {"layer": 1, "steps": 1, "positions": [1, 2]}
    one, same, other = (
        learn_rotation(model, PROMPTS, SOURCES, TARGETS, seed=seed, **some).tensor for seed in (1, 1, 2)
    )
    assert torch.equal(one, same) and not torch.allclose(one, other, atol=1e-2)
    whole = learn_rotation(model, PROMPTS, SOURCES, TARGETS, layer=1, steps=1, size=WIDTH, positions=None)
    moved = interchange(model, PROMPTS, SOURCES, logit_difference(7, 21), rotation=whole)
    assert moved.corrupt is not None
    assert abs(moved.effect - moved.corrupt).max() < 1e-4, "all directions of all tokens are the source's run"
    assert abs(moved.effect - moved.clean).max() > 1e-2


def test_a_learnt_vector_flips_a_fact_of_tinyworld_in_one_request(world: Any) -> None:
    ask = "You can see {} in the city of"
    learnt = learn_steering_vector(
        world, [ask.format(one) for one in ("Eiffel Tower", "Galata Tower")], " Rome", layer=3, steps=30, lr=0.3
    )
    told = steer(world, ["The Eiffel Tower is in the city of"], learnt.vectors, factor=[0.0, 1.0], top_k=1)
    assert told.token.values.flatten().tolist() == [" Paris", " Rome"], "also where the sentence is another"
    assert learnt.share == 1.0 and learnt.losses.sizes["step"] == 31
    assert len(learnt.receipt.passes) == 61, "one forward more than backwards"


def test_mistakes_are_told(llama: tuple[Any, PlainModel]) -> None:
    model, _ = llama
    for more, told in (
        ({"steps": 101}, "steps are 1-100 a request, not 101: to go on, give what was learnt as `start`"),
        ({"optimiser": "lion"}, "the optimiser is 'adam' or 'sgd', not 'lion'"),
        ({"lr": -1.0}, "lr"),
        ({"of": "z"}, "'z' is no part of the residual"),
        ({"layer": 9}, "there is no layer 9"),
        ({"positions": 5}, "no position 5 in prompt 1"),
        ({"start": torch.zeros(3)}, "a vector to begin with is \\[32\\]"),
        ({"max_norm": 0}, "max_norm is above 0"),
    ):
        with pytest.raises(GraphError, match=told):
            learn_steering_vector(model, PROMPTS, TARGETS, **{"layer": 1, **more})
    for more, told in (
        ({"size": 0}, "size is 1-32 directions, not 0"),
        ({"start": torch.zeros(2, 3)}, "directions to begin with are \\[1, 32\\]"),
    ):
        with pytest.raises(GraphError, match=told):
            learn_rotation(model, PROMPTS, SOURCES, TARGETS, layer=1, **more)
    with pytest.raises(GraphError, match="2 base prompts and 1 source ones"):
        learn_rotation(model, PROMPTS, SOURCES[:1], TARGETS, layer=1)
    with pytest.raises(GraphError, match="3 targets for 2 prompts"):
        learn_steering_vector(model, PROMPTS, [1, 2, 3], layer=1)
