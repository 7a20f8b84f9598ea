"""Stages at work at the same time: passes of about equal cost, waves that follow one another; and too little memory."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polytrace.description import Limits, ModelDescription
from polytrace.errors import ServiceError, TooLargeError
from polytrace.graph import NodeId
from scheduling.loop import step
from scheduling.plan import Failure, PassAbandonedError, PassTooLargeError, Plan, Program, RequestId, ShardResult
from scheduling.policy import BUDGET_TOKENS, PassPolicy, most_wave_rows, passes_in_flight, share_of, step_share
from scheduling.scheduler import Outcome, Scheduler
from tests.scheduling.pipeline import TimedStages, all_fired, run_all
from tests.scheduling.tiny import VOCAB, Recorder, tiny_llama

STAGES = 4
LIMITS = Limits(max_sequence_tokens=4096, pass_tokens=64)
TINY = tiny_llama(8, STAGES, limits=LIMITS)
ONE_STAGE = tiny_llama(8, 1, limits=LIMITS)
UNIFORM = PassPolicy(budget_tokens=8192, least_tokens=64)
GREEDY = PassPolicy(budget_tokens=8192, least_tokens=8192)  # never cut


def asking(name: str, tokens: int, prefix: int = 0, model: ModelDescription = TINY) -> Program:
    """A prompt of random tokens behind some that all have."""
    rng = random.Random(name)
    r = Recorder(model, [[*[1] * prefix, *(rng.randrange(VOCAB) for _ in range(tokens))]])
    r.save(r.read("lm_head"), "logits")
    return r.work_out(name)


def sweep(name: str, invokes: int = 12, tokens: int = 30) -> Program:
    """More rows than a pass of 64 takes: a patch an invoke, all at layer 0."""
    rng = random.Random(name)
    r = Recorder(TINY, *([[rng.randrange(VOCAB) for _ in range(tokens)]] for _ in range(invokes)))
    for invoke in range(invokes):
        r.write("model.layers.0", r.op("mul", r.read("model.layers.0", invoke=invoke), 2.0), invoke=invoke)
        r.save(r.read("lm_head", invoke=invoke), f"logits{invoke}")
    return r.work_out(name)


def back_and_forth(name: str) -> Program:
    """Two waves, the second of which needs on the first stage what the first wave has on the last."""
    r = Recorder(TINY, [[1, 2, 3]], [[4, 5, 6]])
    r.write("model.layers.0", r.op("mul", r.read("model.layers.7", invoke=0), 2.0), invoke=1)
    r.save(r.read("lm_head", invoke=1), "logits")
    return r.work_out(name)


def scheduler_of(policy: PassPolicy, *programs: Program, model: ModelDescription = TINY) -> Scheduler:
    scheduler = Scheduler(model, policy)
    for program in programs:
        scheduler.add(program)
    return scheduler


def members(plan: Plan) -> list[tuple[str, int]]:
    return [(member.program.request, member.wave) for member in plan.members]


def served(policy: PassPolicy, clients: int = 32, requests: int = 300) -> TimedStages:
    """Clients who send their next request when they have an answer."""
    rng = random.Random(0)
    waiting = [asking(f"r{number}", rng.randrange(32, 96)) for number in range(requests)]
    stages = TimedStages(STAGES)
    scheduler = scheduler_of(policy, *(waiting.pop() for _ in range(clients)))
    outcomes = run_all(scheduler, stages, lambda _: waiting.pop() if waiting else None)
    assert len({outcome.request for outcome in outcomes if outcome.error is None}) == requests
    return stages


def test_under_load_no_stage_is_idle_for_long() -> None:
    uniform, greedy = served(UNIFORM), served(GREEDY)
    assert min(greedy.idle_shares) > 0.7, "all that waits in one pass: three of four stages wait"
    assert max(uniform.idle_shares) < 0.15
    assert uniform.now < greedy.now / 2.5


def test_what_waits_is_cut_into_equal_passes_that_fill_the_stages() -> None:
    stages = TimedStages(STAGES)
    run_all(scheduler_of(UNIFORM, *(asking(f"r{number}", 50) for number in range(40))), stages)
    rows = [max(plan.layer_rows) for plan in stages.plans]
    assert len(rows) == passes_in_flight(STAGES) and max(rows) < 1.2 * min(rows)


def test_a_pass_is_not_cut_below_what_kernels_want_nor_grown_beyond_the_budget() -> None:
    policy = PassPolicy(budget_tokens=1000, least_tokens=100)
    assert [share_of(rows, 4, policy) for rows in (0, 300, 401, 2000, 9000)] == [100, 100, 101, 500, 1000]
    assert share_of(2000, 0, policy) == 1000


def test_a_request_is_cut_into_as_many_waves_as_there_are_stages() -> None:
    policy = PassPolicy(budget_tokens=1000, least_tokens=100)
    assert [most_wave_rows(policy, stages) for stages in (1, 2, 4, 20)] == [1000, 500, 250, 100]
    assert most_wave_rows(PassPolicy(budget_tokens=50), 4) == 50


def test_a_description_has_the_rows_that_a_pass_may_have_unless_somebody_says_otherwise() -> None:
    assert Limits(max_sequence_tokens=1).pass_tokens == PassPolicy().budget_tokens == BUDGET_TOKENS


def test_with_one_stage_passes_are_as_large_as_they_may_be() -> None:
    programs = [asking(f"r{number}", 50, model=ONE_STAGE) for number in range(40)]
    plans = [
        [members(plan) for plan in stages.plans]
        for policy in (UNIFORM, GREEDY)
        for stages in (TimedStages(1),)
        if run_all(scheduler_of(policy, *programs, model=ONE_STAGE), stages)
    ]
    assert plans[0] == plans[1] and len(plans[0]) == 1


def test_requests_that_share_their_rows_are_not_cut_apart() -> None:
    stages = TimedStages(STAGES)
    programs = [asking(f"r{number}", 3, prefix=400) for number in range(40)]
    run_all(scheduler_of(UNIFORM, *programs), stages)
    assert len(stages.plans) == 1 and max(stages.plans[0].layer_rows) <= 400 + 40 * 3


def test_the_waves_of_one_request_follow_each_other_through_the_stages() -> None:
    program = sweep("s")
    assert len(program.waves) >= 5
    stages, one_by_one = TimedStages(STAGES), TimedStages(STAGES, depth=1)
    (outcome,) = run_all(scheduler_of(UNIFORM, program), stages)
    run_all(scheduler_of(UNIFORM, program), one_by_one)
    assert [members(plan) for plan in stages.plans] == [[("s", wave)] for wave in range(len(program.waves))]
    assert outcome.receipt is not None and len(outcome.receipt.passes) == len(program.waves)
    assert stages.now < one_by_one.now / 2


def test_a_wave_that_needs_what_a_later_stage_has_waits_until_it_is_there() -> None:
    scheduler = scheduler_of(UNIFORM, back_and_forth("b"))
    plan = scheduler.next_pass()
    assert not scheduler.has_work()
    scheduler.complete(plan, all_fired(plan, STAGES))
    assert members(scheduler.next_pass()) == [("b", 1)]


def test_a_wave_that_follows_takes_nobodys_turn() -> None:
    scheduler = scheduler_of(PassPolicy(max_members=1), sweep("s"))
    first = scheduler.next_pass()
    scheduler.add(asking("a", 50))
    assert members(scheduler.next_pass()) == [("a", 0)]
    assert members(scheduler.next_pass()) == [("s", 1)]
    scheduler.add(asking("b", 50))
    scheduler.complete(first, all_fired(first, STAGES))
    assert members(scheduler.next_pass()) == [("b", 0)], "its second wave is still in flight"


@pytest.mark.parametrize("end", ["fails", "is cancelled"])
def test_a_request_that_ends_while_a_later_wave_is_in_flight_ends_once_and_is_forgotten(end: str) -> None:
    scheduler = scheduler_of(UNIFORM, sweep("s"))
    first, second = scheduler.next_pass(), scheduler.next_pass()
    results = all_fired(first, STAGES)
    if end == "fails":
        failure = Failure(request=RequestId("s"), node=NodeId(0), message="it broke")
        results = (*results[:-1], _with(results[-1], failure))
    else:
        scheduler.cancel(RequestId("s"))
    scheduler.complete(first, results)
    (outcome,) = scheduler.take_outcomes()
    assert outcome.error is not None and not scheduler.has_work()
    scheduler.add(asking("a", 3))
    assert scheduler.next_pass().ended == ("s",)
    scheduler.complete(second, all_fired(second, STAGES))
    assert scheduler.take_outcomes() == []


def _with(result: ShardResult, failure: Failure) -> ShardResult:
    return replace(result, failures=(failure,))


# Out of memory


class SmallStages(TimedStages):
    """Stages on which a pass of too many rows does not fit: all in flight are lost then, as on a cluster."""

    def __init__(self, most_rows: int, *, depth: int | None = None) -> None:
        super().__init__(STAGES, depth=depth)
        self.most_rows = most_rows
        self.num_losses = 0

    def run_again(self, scheduler: Scheduler) -> bool:
        """Hands everything back when a pass does not fit; whether one did not."""
        too_large = [plan for _, plan in self._flying if max(plan.layer_rows) > self.most_rows]
        if not too_large:
            return False
        self.num_losses += 1
        for _, plan in self._flying:
            is_it = plan is too_large[0]
            scheduler.again(plan, PassTooLargeError("full") if is_it else PassAbandonedError("lost beside it"))
        self._flying.clear()
        return True


def run_small(scheduler: Scheduler, stages: SmallStages) -> dict[str, Outcome]:
    outcomes: list[Outcome] = []
    for _ in range(1000):
        while scheduler.has_work() and stages.have_room():
            stages.submit(scheduler.next_pass())
        if not stages._flying:
            outcomes += scheduler.take_outcomes()
            assert not scheduler.has_work()
            assert len({outcome.request for outcome in outcomes}) == len(outcomes), "each ends once"
            return {outcome.request: outcome for outcome in outcomes}
        if not stages.run_again(scheduler):
            stages.wait()
            step(scheduler, stages)
    raise AssertionError("it does not come to an end")


def test_a_pass_that_does_not_fit_runs_in_halves_and_passes_are_smaller_from_then_on() -> None:
    programs = [asking(f"r{number}", 50) for number in range(64)]
    stages = SmallStages(300, depth=1)
    scheduler = scheduler_of(PassPolicy(budget_tokens=800, least_tokens=64), *programs)
    assert all(outcome.error is None for outcome in run_small(scheduler, stages).values())
    assert scheduler.budget_tokens <= 300
    losses = stages.num_losses
    for number in range(100, 164):
        scheduler.add(asking(f"r{number}", 50))
    assert all(outcome.error is None for outcome in run_small(scheduler, stages).values())
    assert stages.num_losses == losses, "what was learned holds"


def test_the_budget_does_not_fall_below_the_least() -> None:
    scheduler = scheduler_of(PassPolicy(least_tokens=64), asking("a", 70), asking("b", 20))
    run_small(scheduler, SmallStages(30))
    assert scheduler.budget_tokens == 64


def test_only_a_request_that_is_too_large_alone_is_refused_with_numbers() -> None:
    programs = [asking(f"r{number}", 20) for number in range(6)]
    scheduler = scheduler_of(UNIFORM, *programs[:3], asking("large", 90), *programs[3:], sweep("s", tokens=40))
    outcomes = run_small(scheduler, SmallStages(80))
    error = outcomes.pop("large").error
    assert isinstance(error, TooLargeError)
    assert "90 rows" in error.message and "full" in error.message and "pass 1 of 1" in error.message
    assert all(outcome.error is None for outcome in outcomes.values())


def test_a_request_whose_own_values_do_not_fit_gets_a_pass_to_itself_and_its_neighbours_their_answers() -> None:
    scheduler = scheduler_of(UNIFORM, asking("a", 20), asking("b", 20))
    plan = scheduler.next_pass()
    failure = Failure(request=RequestId("a"), node=NodeId(0), message="no room", is_out_of_memory=True)
    results = all_fired(plan, STAGES)
    scheduler.complete(plan, (*results[:-1], _with(results[-1], failure)))
    (b,) = scheduler.take_outcomes()
    assert b.request == "b" and b.error is None
    scheduler.add(asking("c", 20))
    alone = scheduler.next_pass()
    assert members(alone) == [("a", 0)] and alone.ended == ("a",), "shards forget that it failed"
    results = all_fired(alone, STAGES)
    scheduler.complete(alone, (*results[:-1], _with(results[-1], failure)))
    (a,) = scheduler.take_outcomes()
    assert isinstance(a.error, TooLargeError) and "no room" in a.error.message and a.error.where == "a.py:0"
    assert members(scheduler.next_pass()) == [("c", 0)]


def test_those_beside_a_pass_that_did_not_fit_are_no_suspects() -> None:
    scheduler = scheduler_of(UNIFORM, *(asking(f"r{number}", 40) for number in range(10)))
    first, second = scheduler.next_pass(), scheduler.next_pass()
    scheduler.again(first, PassAbandonedError("lost beside it"))
    scheduler.again(second, PassTooLargeError("full"))
    for _ in range(3):
        assert scheduler.has_work()
        scheduler.next_pass()


def test_a_suspect_that_dies_again_and_again_is_refused_though_others_did_not_fit() -> None:
    scheduler = scheduler_of(UNIFORM, asking("a", 20))
    for _ in range(3):
        assert not scheduler.take_outcomes(), "it may be bad luck"
        scheduler.again(scheduler.next_pass(), ServiceError("a shard died"))
    (outcome,) = scheduler.take_outcomes()
    assert isinstance(outcome.error, ServiceError) and "died in 3 passes" in outcome.error.message


SIZES = st.lists(st.one_of(st.integers(1, 120), st.just("sweep"), st.just("back")), min_size=1, max_size=12)


@settings(max_examples=40, deadline=None)
@given(SIZES, st.integers(20, 200), st.integers(1, 5))
def test_every_request_ends_once_however_small_the_memory_is(sizes: list[object], most_rows: int, depth: int) -> None:
    programs = []
    for number, size in enumerate(sizes):
        make = {"sweep": sweep, "back": back_and_forth}.get(size)  # type: ignore[call-overload]
        programs.append(make(f"r{number}") if make else asking(f"r{number}", size))  # type: ignore[arg-type]
    stages = SmallStages(most_rows, depth=depth)
    outcomes = run_small(scheduler_of(PassPolicy(least_tokens=16), *programs), stages)
    assert outcomes.keys() == {program.request for program in programs}
    for program in programs:
        fits = all(wave.rows_anew.widest <= most_rows for wave in program.waves)
        error = outcomes[program.request].error
        assert error is None if fits else isinstance(error, TooLargeError)


@pytest.mark.parametrize(("rows", "slots", "share"), [(40, 3, 16), (96, 3, 32), (100, 3, 34), (5, 3, 16), (40, 1, 40)])
def test_steps_go_in_groups_one_for_each_pass_that_could_start(rows: int, slots: int, share: int) -> None:
    assert step_share(rows, slots, PassPolicy()) == share
