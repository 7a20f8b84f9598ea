"""The queue: who shares a pass, how requests end, and that every one ends once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polytrace.description import PassLayout
from polytrace.errors import CancelledError, PolytraceError, RunError, ServiceError
from polytrace.graph import NodeId, Read, Save, Write
from scheduling.loop import step
from scheduling.plan import Failure, Plan, Program, RequestId, ShardResult
from scheduling.policy import PassPolicy
from scheduling.scheduler import Outcome, Scheduler
from tests.scheduling.tiny import HIDDEN, VOCAB, Recorder, tiny_llama

TINY = tiny_llama(stages=2, ranks=2)


class ObedientShards:
    """Answers plans as shards do that run everything, and remembers what they still hold of whom."""

    def __init__(self, depth: int = 2) -> None:
        self.depth = depth
        self.plans: list[Plan] = []
        self.holding: set[RequestId] = set()
        self._flying: list[Plan] = []

    def have_room(self) -> bool:
        return len(self._flying) < self.depth

    def submit(self, plan: Plan) -> None:
        self.plans.append(plan)
        self._flying.append(plan)
        self.holding -= set(plan.ended)
        for member in plan.members:
            self.holding.add(member.program.request)
            if member.is_last_wave:
                self.holding.remove(member.program.request)

    def finished(self) -> Iterator[tuple[Plan, tuple[ShardResult, ...] | PolytraceError]]:
        if self._flying:
            plan = self._flying.pop(0)
            yield plan, answers(plan)


def answers(plan: Plan, *failures: Failure, missing: NodeId | None = None) -> tuple[ShardResult, ...]:
    """What 2 x 2 shards say to a plan; `missing` did not fire."""
    return tuple(
        ShardResult(
            pass_id=plan.pass_id,
            stage=stage,
            rank=rank,
            failures=failures if stage == rank == 0 else (),
            fired={
                member.program.request: tuple(
                    node for node in fired(member.program, member.wave, stage) if node != missing
                )
                for member in plan.members
            },
            saved_bytes={
                slot_owner.program.request: sum(
                    slot.facts.num_bytes
                    for slot in slot_owner.program.saves
                    if slot.node in fired(slot_owner.program, slot_owner.wave, stage)
                )
                if rank == 0
                else 0
                for slot_owner in plan.members
            },
            carried_bytes=0,
            gathered_bytes=0,
            seconds=1.0 + stage,
            busy_seconds=1.0,
            values={
                (member.program.request, slot.name): f"{slot.name}@{stage}"
                for member in plan.members
                for slot in member.program.saves
                if rank == 0 and slot.node in fired(member.program, member.wave, stage)
            },
        )
        for stage in range(2)
        for rank in range(2)
    )


def fired(program: Program, wave: int, stage: int) -> list[NodeId]:
    return [
        node
        for fragment in program.waves[wave].stages[stage].fragments
        for node in fragment.nodes
        if isinstance(program.graph.nodes[node], (Read, Write, Save))
    ]


def one_wave(request_id: str, tokens: int = 3) -> Program:
    """Different requests have no token in common at the same position."""
    first = sum(map(ord, request_id))
    r = Recorder(TINY, [[(first + token) % VOCAB for token in range(tokens)]])
    r.save(r.read("lm_head"), "logits")
    return r.work_out(request_id)


def two_waves(request_id: str) -> Program:
    r = Recorder(TINY, [[1, 2, 3]], [[4, 5, 6]])
    r.write("model.layers.0", r.op("mul", r.read("model.layers.3", invoke=0), 2.0), invoke=1)
    r.save(r.read("lm_head", invoke=1), "logits")
    return r.work_out(request_id)


def no_rows(request_id: str) -> Program:
    r = Recorder(TINY)
    r.save(r.parameter("lm_head.weight"), "weight")
    return r.work_out(request_id)


def test_requests_of_a_model_that_cannot_be_packed_go_one_by_one() -> None:
    scheduler = Scheduler(replace(TINY, layout=PassLayout.PADDED), PassPolicy())
    for name in "abc":
        scheduler.add(one_wave(name))
    shards = ObedientShards(depth=1)
    while len(shards.plans) < 3:
        step(scheduler, shards)
    assert [[member.program.request for member in plan.members] for plan in shards.plans] == [["a"], ["b"], ["c"]]


def scheduler_with(*programs: Program, budget_tokens: int = 4096, max_members: int = 256) -> Scheduler:
    scheduler = Scheduler(TINY, PassPolicy(budget_tokens=budget_tokens, max_members=max_members))
    for program in programs:
        scheduler.add(program)
    return scheduler


def members(plan: Plan) -> list[tuple[str, int]]:
    return [(member.program.request, member.wave) for member in plan.members]


def only(outcomes: list[Outcome]) -> Outcome:
    (outcome,) = outcomes
    return outcome


def test_ready_requests_share_a_pass() -> None:
    scheduler = scheduler_with(one_wave("a"), two_waves("b"), no_rows("c"))
    assert members(scheduler.next_pass()) == [("a", 0), ("b", 0), ("c", 0)]
    assert not scheduler.has_work()


def test_requests_that_share_their_rows_share_a_pass_beyond_what_they_would_take_alone() -> None:
    def asking(name: str, last: int) -> Program:
        r = Recorder(TINY, [[*range(1, 13), last]])
        r.save(r.read("lm_head"), "logits")
        return r.work_out(name)

    prefixed = [asking(f"p{number}", 20 + number) for number in range(8)]
    scheduler = scheduler_with(*prefixed, budget_tokens=30)
    plan = scheduler.next_pass()
    assert [name for name, _ in members(plan)] == [f"p{number}" for number in range(8)]
    assert max(plan.layer_rows) == 12 + 8


def test_a_pass_keeps_to_its_budget_of_tokens_and_members() -> None:
    scheduler = scheduler_with(one_wave("a", 5), one_wave("b", 6), one_wave("c", 5), no_rows("d"), budget_tokens=10)
    assert members(scheduler.next_pass()) == [("a", 0), ("c", 0), ("d", 0)]
    assert members(scheduler.next_pass()) == [("b", 0)]
    scheduler = scheduler_with(one_wave("a"), one_wave("b"), one_wave("c"), max_members=2)
    assert members(scheduler.next_pass()) == [("a", 0), ("b", 0)]


def test_a_request_larger_than_the_budget_goes_alone() -> None:
    scheduler = scheduler_with(no_rows("a"), one_wave("b", 30), one_wave("c", 2), no_rows("d"), budget_tokens=10)
    assert members(scheduler.next_pass()) == [("a", 0), ("b", 0), ("d", 0)]
    assert members(scheduler.next_pass()) == [("c", 0)]


def test_a_request_is_in_one_pass_at_a_time() -> None:
    scheduler = scheduler_with(two_waves("a"))
    plan = scheduler.next_pass()
    assert not scheduler.has_work() and not plan.members[0].is_last_wave
    scheduler.complete(plan, answers(plan))
    assert scheduler.has_work() and scheduler.take_outcomes() == []
    plan = scheduler.next_pass()
    assert members(plan) == [("a", 1)] and plan.members[0].is_last_wave


def test_a_later_wave_goes_before_requests_that_came_later() -> None:
    scheduler = scheduler_with(two_waves("a"), one_wave("b"), max_members=1)
    plan = scheduler.next_pass()
    scheduler.complete(plan, answers(plan))
    assert members(scheduler.next_pass()) == [("a", 1)]


def test_a_finished_request_comes_out_with_its_values_and_its_receipt() -> None:
    scheduler = scheduler_with(two_waves("a"), one_wave("b"))
    for _ in range(2):
        plan = scheduler.next_pass()
        scheduler.complete(plan, answers(plan))
    b, a = scheduler.take_outcomes()
    assert (a.request, a.error, dict(a.values)) == ("a", None, {"logits": "logits@1"})
    assert b.request == "b" and a.receipt is not None and b.receipt is not None
    assert [(entry.pass_id, entry.requests, entry.tokens, entry.seconds) for entry in a.receipt.passes] == [
        (1, 2, 6, 2.0),
        (2, 1, 3, 2.0),
    ]
    # the first layer of the second wave is given its output: three rows do not run it
    assert (a.receipt.model, a.receipt.tokens, a.receipt.token_layers) == ("tiny", 6, 21)
    assert [(entry.site, entry.kind, entry.passes) for entry in a.receipt.fired] == [
        ("model.layers.3.output", "read", 1),
        ("model.layers.0.output", "write", 1),
        ("lm_head.output", "read", 1),
    ]
    assert a.receipt.result_bytes == 3 * 32 * 4
    assert a.receipt.carried_bytes == 2 * 3 * HIDDEN * 4  # both ranks of the stage send it
    assert scheduler.take_outcomes() == []


def test_a_receipt_says_how_long_a_request_waited_and_ran() -> None:
    times = iter([10.0, 13.0, 18.0])
    scheduler = Scheduler(TINY, PassPolicy(), clock=lambda: next(times))
    scheduler.add(one_wave("a"))
    plan = scheduler.next_pass()
    scheduler.complete(plan, answers(plan))
    receipt = only(scheduler.take_outcomes()).receipt
    assert receipt is not None and (receipt.queue_seconds, receipt.run_seconds) == (3.0, 5.0)


def test_a_failing_request_ends_with_its_line_and_leaves_its_neighbours() -> None:
    scheduler = scheduler_with(two_waves("a"), one_wave("b"))
    plan = scheduler.next_pass()
    failure = Failure(request=RequestId("a"), node=NodeId(1), message="it broke")
    scheduler.complete(plan, answers(plan, failure))
    a, b = scheduler.take_outcomes()
    assert isinstance(a.error, RunError) and str(a.error) == "it broke (a.py:1)"
    assert b.receipt is not None and not scheduler.has_work()


def test_the_first_failure_with_a_line_is_the_one_that_is_told() -> None:
    scheduler = scheduler_with(one_wave("a"))
    plan = scheduler.next_pass()
    results = list(answers(plan))
    told = [
        Failure(request=RequestId("a"), node=None, message="it failed on an earlier stage"),
        Failure(request=RequestId("a"), node=NodeId(1), message="second"),
        Failure(request=RequestId("a"), node=NodeId(0), message="first"),
    ]
    results[0], results[3] = replace(results[0], failures=(told[0],)), replace(results[3], failures=tuple(told[1:]))
    scheduler.complete(plan, tuple(results))
    error = only(scheduler.take_outcomes()).error
    assert error is not None and error.message == "first"


@pytest.mark.parametrize(
    ("node", "message"), [(0, "the read of lm_head.output did not fire"), (1, "the save of 'logits' did not fire")]
)
def test_what_was_planned_and_did_not_fire_is_an_error(node: int, message: str) -> None:
    scheduler = scheduler_with(one_wave("a"))
    plan = scheduler.next_pass()
    scheduler.complete(plan, answers(plan, missing=NodeId(node)))
    error = only(scheduler.take_outcomes()).error
    assert error is not None and error.message == message and error.where == f"a.py:{node}"


def test_a_shard_that_does_not_answer_is_an_error() -> None:
    scheduler = scheduler_with(one_wave("a"))
    plan = scheduler.next_pass()
    scheduler.complete(plan, answers(plan)[:2])
    assert only(scheduler.take_outcomes()).error is not None


def test_a_waiting_request_is_cancelled_at_once() -> None:
    scheduler = scheduler_with(one_wave("a"))
    scheduler.cancel(RequestId("a"))
    assert isinstance(only(scheduler.take_outcomes()).error, CancelledError)
    assert not scheduler.has_work()
    scheduler.cancel(RequestId("a"))
    scheduler.cancel(RequestId("never seen"))
    assert scheduler.take_outcomes() == []


def test_what_ends_without_a_result_has_spent_the_passes_that_it_was_in() -> None:
    """Counted with the one in which it failed; what never began has spent nothing."""
    now = 0.0
    scheduler = Scheduler(TINY, PassPolicy(max_members=1), clock=lambda: now)
    for program in (two_waves("a"), two_waves("b"), one_wave("c")):
        scheduler.add(program)
    whole = sum(wave.rows.token_layers for wave in two_waves("a").waves)
    scheduler.cancel(RequestId("c"))
    spent = {"c": (0, 0.0)}
    for name, num_passes in (("a", 1), ("b", 2)):
        for number in range(num_passes):
            plan = scheduler.next_pass()
            assert members(plan) == [(name, number)]
            now += 2.0
            broke = Failure(request=RequestId(name), node=NodeId(1), message="it broke")
            scheduler.complete(plan, answers(plan, *([broke] if number == num_passes - 1 else [])))
        spent[name] = (whole * num_passes // 2, 2.0 * num_passes)
    told = {one.request: (one.spent_token_layers, one.spent_seconds) for one in scheduler.take_outcomes()}
    assert told == spent and 0 < told[RequestId("a")][0] < whole


def test_a_request_in_flight_is_cancelled_after_its_pass() -> None:
    scheduler = scheduler_with(two_waves("a"), one_wave("b"))
    plan = scheduler.next_pass()
    scheduler.cancel(RequestId("a"))
    assert scheduler.take_outcomes() == []
    scheduler.complete(plan, answers(plan))
    a, b = scheduler.take_outcomes()
    assert isinstance(a.error, CancelledError) and b.error is None


@pytest.mark.parametrize("end", ["cancelled between waves", "cancelled in flight", "failed"])
def test_shards_are_told_to_forget_what_ended_between_two_waves(end: str) -> None:
    scheduler = scheduler_with(two_waves("a"))
    plan = scheduler.next_pass()
    if end == "cancelled in flight":
        scheduler.cancel(RequestId("a"))
    failure = Failure(request=RequestId("a"), node=NodeId(1), message="it broke")
    scheduler.complete(plan, answers(plan, *([failure] if end == "failed" else [])))
    scheduler.cancel(RequestId("a"))
    assert not scheduler.has_work(), "to forget is no work by itself"
    scheduler.add(one_wave("b"))
    scheduler.add(one_wave("c"))
    assert scheduler.next_pass().ended == ("a",)


def test_a_request_that_fails_in_its_last_wave_needs_no_notice() -> None:
    scheduler = scheduler_with(one_wave("a"))
    plan = scheduler.next_pass()
    scheduler.complete(plan, answers(plan, Failure(request=RequestId("a"), node=None, message="it broke")))
    scheduler.add(one_wave("b"))
    assert scheduler.next_pass().ended == ()


def test_a_lost_pass_ends_its_members_and_starts_the_others_again() -> None:
    scheduler = scheduler_with(two_waves("a"), one_wave("b"), max_members=1)
    plan = scheduler.next_pass()
    scheduler.complete(plan, answers(plan))
    scheduler.cancel(RequestId("b"))
    scheduler.add(one_wave("c"))
    scheduler.take_outcomes()
    first, second = scheduler.next_pass(), scheduler.next_pass()
    assert members(first) == [("a", 1)] and members(second) == [("c", 0)]
    scheduler.add(two_waves("d"))
    scheduler.lost(first, ServiceError("a shard died"))
    scheduler.lost(second, ServiceError("a shard died"))
    assert [(outcome.request, type(outcome.error)) for outcome in scheduler.take_outcomes()] == [
        ("a", ServiceError),
        ("c", ServiceError),
    ]
    assert members(scheduler.next_pass()) == [("d", 0)]


def test_members_of_a_lost_pass_run_again_alone_and_one_that_loses_three_alone_is_refused() -> None:
    scheduler = scheduler_with(two_waves("a"), one_wave("b"), one_wave("c"))
    lost, other = scheduler.next_pass(), None
    scheduler.add(one_wave("d"))
    other = scheduler.next_pass()  # beside it in flight, and lost with it
    assert members(lost) == [("a", 0), ("b", 0), ("c", 0)] and members(other) == [("d", 0)]
    scheduler.again(lost, ServiceError("a shard died"))
    scheduler.again(other, ServiceError("a shard died"))
    assert not scheduler.take_outcomes()
    ran = []
    while scheduler.has_work():
        plan = scheduler.next_pass()
        assert not scheduler.has_work(), "nobody goes beside a suspect"
        ran.append(members(plan))
        if members(plan) == [("b", 0)]:
            scheduler.again(plan, ServiceError("it died once more"))
        else:
            scheduler.complete(plan, answers(plan))
    assert ran == [[("a", 0)], [("a", 1)], [("b", 0)], [("b", 0)], [("b", 0)], [("c", 0)], [("d", 0)]]
    errors = {outcome.request: outcome.error for outcome in scheduler.take_outcomes()}
    assert [request for request, error in errors.items() if error is None] == ["a", "c", "d"]
    assert "it died once more" in str(errors[RequestId("b")])


def test_a_suspect_waits_until_nothing_is_in_flight() -> None:
    scheduler = scheduler_with(one_wave("a"))
    scheduler.again(scheduler.next_pass(), ServiceError("a shard died"))
    scheduler.add(one_wave("b"))
    plan = scheduler.next_pass()
    assert members(plan) == [("a", 0)] and not scheduler.has_work()
    scheduler.complete(plan, answers(plan))
    assert members(scheduler.next_pass()) == [("b", 0)]


def test_a_request_between_two_waves_starts_again_when_shards_are_lost() -> None:
    scheduler = scheduler_with(two_waves("a"), one_wave("b"), max_members=1)
    first = scheduler.next_pass()
    second = scheduler.next_pass()
    scheduler.complete(first, answers(first))
    scheduler.lost(second, ServiceError("a shard died"))
    shards = ObedientShards()
    while scheduler.has_work():
        step(scheduler, shards)
    assert [members(plan) for plan in shards.plans] == [[("a", 0)], [("a", 1)]]
    outcome = scheduler.take_outcomes()[-1]
    assert outcome.receipt is not None and len(outcome.receipt.passes) == 2


KINDS = {"one": one_wave, "two": two_waves, "none": no_rows}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(["one", "two", "none", "step", "cancel"]), max_size=40), st.integers(1, 3))
def test_every_request_ends_once_and_shards_hold_nothing_in_the_end(events: list[str], depth: int) -> None:
    scheduler, shards = scheduler_with(budget_tokens=8, max_members=3), ObedientShards(depth)
    added: list[RequestId] = []
    for event in events:
        if event == "step":
            step(scheduler, shards)
        elif event == "cancel" and added:
            scheduler.cancel(added[len(added) // 2])
        elif event in KINDS:
            scheduler.add(KINDS[event](f"r{len(added)}"))
            added.append(RequestId(f"r{len(added)}"))
    for _ in range(3 * len(events) + 3):
        step(scheduler, shards)
    scheduler.add(one_wave("last"))  # carries the notices that are left
    for _ in range(2):
        step(scheduler, shards)
    outcomes = scheduler.take_outcomes()
    assert sorted(outcome.request for outcome in outcomes) == sorted([*added, "last"])
    assert not shards.holding
    for plan in shards.plans:
        names = [name for name, _ in members(plan)]
        assert len(names) == len(set(names)) <= 3
