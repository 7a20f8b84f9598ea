"""The counters, and passes that are filled by them: gaps, credit, ageing, weights. No model here."""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polytrace.certificate import charge
from scheduling.fair import FairShares
from scheduling.fair_choice import FairChoice, by_tenant
from scheduling.policy import FirstComeFirstServed

BUDGET = 100


@dataclass(eq=False)
class Piece:
    """One wave of somebody's."""

    tenant: str
    num_rows: int
    is_step: bool = False
    is_suspect: bool = False
    party: object | None = None
    company: object | None = None

    @property
    def least_rows(self) -> int:
        return self.num_rows

    def cost(self, num_rows: int | None = None) -> float:
        return float(num_rows or self.num_rows)


class Passes:
    """Passes of a room, one behind the other, and what each tenant was served in them."""

    def __init__(self, weights: dict[str, float] | None = None) -> None:
        self.shares = FairShares(weights)
        self.fair = FairChoice(self.shares, None)
        self.choice = FirstComeFirstServed(256)
        self.waiting: list[Piece] = []
        self.served: dict[str, float] = defaultdict(float)
        self.left: set[str] = set()
        self.largest = 0.0

    def run(self) -> list[Piece]:
        tenants = by_tenant(self.waiting)
        chosen = self.choice.choose(self.fair.ordered(self.waiting, tenants), 16, BUDGET)
        chosen = self.fair.trimmed(chosen, tenants)
        self.fair.went(chosen, tenants)
        gone = [one for one, _ in chosen]
        for one in gone:
            self.served[one.tenant] += one.num_rows
            self.waiting.remove(one)
        self.left = {one.tenant for one in self.waiting}
        self.largest = max(self.largest, sum(one.num_rows for one in gone))
        return gone


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 5))
def test_what_backlogged_tenants_are_served_stays_within_two_passes(seed: int, num_tenants: int) -> None:
    rng, passes = random.Random(seed), Passes()
    names = [f"t{number}" for number in range(num_tenants)]
    most = {name: rng.choice([1, 3, 40, BUDGET, 2 * BUDGET]) for name in names}
    widest: dict[tuple[str, str], tuple[float, float]] = {}  # least and most difference since both are backlogged
    for _ in range(80):
        for name in names:
            if rng.random() < 0.5:
                amount = rng.choice([1, 1, 5, 30])
                passes.waiting += [Piece(name, rng.randint(1, most[name])) for _ in range(amount)]
        if not passes.waiting:
            continue
        assert passes.run(), "no pass is empty while somebody waits"
        for place, one in enumerate(names):
            for other in names[place + 1 :]:
                pair = one, other
                if not passes.left.issuperset(pair):
                    widest.pop(pair, None)
                    continue
                gap = passes.served[one] - passes.served[other]
                low, high = widest.get(pair, (gap, gap))
                widest[pair] = min(low, gap), max(high, gap)
                assert widest[pair][1] - widest[pair][0] <= 2 * passes.largest + 1e-6


@pytest.mark.parametrize("weights", [{"a": 1.0, "b": 1.0}, {"a": 3.0, "b": 1.0}, {"a": 0.5, "b": 2.0}])
def test_backlogged_tenants_are_served_by_weight(weights: dict[str, float]) -> None:
    passes = Passes(weights)
    passes.waiting = [Piece("a", 7) for _ in range(3000)] + [Piece("b", 11) for _ in range(2000)]
    for _ in range(100):
        passes.run()
    whole = sum(weights.values())
    for name, weight in weights.items():
        assert passes.served[name] / sum(passes.served.values()) == pytest.approx(weight / whole, abs=0.02)


def test_a_single_trace_goes_into_the_next_pass_however_much_another_waits_for() -> None:
    passes = Passes()
    passes.waiting = [Piece("sweeps", 60) for _ in range(10_000)]
    for _ in range(20):
        passes.run()
        single = Piece("single", 20)
        passes.waiting.append(single)
        assert single in passes.run()


def test_one_that_fills_passes_delays_a_single_trace_by_one_at_most() -> None:
    passes = Passes()
    passes.waiting = [Piece("sweeps", 2 * BUDGET) for _ in range(10_000)]
    for _ in range(50):
        passes.run()
        single = Piece("single", 20)
        passes.waiting.append(single)
        assert single in [*passes.run(), *passes.run()]


def test_whoever_was_away_has_no_credit() -> None:
    passes = Passes()
    passes.waiting = [Piece("early", 10) for _ in range(500)]
    passes.waiting += [Piece("late", 10) for _ in range(5)]
    for _ in range(20):
        passes.run()
    before = dict(passes.served)
    passes.waiting += [Piece("late", 10) for _ in range(500)]
    for _ in range(10):
        passes.run()
    late, early = (passes.served[name] - before[name] for name in ("late", "early"))
    assert 0 <= late - early <= 2 * BUDGET, "it does not catch up on what it never asked for"


def test_a_tenant_that_is_ahead_waits_for_no_more_than_the_others_lag() -> None:
    passes = Passes()
    passes.waiting = [Piece("big", 2 * BUDGET), Piece("big", 2 * BUDGET)]
    passes.waiting += [Piece(name, 10) for name in ("one", "two") for _ in range(300)]
    counter = passes.shares.counter
    while not any(one.tenant == "big" for one in passes.run()):
        pass
    bound = sum(counter("big") - counter(name) + passes.largest for name in ("one", "two"))
    before = passes.served["one"] + passes.served["two"]
    while not any(one.tenant == "big" for one in passes.run()):
        pass
    assert passes.served["one"] + passes.served["two"] - before <= bound


def test_room_that_one_does_not_take_others_do() -> None:
    passes = Passes()
    passes.waiting = [Piece("little", 5), *(Piece("much", 5) for _ in range(100))]
    assert sum(one.num_rows for one in passes.run()) == BUDGET


def test_steps_do_not_starve_a_tenant_without_any() -> None:
    passes = Passes()
    passes.waiting = [Piece("writes", 8, is_step=True) for _ in range(400)] + [Piece("reads", 50) for _ in range(100)]
    for _ in range(50):
        passes.run()
    assert abs(passes.served["writes"] - passes.served["reads"]) <= 2 * passes.largest


def test_what_was_measured_puts_a_counter_right() -> None:
    shares = FairShares({"a": 2.0})
    shares.went({"a": 10.0, "b": 10.0}, ["a", "b"])
    shares.correct("a", charge(4, 2 * (1 << 16)))
    assert shares.counter("a") == (10 + 6) / 2
    shares.correct("b", -3)
    assert shares.order(["a", "b"]) == ["b", "a"]


def test_idle_tenants_are_forgotten_once_they_have_no_more_than_a_newcomer() -> None:
    shares = FairShares()
    for number in range(10_000):
        shares.went({f"t{number}": 1.0, "busy": 5.0}, ["busy"])
    assert len(shares.counters) < 5000
    assert shares.counter("t1") == shares.counter("never came")


def test_a_replica_that_has_ended_holds_nobody_back() -> None:
    shares = FairShares()
    shares.went({"stuck": 1.0}, ["stuck"], replica=0)
    shares.close(0)
    for _ in range(10):
        shares.went({"busy": 5.0}, ["busy"], replica=1)
    assert shares.counter("stuck") >= shares.counter("busy") - shares.largest_pass
