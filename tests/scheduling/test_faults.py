"""What cannot be begun or planned, as by a fault of ours, ends alone; whoever calls or goes beside it goes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from polytrace.errors import ServiceError
from scheduling.loop import step
from scheduling.plan import Program
from scheduling.policy import PassPolicy
from scheduling.scheduler import Outcome, Scheduler
from tests.scheduling.generations import DrawingShards, expected, generating_llama, generation

MODEL = generating_llama()


def good(name: str, first: int) -> Program:
    return generation(MODEL, name, (first, 2, 3))


def not_begun(name: str) -> Program:
    program = good(name, 9)
    return replace(program, invokes=(replace(program.invokes[0], sequences=None),))  # type: ignore[arg-type]


def not_planned(name: str) -> Program:
    """It has no invoke that its waves are about."""
    return replace(good(name, 9), invokes=())


def outcomes_of(*programs: Program) -> dict[str, Outcome]:
    scheduler, shards = Scheduler(MODEL, PassPolicy()), DrawingShards(MODEL)
    for program in programs:
        scheduler.add(program)
    found: dict[str, Outcome] = {}
    while len(found) < len(programs):
        step(scheduler, shards)
        found |= {outcome.request: outcome for outcome in scheduler.take_outcomes()}
    scheduler.forget_prefixes()
    while scheduler.has_work():
        step(scheduler, shards)
    assert shards.held == 0, "nothing is left of anybody"
    return found


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        (not_begun, ["request b could not be begun"]),
        (not_planned, ["a pass could not be planned"] * 2),  # with the others, and alone
    ],
)
def test_one_that_cannot_go_ends_with_the_fault_and_the_others_as_without_it(
    bad: Callable[[str], Program], told: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    found = outcomes_of(good("a", 4), bad("b"), good("c", 7))
    error = found["b"].error
    assert [record.message for record in caplog.records] == told
    assert isinstance(error, ServiceError) and "could not be planned" in error.message
    assert error.__cause__ is not None, "and the fault itself, for who looks for it"
    for name, first in (("a", 4), ("c", 7)):
        receipt = found[name].receipt
        assert receipt is not None
        assert receipt.generated[0].ids == expected((first, 2, 3))
