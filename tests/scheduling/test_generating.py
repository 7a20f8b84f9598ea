"""Generations in the queue: steps go first, prompts beside them in cuts; who finds no room waits or is put back."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from polytrace.certificate import Token
from polytrace.description import ModelDescription
from polytrace.errors import TooLargeError
from polytrace.graph import Sharing
from scheduling.loop import step
from scheduling.plan import PAGE, PassTooLargeError, Plan, Program, RequestId
from scheduling.policy import PassPolicy
from scheduling.scheduler import Outcome, Scheduler
from tests.scheduling.generations import (
    DrawingShards,
    Tokens,
    expected,
    generating_llama,
    generation,
    steering,
)
from tests.scheduling.tiny import Recorder

LAYERS = 4
ONE = generating_llama()


def prompt(length: int, seed: int) -> Tokens:
    return tuple(random.Random(seed).choices(range(32), k=length))


class Service:
    """A queue and its shards."""

    def __init__(self, description: ModelDescription = ONE, depth: int = 1, **policy: int) -> None:
        self.scheduler = Scheduler(description, PassPolicy(**policy))
        self.shards = DrawingShards(description, depth)
        self.outcomes: dict[str, Outcome] = {}
        self.told: dict[str, list[Token]] = {}

    def add(self, *programs: Program) -> None:
        for program in programs:
            self.scheduler.add(program)

    def step(self) -> None:
        step(self.scheduler, self.shards)
        for progress in self.scheduler.take_progress():
            self.told.setdefault(progress.request, []).extend(progress.tokens)
            assert progress.passes_done <= progress.passes
        for outcome in self.scheduler.take_outcomes():
            assert outcome.request not in self.outcomes
            self.outcomes[outcome.request] = outcome
            self.told.setdefault(outcome.request, []).extend(outcome.tokens)

    def run(self, count: int) -> None:
        for _ in range(5000):
            if len(self.outcomes) == count:
                break
            self.step()
        assert len(self.outcomes) == count, "nobody waits for ever"

    def tokens(self, name: str, sequence: int = 0) -> Tokens:
        outcome = self.outcomes[name]
        assert outcome.receipt is not None, outcome.error
        told = tuple(one.id for one in self.told[name] if one.sequence == sequence)
        assert outcome.receipt.generated[sequence].ids == told, "every token is told once"
        return told

    def empty(self) -> None:
        """Nothing is held behind all of them."""
        self.scheduler.forget_prefixes()
        while self.scheduler.has_work():
            self.step()
        assert not self.shards.caches
        memory = self.scheduler._room.memory
        assert memory.taken_bytes == memory.prefixes.held_bytes == len(memory.prefixes) == 0


def rows(plan: Plan) -> tuple[int, int]:
    """Rows of steps, and of others."""
    steps = sum(1 for view in plan.views if view.begins for segment in view.segments if segment >= 0)
    return steps, plan.layer_rows[0] - steps


def test_a_long_prompt_runs_beside_steps_in_cuts_and_gives_the_same() -> None:
    service = Service(tokens_beside_steps=64)
    service.add(*(generation(ONE, f"short {n}", prompt(20, n), new=40) for n in range(3)))
    for _ in range(3):
        service.step()
    long = prompt(1000, 9)
    service.add(generation(ONE, "long", long, new=5))
    first = len(service.shards.plans)
    service.run(4)
    beside = [rows(plan) for plan in service.shards.plans[first:]]
    assert all(steps == 3 for steps, _ in beside[:16]), "nobody waits for it"
    assert [others for _, others in beside[:15]] == [64] * 15
    assert max(others for steps, others in beside if steps) <= 64
    assert service.tokens("long") == expected(long, 5)
    for n in range(3):
        assert service.tokens(f"short {n}") == expected(prompt(20, n), 40)
    receipt = service.outcomes["long"].receipt
    assert receipt is not None and len(receipt.passes) == 16 + 4
    assert receipt.token_layers == receipt.token_layers_alone == (1000 + 4) * LAYERS
    assert all(entry.requests == 4 for entry in receipt.passes[:15])
    service.empty()


@pytest.mark.parametrize("sharing", Sharing)
def test_a_prompt_longer_than_a_pass_takes_several(sharing: Sharing) -> None:
    service = Service(budget_tokens=96, prefix_bytes=0)
    prompts = (prompt(200, 1), prompt(200, 1), prompt(45, 2))
    service.add(generation(ONE, "a", *prompts, sharing=sharing))
    service.run(1)
    for place, own in enumerate(prompts):
        assert service.tokens("a", place) == expected(own)
    assert max(plan.layer_rows[0] for plan in service.shards.plans) <= 96
    service.empty()


def test_what_is_written_to_all_of_a_prompt_goes_in_one_piece_after_some_passes() -> None:
    service = Service(tokens_beside_steps=64, max_waits=5)
    service.add(generation(ONE, "short", prompt(20, 1), new=30))
    service.step()
    service.add(generation(ONE, "long", prompt(200, 2), new=2, nodes=steering(1, 2)))
    service.run(2)
    long = [place for place, plan in enumerate(service.shards.plans) if rows(plan)[1] == 200]
    assert long == [6] and rows(service.shards.plans[6]) == (1, 200)
    service.empty()


def test_traces_and_cuts_of_prompts_take_turns_beside_steps() -> None:
    service = Service(tokens_beside_steps=32)
    service.add(generation(ONE, "short", prompt(20, 1), new=60))
    service.step()
    service.add(generation(ONE, "long", prompt(500, 2), new=2))
    for number in range(20):
        service.add(_trace(f"trace {number}", 12))
        service.step()
    done = {name for name in service.outcomes if name.startswith("trace")}
    assert len(done) >= 15, "traces do not stand behind a long prompt"
    service.run(22)
    receipt = service.outcomes["long"].receipt
    assert receipt is not None and len(receipt.passes) < 40, "nor it behind them"
    assert max(rows(plan)[1] for plan in service.shards.plans) <= 32
    service.empty()


def _trace(name: str, tokens: int) -> Program:
    r = Recorder(ONE, [[(len(name) + sum(map(ord, name)) + token) % 32 for token in range(tokens)]])
    r.save(r.read("lm_head"), "logits")
    return r.work_out(name)


def test_steps_go_in_groups_that_keep_stages_busy() -> None:
    two = generating_llama(2)
    service = Service(two, depth=3, least_steps=2)
    service.add(*(generation(two, f"{n}", prompt(10, n), new=30) for n in range(12)))
    service.run(12)
    full = [rows(plan)[0] for plan in service.shards.plans[20:60]]
    assert max(full) <= 5 and sum(full) / len(full) > 3, "about a third in each"
    for n in range(12):
        assert service.tokens(f"{n}") == expected(prompt(10, n), 30)
    service.empty()


def test_a_cache_grows_and_who_finds_no_room_is_put_back_with_the_same_result() -> None:
    small = generating_llama(trunk_bytes=14 * PAGE * LAYERS)
    service = Service(small, prefix_bytes=0)
    service.add(*(generation(small, f"{n}", prompt(20 + 9 * n, n), new=150) for n in range(4)))
    service.run(4)
    for n in range(4):
        assert service.tokens(f"{n}") == expected(prompt(20 + 9 * n, n), 150)
    ended = [plan for plan in service.shards.plans if plan.ended]
    assert len(ended) > 4, "some were put back"
    assert service.shards.most_held <= small.limits.trunk_bytes
    first = list(service.outcomes)
    assert first[0] == "0", "the oldest always goes on"
    service.empty()


def test_one_that_does_not_fit_alone_ends_with_numbers_and_others_go_on() -> None:
    small = generating_llama(trunk_bytes=8 * PAGE * LAYERS)
    service = Service(small)
    service.add(
        generation(small, "large", prompt(20, 1), new=500),
        generation(small, "just", prompt(20, 4), new=236),
        generation(small, "small", prompt(20, 2), new=20),
        generation(small, "never", prompt(400, 3), new=1),
    )
    service.run(4)
    assert service.tokens("just") == expected(prompt(20, 4), 236)
    for name in ("large", "never"):
        error = service.outcomes[name].error
        assert isinstance(error, TooLargeError) and f"room for {8 * PAGE * LAYERS:,}:" in error.message
    assert service.tokens("small") == expected(prompt(20, 2), 20)
    service.empty()


def test_a_step_that_does_not_fit_into_a_shard_is_run_again() -> None:
    service = Service()
    service.add(*(generation(ONE, f"{n}", prompt(40, n), new=12) for n in range(4)))
    for _ in range(5):
        service.step()
    plan = service.scheduler.next_pass()
    assert rows(plan) == (4, 0)
    service.scheduler.again(plan, PassTooLargeError("too much"))
    service.shards.reset()
    service.run(4)
    assert {rows(plan)[0] for plan in service.shards.plans[6:]} <= {0, 2}, "in two halves"
    for n in range(4):
        assert service.tokens(f"{n}") == expected(prompt(40, n), 12)
    service.empty()


def test_a_prompt_that_does_not_fit_goes_in_smaller_cuts() -> None:
    service = Service(budget_tokens=512, least_tokens=64)
    service.add(generation(ONE, "a", prompt(900, 1)))
    for most in (512, 256):
        plan = service.scheduler.next_pass()
        assert plan.layer_rows[0] == most
        service.scheduler.again(plan, PassTooLargeError("too much"))
        service.shards.reset()
    service.run(1)
    assert max(plan.layer_rows[0] for plan in service.shards.plans) == 128
    assert service.tokens("a") == expected(prompt(900, 1))
    service.empty()


@pytest.mark.parametrize("turns", range(0, 14, 3))
@pytest.mark.parametrize("depth", [1, 3])
def test_who_leaves_is_forgotten_with_the_next_pass(turns: int, depth: int) -> None:
    """Before it began, among the cuts of its prompt, and among its steps."""
    two = generating_llama(2)
    service = Service(two, depth=depth, budget_tokens=64, prefix_bytes=0)
    service.add(generation(two, "a", prompt(300, 1), new=40))
    for _ in range(turns):
        service.step()
    service.scheduler.cancel(RequestId("a"))
    for _ in range(depth + 1):
        service.step()
    assert service.outcomes["a"].error is not None
    assert not service.shards.caches
    service.empty()


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("depth", [1, 3])
def test_crowds_in_a_small_store_get_what_each_gets_alone(seed: int, depth: int) -> None:
    """Generations and traces come at random times, some leave; the store has room for few."""
    chosen = random.Random(seed)
    description = generating_llama(2, trunk_bytes=30 * PAGE * LAYERS // 2)
    policy = {"budget_tokens": chosen.choice([64, 512]), "tokens_beside_steps": 48, "least_steps": 2}
    service = Service(description, depth, **policy)
    common = prompt(100, 77)
    come: dict[int, list[str]] = {}
    wanted: dict[str, tuple[Sequence[Tokens], int]] = {}
    for number in range(25):
        own = [common[: chosen.randrange(110)] + prompt(chosen.randrange(1, 60), seed * 100 + number)]
        own *= chosen.choice([1, 1, 1, 2])
        wanted[f"{number}"] = own, chosen.randrange(1, 60)
        come.setdefault(chosen.randrange(60), []).append(f"{number}")
    gone = {f"{number}" for number in chosen.sample(range(25), 6)}
    for turn in range(3000):
        for name in come.get(turn, []):
            prompts, new = wanted[name]
            sharing = chosen.choice([Sharing.TENANT, Sharing.TENANT, Sharing.OFF])
            nodes = chosen.choice([(), (), steering(chosen.randrange(4), new)])
            service.add(generation(description, name, *prompts, new=new, sharing=sharing, nodes=nodes))
        if turn % 7 == 0 and gone and chosen.random() < 0.5:
            service.scheduler.cancel(RequestId(gone.pop()))
        service.step()
        assert service.shards.most_held <= description.limits.trunk_bytes
        if len(service.outcomes) == len(wanted):
            break
    assert len(service.outcomes) == len(wanted)
    served = [name for name, outcome in service.outcomes.items() if outcome.error is None]
    assert len(served) >= 19
    for name in served:
        prompts, new = wanted[name]
        for place, own in enumerate(prompts):
            assert service.tokens(name, place) == expected(own, new)
    service.empty()
