"""Fair shares of a deployment with several replicas, and over restarts of its controller. No shards here."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import cast

import pytest

from api.store import Store
from cluster.kept_shares import KeptShares
from cluster.requests import Claimed, ControllerStore, DeploymentState, Divide, Finished
from cluster.shares import Share, Shares
from polytrace.errors import RunError
from scheduling.fair_choice import FairChoice, by_tenant
from scheduling.plan import RequestId
from scheduling.policy import FirstComeFirstServed
from tests.scheduling.test_fair import BUDGET, Piece

Size = Callable[[random.Random], int]


class Backlog:
    """A store in which every tenant always has more, each of its own size."""

    def __init__(self, sizes: Mapping[str, Size], rng: random.Random) -> None:
        self._sizes, self._rng, self._count = sizes, rng, 0

    def claim(self, model: str, limit: int, divide: Divide) -> list[Claimed]:
        given = divide(sorted(self._sizes), limit) if limit > 0 else {}
        return [self._one(tenant) for tenant, most in given.items() for _ in range(most)]

    def now(self) -> float:
        return 0.0

    def weights(self) -> dict[str, float]:
        return {}

    def counters(self, model: str) -> dict[str, float]:
        return {}

    def save_counters(self, model: str, changed: Mapping[str, float], gone: Collection[str]) -> None: ...

    def finish(self, finished: Sequence[Finished]) -> None: ...

    def interrupt(self) -> None: ...

    def _one(self, tenant: str) -> Claimed:
        self._count += 1
        return Claimed(
            request=RequestId(f"{self._count:032x}"),
            path=Path("none"),
            facts=b"",
            accepted=0.0,
            work=self._sizes[tenant](self._rng),
            contents=Path("none"),
            states={},
            tenant=tenant,
            is_interactive=True,
            is_suspect=False,
        )


class Copy:
    """A replica: its share, what waits there, and the pass that runs."""

    def __init__(self, shares: Shares) -> None:
        self._share: Share = shares.open()
        self._share.begin_taking()
        self._choice = FairChoice(shares.fair, self._share)
        self._waiting: dict[Piece, RequestId] = {}
        self._running: list[RequestId] = []

    def next_pass(self, shares: Shares) -> dict[str, int]:
        """Ends the pass that runs and begins another; the rows of each tenant in it."""
        error = RunError("ended")
        self._share.finish([Finished(request=request, error=error) for request in self._running])
        shares.give_out()
        for one in self._share.claim("m", 1000):
            self._waiting[Piece(one.tenant, one.work)] = one.request
        waiting = list(self._waiting)
        tenants = by_tenant(waiting)
        chosen = FirstComeFirstServed(256).choose(self._choice.ordered(waiting, tenants), 16, BUDGET)
        chosen = self._choice.trimmed(chosen, tenants)
        self._choice.went(chosen, tenants)
        rows: dict[str, int] = defaultdict(int)
        for piece, _ in chosen:
            rows[piece.tenant] += piece.num_rows
        self._running = [self._waiting.pop(piece) for piece, _ in chosen]
        return rows


@pytest.mark.parametrize("replicas", [1, 2, 4])
@pytest.mark.parametrize(
    "sizes",
    [
        {"large": lambda rng: 100, "small": lambda rng: 10},
        {"a": lambda rng: 60, "b": lambda rng: 200, "c": lambda rng: 15},
        {"mixed": lambda rng: rng.choice([5, 200]), "even": lambda rng: 50},
    ],
)
def test_backlogged_tenants_stay_near_each_other_on_several_replicas(replicas: int, sizes: dict[str, Size]) -> None:
    """Replicas that run at their own speeds, one of them five times as fast, plan from the same counters."""
    rng = random.Random(replicas)
    shares = Shares(cast(ControllerStore, Backlog(sizes, rng)), "m", max_active=64)
    copies = [Copy(shares) for _ in range(replicas)]
    served = {tenant: [0] for tenant in sizes}
    largest = 0
    for _ in range(250 * replicas):
        (copy,) = rng.choices(copies, weights=[5, *[1] * (replicas - 1)])
        rows = copy.next_pass(shares)
        largest = max(largest, sum(rows.values()))
        for tenant, so_far in served.items():
            so_far.append(so_far[-1] + rows.get(tenant, 0))
    begun = 50  # until all of them have what they may hold
    gaps = []
    for one in sizes:
        for other in sizes:
            gap = [mine - theirs for mine, theirs in zip(served[one][begun:], served[other][begun:], strict=True)]
            gaps.append(max(gap) - min(gap))
    print(f"{replicas} replicas: {max(gaps) / largest:.1f} of the largest pass")
    assert max(gaps) <= (2 if replicas == 1 else 2 * (replicas + 1)) * largest
    assert min(so_far[-1] for so_far in served.values()) > 20 * largest


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "store")
    store.set_state("m", DeploymentState.READY, "ready")
    yield store
    store.close()


def test_a_new_controller_knows_who_is_owed_what(store: Store) -> None:
    first = KeptShares(store, "m")
    first.fair.went({"greedy": 900.0, "modest": 100.0}, ["modest"])
    first.save()
    first.fair.went({"greedy": 50.0}, ["modest"])
    first.save()  # so soon after the last time that it is not written: this is what a kill forgets
    second = KeptShares(store, "m")
    assert second.fair.counters == {"greedy": 900.0, "modest": 100.0}
    first.save(is_last=True)
    third = KeptShares(store, "m")
    assert third.fair.counters == first.fair.counters == {"greedy": 950.0, "modest": 100.0}
    assert third.fair.counter("newcomer") == first.fair.counter("newcomer") == 100.0
    assert third.fair.order(["greedy", "newcomer", "modest"])[-1] == "greedy"
    assert KeptShares(store, "another").fair.counters == {}


def test_who_was_ahead_before_a_restart_waits_until_the_other_has_caught_up(store: Store) -> None:
    kept = KeptShares(store, "m")
    kept.fair.went({"greedy": 3.0 * BUDGET}, ["modest"])
    kept.save(is_last=True)

    def order(fair: KeptShares) -> list[str]:
        """Whose passes come first while both wait."""
        choice, waiting = FairChoice(fair.fair, None), [Piece(name, BUDGET) for name in ("greedy", "modest") * 6]
        went = []
        for _ in range(6):
            tenants = by_tenant(waiting)
            chosen = FirstComeFirstServed(256).choose(choice.ordered(waiting, tenants), 16, BUDGET)
            choice.went(chosen, tenants)
            for piece, _ in chosen:
                went.append(piece.tenant)
                waiting.remove(piece)
        return went

    assert order(KeptShares(store, "m"))[:3] == ["modest"] * 3
    assert order(KeptShares(store, "another"))[:3] != ["modest"] * 3, "without what is kept they begin even"
