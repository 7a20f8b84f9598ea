"""The scheduler's passes with several tenants: who is in which, what they are charged, what they are told."""

from __future__ import annotations

import random
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest

from polytrace.certificate import Receipt, charge
from polytrace.codec import to_json
from scheduling.fair import FairShares
from scheduling.fair_choice import by_tenant
from scheduling.plan import PAGE, Plan, Program, RequestId
from scheduling.policy import PassPolicy
from scheduling.program import owned
from scheduling.scheduler import Outcome, Scheduler
from tests.scheduling.generations import generating_llama, generation
from tests.scheduling.pipeline import TimedStages, run_all
from tests.scheduling.test_generating import LAYERS, Service, prompt
from tests.scheduling.test_overlap import TINY, asking, sweep

SMALL = PassPolicy(budget_tokens=128, least_tokens=128)


class Books(FairShares):
    """Shares that remember what they charged."""

    def __init__(self) -> None:
        super().__init__()
        self.charged: dict[str, float] = defaultdict(float)

    def went(self, charges: Mapping[str, float], left: Sequence[str], *, replica: object = None) -> None:
        for tenant, cost in charges.items():
            self.charged[tenant] += cost
        super().went(charges, left, replica=replica)

    def correct(self, tenant: str, cost: float) -> None:
        self.charged[tenant] += cost
        super().correct(tenant, cost)


def of(tenant: str, program: Program, *, is_interactive: bool = True) -> Program:
    return replace(program, tenant=tenant, is_interactive=is_interactive)


def owned_by(tenant: str, program: Program) -> Program:
    return owned(program, tenant, is_interactive=True, shares_across_tenants=False)


def tenants(plan: Plan) -> list[str]:
    return [member.program.tenant for member in plan.members]


def run_with(scheduler: Scheduler) -> list[Outcome]:
    return run_all(scheduler, TimedStages(4), lambda _: None)


def test_another_tenants_single_trace_goes_into_the_next_pass() -> None:
    scheduler = Scheduler(TINY, SMALL)
    for number in range(200):
        scheduler.add(of("sweeps", sweep(f"s{number}"), is_interactive=False))
    assert set(tenants(scheduler.next_pass())) == {"sweeps"}
    scheduler.add(of("single", asking("one", 40)))
    assert "single" in tenants(scheduler.next_pass())


def test_waiting_tenants_share_a_pass_however_many_requests_each_has() -> None:
    scheduler = Scheduler(TINY, SMALL)
    for number in range(100):
        scheduler.add(of("many", asking(f"m{number}", 16)))
    for number in range(4):
        scheduler.add(of("few", asking(f"f{number}", 16)))
    found = tenants(scheduler.next_pass())
    assert abs(found.count("many") - found.count("few")) <= 1


def test_who_waits_at_the_screen_goes_before_the_batch_of_the_same_tenant_but_not_for_ever() -> None:
    scheduler = Scheduler(replace(TINY, stages=1), SMALL)
    scheduler.add(of("one", asking("batch", 100), is_interactive=False))
    passes = 0
    for number in range(200):
        scheduler.add(of("one", asking(f"i{number}", 100)))
        plan = scheduler.next_pass()
        names = [member.program.request for member in plan.members]
        if "batch" in names:
            break
        assert names == [f"i{number}"]
        scheduler.complete(plan, ())
        passes += 1
    assert 0 < passes <= 33


def test_what_a_request_did_cost_is_what_its_tenant_is_charged() -> None:
    books = Books()
    scheduler = Scheduler(TINY, SMALL, shares=books)
    for number in range(10):
        scheduler.add(of("a", sweep(f"a{number}")))
        scheduler.add(of("b", asking(f"b{number}", 30 + number)))
    due: dict[str, float] = defaultdict(float)
    for outcome in run_with(scheduler):
        assert outcome.receipt is not None
        due[outcome.request[0]] += charge(outcome.receipt.token_layers, outcome.receipt.moved_bytes)
    assert books.charged == pytest.approx(due)


def test_a_thousand_waiting_candidates_of_a_hundred_tenants_are_ordered_once_a_pass() -> None:
    """No timing is asserted; the figure is printed for whoever measures."""
    rng = random.Random(0)
    scheduler = Scheduler(TINY, PassPolicy(budget_tokens=2048))
    programs = [asking(f"p{number}", 8 + rng.randrange(8)) for number in range(1000)]
    for number, program in enumerate(programs):
        scheduler.add(of(f"t{number % 100}", program))
    begun = time.perf_counter()
    waiting = scheduler._with_room()
    ready = scheduler._filler.fair.ordered(waiting, by_tenant(waiting))
    print(f"{(time.perf_counter() - begun) * 1e3:.2f} ms")
    assert len(ready) == 1000
    assert len({job.tenant for job in ready[:100]}) == 100, "everybody's first comes before anybody's second"


