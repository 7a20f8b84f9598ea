"""Random generations: other programs at every step, values handed on between steps and invokes, ends of all kinds.

Promises 1 to 3 at every step: merged, sharing rows or not, arriving whenever they like and alone they give the same
tokens and the same bits, and the tokens and numbers of plain Hugging Face, step by step with a cache of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from random import Random

import pytest
import torch
from families import model_of
from generation_by_hand import run_by_hand
from generation_programs import (
    Add,
    Favour,
    Fill,
    Flood,
    Keep,
    Lens,
    Look,
    Mix,
    Program,
    Scale,
    See,
    SeeToken,
    Shift,
    StopAt,
    Take,
    crowd,
    written,
)
from torch import Tensor
from transformers import PreTrainedModel
from width import wide

from engine.local import LocalBackend
from polytrace.errors import CancelledError
from polytrace.graph import Sharing
from scheduling.loop import step
from scheduling.policy import PassPolicy
from scheduling.scheduler import Outcome

FLOAT32_TOLERANCE = 1e-5  # of max(1, max|plain|)
EVERYONE = PassPolicy(budget_tokens=1 << 20, max_members=1000)
FAMILIES = ["llama", "gpt2", "gemma2", "mistral"]
CROWD = 6
EDITS = (Add, Fill, Flood, Scale, Favour, Shift)


class Served:
    """A family in this process, and the plain model beside it."""

    def __init__(self, family: str, folder: str) -> None:
        self.family, self.plain = family, model_of(family)
        self.plain.save_pretrained(folder)
        self.backend = LocalBackend(folder, threads=1, policy=EVERYONE)

    def run(self, users: list[Program], sharing: Sharing = Sharing.TENANT) -> list[Outcome]:
        return run_all(self.backend, users, sharing)


def run_all(backend: LocalBackend, users: list[Program], sharing: Sharing = Sharing.TENANT) -> list[Outcome]:
    """How all users' requests end, merged."""
    outcomes = backend.run_together([backend.work_out(written(user, sharing)) for user in users])
    for outcome, user in zip(outcomes, users, strict=True):
        assert outcome.error is None, (outcome.error, user)
    return outcomes


def generated(outcome: Outcome) -> dict[tuple[int, int], tuple[tuple[int, ...], str]]:
    assert outcome.receipt is not None
    return {(one.invoke, one.sequence): (one.ids, one.finish) for one in outcome.receipt.generated}


def same_bits(one: Outcome, other: Outcome) -> bool:
    """Tokens, ends, which values came, and their bits."""
    return (
        generated(one) == generated(other)
        and one.values.keys() == other.values.keys()
        and all(torch.equal(value, other.values[name]) for name, value in one.values.items())
    )


def far(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """Largest `max|a - b| / max(1, max|b|)`; the same values came."""
    assert ours.keys() == theirs.keys()
    worst = 0.0
    for name, value in ours.items():
        plain = theirs[name]
        assert value.shape == plain.shape, (name, value.shape, plain.shape)
        scale = max(1.0, float(plain.abs().max()))
        worst = max(worst, float((value.float() - plain.float()).abs().max()) / scale)
    return worst


@pytest.fixture(scope="module", params=FAMILIES)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Served:
    return Served(request.param, str(tmp_path_factory.mktemp(request.param)))


@pytest.mark.parametrize("seed", [0, wide(1), wide(2)])
def test_random_generations_have_their_own_bits_and_hugging_faces_tokens(served: Served, seed: int) -> None:
    users = crowd(served.family, CROWD, seed)
    shared, merged = served.run(users), served.run(users, Sharing.OFF)
    for user, ours, theirs in zip(users, shared, merged, strict=True):
        (alone,) = served.run([user])
        assert same_bits(ours, alone), user
        assert same_bits(theirs, alone), user
        by_hand = run_by_hand(served.plain, user)
        assert generated(ours) == by_hand.generated, user
        assert far(ours.values, by_hand.values) <= FLOAT32_TOLERANCE, user
    nothing_is_left(served)


def nothing_is_left(served: Served) -> None:
    """Neither values nor keys of anybody, once nobody is to go on from what others had."""
    served.backend.forget_prefixes()
    assert not served.backend.shard._states
    assert served.backend.shard.store.held_bytes == 0
    assert not served.backend.scheduler._jobs


def test_requests_that_arrive_and_are_cancelled_at_any_time_are_as_alone(served: Served) -> None:
    users, random = crowd(served.family, 24, 100), Random(100)
    programs = [served.backend.work_out(written(user)) for user in users]
    unwanted = {program.request for program in programs[::5]}
    scheduler, shards = served.backend.scheduler, served.backend.shards
    outcomes: dict[str, Outcome] = {}
    waiting = list(programs)
    while len(outcomes) < len(programs):
        for program in waiting[: random.choice([0, 1, 2])]:
            scheduler.add(waiting.pop(waiting.index(program)))
        if unwanted and random.random() < 0.3:
            scheduler.cancel(unwanted.pop())  # it may be on its way, have ended, or not be there yet
        step(scheduler, shards)
        outcomes.update((outcome.request, outcome) for outcome in scheduler.take_outcomes())
    while scheduler.has_work():
        step(scheduler, shards)
    nothing_is_left(served)
    num_cancelled = 0
    for user, program in zip(users, programs, strict=True):
        outcome = outcomes[program.request]
        if outcome.error is not None:
            assert isinstance(outcome.error, CancelledError)
            num_cancelled += 1
            continue
        (alone,) = served.run([user])
        assert same_bits(outcome, alone), user
    assert num_cancelled < len(programs) / 2


def test_edits_matter_at_later_steps_and_every_kind_of_statement_is_drawn() -> None:
    """The oracle would notice an edit that is dropped, at whichever step it stands."""
    plain = model_of("llama")
    kinds: set[type] = set()
    finishes: set[str] = set()
    moved = edited = 0
    for program in _programs(40):
        kinds.update(type(one) for block in program.blocks for one in block.statements)
        late = tuple(block for block in program.blocks if block.step > 0)
        whole = run_by_hand(plain, program)
        finishes.update(finish for _, finish in whole.generated.values())
        if any(isinstance(one, EDITS) for block in late for one in block.statements):
            edited += 1
            moved += _differs(plain, program, whole.values, whole.generated)
    assert kinds == {Take, Mix, Add, Fill, Flood, Scale, Look, See, Lens, Keep, Favour, SeeToken, Shift, StopAt}
    assert finishes == {"length", "eos", "stop"}
    assert edited >= 20 and moved >= 0.5 * edited  # some are at a place that nothing is read behind


def _programs(count: int) -> Iterator[Program]:
    for seed in range(count // 4):
        yield from crowd("llama", 4, seed)


def _differs(plain: PreTrainedModel, program: Program, values: Mapping[str, Tensor], told: object) -> bool:
    """Whether the program gives something else when its later steps edit nothing."""
    blocks = tuple(
        block
        if block.step == 0
        else replace(block, statements=tuple(one for one in block.statements if not isinstance(one, EDITS)))
        for block in program.blocks
    )
    other = run_by_hand(plain, replace(program, blocks=blocks))
    if other.generated != told or other.values.keys() != values.keys():
        return True
    return far(values, other.values) > 100 * FLOAT32_TOLERANCE
