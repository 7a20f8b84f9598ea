"""Prompts in cuts, prefixes, small stores: log-probabilities have the bits that they have without."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from families import FAMILIES, Family, model_of
from generated import Ablate, Steer, User, generate_by_hand, ids_of, record, residual_places, serve

from engine.local import LocalBackend
from polytrace.certificate import Generated
from polytrace.graph import Sampling
from polytrace.model import Model
from scheduling.plan import PAGE
from scheduling.policy import PassPolicy
from scheduling.scheduler import Outcome, Scheduler

WHOLE = PassPolicy(prefix_bytes=0)
CUT = PassPolicy(prefix_bytes=0, budget_tokens=64, least_tokens=32, tokens_beside_steps=32)


class Machine:
    """A family in one process beside the plain model."""

    def __init__(self, name: str, folder: Path) -> None:
        self.family: Family = FAMILIES[name]
        self.plain = model_of(name, positions=256)
        self.plain.save_pretrained(folder)
        self.backend = LocalBackend(str(folder), threads=1)
        self.model: Any = Model(self.backend)
        self.position_bytes = self.backend.scheduler._room.position_bytes

    def use(self, policy: PassPolicy, *, trunk_bytes: int | None = None) -> None:
        """From now on; nothing is left of before."""
        self.empty()
        description = self.backend.description
        limits = replace(description.limits, trunk_bytes=trunk_bytes or description.limits.trunk_bytes)
        self.backend.scheduler = Scheduler(replace(description, limits=limits), policy)

    def empty(self) -> None:
        self.backend.forget_prefixes()
        assert self.backend.shard.store.held_bytes == 0

    def serve(self, users: list[User], **options: Any) -> list[list[Generated]]:
        return serve(self.model, self.backend, users, logprobs=2, **options)

    def outcomes(self, users: list[User]) -> list[Outcome]:
        tracers = [record(self.model, user, run=False, logprobs=2) for user in users]
        return self.backend.run_together([self.backend.work_out(tracer.built_request()) for tracer in tracers])

    def user(self, *prompts: tuple[int, ...], new: int = 6, **named: Any) -> User:
        return User(self.family, prompts, new, **named)


def text(seed: int, length: int) -> tuple[int, ...]:
    return tuple(random.Random(seed).choices(range(3, 96), k=length))


@pytest.fixture(scope="module", params=["llama", "gpt2", "gemma3", "gpt_oss"])
def machine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    made = Machine(request.param, tmp_path_factory.mktemp(request.param))
    yield made
    made.backend.close()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    made = Machine("llama", tmp_path_factory.mktemp("llama"))
    yield made
    made.backend.close()


def crowd(machine: Machine) -> list[User]:
    steer, ablate = Steer(machine.family.residual(1), 5), Ablate(residual_places(machine.family), 6)
    return [
        machine.user(text(1, 9), new=16),
        machine.user(text(2, 110)),
        machine.user(text(3, 75), text(3, 75), text(4, 20), sampling=Sampling(do_sample=True, seed=3)),
        machine.user(text(2, 70) + text(5, 12), edits=(steer,)),
        machine.user(text(6, 50), edits=(ablate,), new=10),
    ]


def test_prompts_in_cuts_beside_steps_have_the_bits_of_whole_ones(machine: Machine) -> None:
    users = crowd(machine)
    machine.use(WHOLE)
    alone = [machine.serve([user])[0] for user in users]
    assert ids_of(alone[1]) == generate_by_hand(machine.plain, users[1])[0]
    assert machine.serve(users) == alone
    machine.use(CUT)
    outcomes = machine.outcomes(users)
    assert [list(outcome.receipt.generated) for outcome in outcomes if outcome.receipt is not None] == alone
    receipt = outcomes[1].receipt
    assert receipt is not None and len(receipt.passes) > users[1].max_new_tokens + 2, "it was cut"
    machine.empty()


def test_the_next_turn_has_the_bits_that_it_has_without_the_one_before(machine: Machine) -> None:
    first = machine.user(text(1, 70), text(2, 40), new=12)
    machine.use(WHOLE)
    (said,) = machine.serve([first])
    talk = text(1, 70) + said[0].ids
    steer = Steer(machine.family.residual(1), 5)
    later = [
        machine.user(talk + text(3, 9)),
        machine.user(talk[:50] + text(4, 30), text(1, 70)),
        machine.user(text(2, 40), edits=(steer,)),
        machine.user(text(2, 40) + text(5, 7), text(2, 40) + text(5, 7), sampling=Sampling(do_sample=True, seed=3)),
    ]
    alone = [machine.serve([user])[0] for user in later]
    machine.use(PassPolicy())
    assert machine.serve([first]) == [said]
    outcomes = machine.outcomes(later)
    assert [list(outcome.receipt.generated) for outcome in outcomes if outcome.receipt is not None] == alone
    spared = [one.receipt.token_layers_alone - one.receipt.token_layers for one in outcomes if one.receipt is not None]
    layers = machine.family.num_layers
    assert spared[0] == (len(talk) - 1) * layers and spared[2] == 0
    assert all(machine.serve([user])[0] == wanted for user, wanted in zip(later, alone, strict=True)), "their own too"
    machine.empty()


def test_steering_at_the_last_token_and_at_steps_leaves_the_prompt_to_everybody(llama: Machine) -> None:
    def steered(prompt: tuple[int, ...]) -> tuple[Any, int]:
        with llama.model.generate([list(prompt)], max_new_tokens=5, eos=None) as tracer:
            for _ in tracer.iter[:]:
                llama.model.model.layers[1].output[0][:, -1] *= 1.5
                logits = llama.model.lm_head.output[:, -1].save()
        return logits, tracer.receipt.token_layers

    llama.use(WHOLE)
    plain, _ = llama.serve([llama.user(text(1, 80))]), steered(text(1, 80))
    without, rows = steered(text(1, 80))
    llama.use(PassPolicy())
    assert llama.serve([llama.user(text(1, 80))]) == plain
    found, fewer = steered(text(1, 80))
    assert bool((found == without).all())
    assert rows - fewer == 79 * llama.family.num_layers
    assert llama.serve([llama.user(text(1, 80))]) == plain
    llama.empty()


def test_a_small_store_gives_the_bits_of_a_large_one(llama: Machine) -> None:
    users = [*crowd(llama), *(llama.user(text(number, 30), new=60) for number in range(20, 24))]
    llama.use(WHOLE)
    large = llama.serve(users)
    for pages in (40, 18):
        llama.use(PassPolicy(), trunk_bytes=pages * PAGE * llama.position_bytes)
        assert llama.serve(users) == large
        assert llama.backend.scheduler._room.memory.taken_bytes == 0
    llama.empty()


def test_steps_that_find_no_room_on_a_shard_run_again_and_have_their_bits(llama: Machine) -> None:
    """The scheduler thinks that there is room, and the store says in a pass of steps that there is not."""
    users = [llama.user(text(number, 40), new=70) for number in range(4)]
    llama.use(WHOLE)
    store = llama.backend.shard.store
    alone = [llama.serve([user])[0] for user in users]
    before = store.budget_bytes
    refused: list[int] = []
    take = store._take

    def counted(num_bytes: int) -> None:
        try:
            take(num_bytes)
        except Exception:
            refused.append(num_bytes)
            raise

    store.budget_bytes = 4 * (3 + 4) * PAGE * llama.position_bytes - 1  # all four move from 3 pages to 4
    store.caches._take = counted
    try:
        assert llama.serve(users) == alone
    finally:
        store.budget_bytes, store.caches._take = before, take
    assert refused, "some step had no room"
    llama.empty()