def served_beside(neighbours: list[Program], *, tells: bool = False) -> Receipt:
    """The receipt of a request that shares its pass with others."""
    scheduler = Scheduler(TINY, PassPolicy(least_tokens=8192, tells_of_other_tenants=tells))
    for program in [*neighbours, owned_by("prober", asking("probe", 20, prefix=40))]:
        scheduler.add(program)
    outcomes = {outcome.request: outcome for outcome in run_with(scheduler)}
    receipt = outcomes[RequestId("probe")].receipt
    assert receipt is not None
    return receipt


def what_is_told(receipt: Receipt) -> object:
    """Without times, which are what they are."""
    return to_json(
        replace(
            receipt,
            queue_seconds=0.0,
            run_seconds=0.0,
            passes=tuple(replace(entry, seconds=0.0) for entry in receipt.passes),
        )
    )


def test_a_receipt_says_nothing_of_another_tenants_requests() -> None:
    alike, other = asking("alike", 33, prefix=40), asking("other", 61)
    alone = what_is_told(served_beside([]))
    assert what_is_told(served_beside([owned_by("victim", alike)])) == alone
    assert what_is_told(served_beside([owned_by("victim", other), owned_by("victim", alike)])) == alone
    told = served_beside([owned_by("victim", other)], tells=True)
    assert (told.passes[0].requests, told.passes[0].tokens) == (2, 60 + 61)
    own = served_beside([owned_by("prober", other)])
    assert own.passes[0].requests == 2, "of its own it is told"


def test_rows_are_shared_within_a_tenant_and_across_only_where_the_deployment_says_so() -> None:
    def rows(first: str, second: str, *, across: bool) -> int:
        scheduler = Scheduler(TINY, PassPolicy(least_tokens=8192))
        for tenant, name in ((first, "one"), (second, "two")):
            program = asking(name, 20, prefix=100)
            scheduler.add(owned(program, tenant, is_interactive=True, shares_across_tenants=across))
        return max(scheduler.next_pass().layer_rows)

    assert rows("a", "a", across=False) == rows("a", "b", across=True) == 100 + 2 * 20
    assert rows("a", "b", across=False) == 2 * 120


def test_what_tenants_are_told_adds_up_to_the_pass() -> None:
    scheduler = Scheduler(TINY, PassPolicy(least_tokens=8192))
    stages, programs = TimedStages(4), {}
    for number in range(12):
        name = f"r{number}"
        programs[name] = owned_by(f"t{number % 3}", asking(name, 10 + number, prefix=30))
        scheduler.add(programs[name])
    outcomes = run_all(scheduler, stages, lambda _: None)
    entries = {programs[one.request].tenant: one.receipt.passes[0] for one in outcomes if one.receipt is not None}
    assert sum(entry.requests for entry in entries.values()) == 12
    together = [sum(rows) for rows in zip(*(entry.layer_rows for entry in entries.values()), strict=True)]
    assert together == [sum(10 + number for number in range(12)) + 3 * 30] * 8


def test_what_earlier_passes_left_is_none_of_a_passes_rows() -> None:
    model = generating_llama()
    service = Service(model, least_steps=16)
    for name in ("a", "b"):
        service.add(owned_by(name, generation(model, name, prompt(40, ord(name)), new=4)))
    service.run(2)
    for name in ("a", "b"):
        receipt = service.outcomes[name].receipt
        assert receipt is not None and [entry.requests for entry in receipt.passes] == [1] * 4, "of its own it is told"
        assert [entry.tokens for entry in receipt.passes] == [40, 1, 1, 1]
        assert [max(entry.layer_rows) for entry in receipt.passes] == [40, 1, 1, 1]


def test_room_for_caches_is_given_by_tenant_and_nobody_waits_for_ever() -> None:
    small = generating_llama(trunk_bytes=14 * PAGE * LAYERS)
    service = Service(small)
    names = [f"a{number}" for number in range(30)] + ["b0", "b1"]
    for name in names:
        service.add(owned_by(name[0], generation(small, name, prompt(40 + len(name), len(name)), new=12)))
    order: list[str] = []
    for _ in range(5000):
        service.step()
        order += [name for name in service.outcomes if name not in order]
        if len(order) == len(names):
            break
    assert set(order) == set(names)
    assert max(order.index("b0"), order.index("b1")) < 15, "they did not stand behind all thirty"
    assert service.shards.most_held <= small.limits.trunk_bytes
