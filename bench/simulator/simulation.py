"""One run: requests arrive, are claimed, go into passes of the real scheduler and end; nobody sleeps.

The loop is that of a replica (`scheduling.loop.step`); in front of it the store's queue, of which as many requests are
in memory as the product has. Time stands still while a pass is planned.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random

from bench.simulator.books import Books
from bench.simulator.deployment import SimulatedDeployment
from bench.simulator.policies import Policy
from bench.simulator.population import Asked
from bench.simulator.stages import Clock, SimulatedStages
from bench.simulator.waiting import ByTenant, InOrder, Waiting
from scheduling.loop import step
from scheduling.plan import Plan, Program, RequestId
from scheduling.scheduler import Outcome, Scheduler

_NOWHERE = 0  # a token that the text has nowhere: prompts that differ in it differ
TEXT_TOKENS = 1 << 20  # of the text that all prompts are parts of


@dataclass(slots=True)
class Ended:
    """One request, when it is over."""

    asked: Asked
    started: float  # its first pass was planned
    ended: float
    token_layers: int
    token_layers_alone: int
    error: str | None = None


@dataclass(slots=True)
class Run:
    """What happened."""

    books: Books
    ended: list[Ended] = field(default_factory=list)
    seconds: float = 0.0  # simulated, to the end of the last request
    busy_s: list[float] = field(default_factory=list)  # by stage
    passes: int = 0
    members: int = 0  # of all passes
    tenants: int = 0  # of all passes: whose requests were in
    rows: int = 0  # of all passes, at the first layer
    planner_s: float = 0.0  # seconds of this processor for planning passes; they are no part of the simulated time


Tell = Callable[[str], None]


class Simulation:
    """A deployment with everybody who asks it for something."""

    def __init__(
        self,
        deployment: SimulatedDeployment,
        policy: Policy,
        tenants: Sequence[str],
        requests: Sequence[Asked],
        *,
        watched: Sequence[str] = (),
        seed: int = 0,
        tell: Tell | None = None,
    ) -> None:
        """`requests` by time. `tell` hears now and then how far it is."""
        self.clock = Clock()
        self.books = Books(tenants, self.clock, watched, lambda: self._waiting.tenants())
        shares = policy.shares(self.books)
        self._deployment, self._policy, self._requests = deployment, policy, requests
        self._stages = _Watched(deployment, self.clock, policy)
        self._scheduler = Scheduler(deployment.description, policy.pass_policy, clock=self.clock, shares=shares)
        self._waiting: Waiting = ByTenant(shares) if policy.is_fair else InOrder()
        self._held: Counter[str] = Counter()
        self._active: dict[RequestId, Asked] = {}
        self._ended: list[Ended] = []
        self._arrived = 0
        vocabulary = deployment.description.vocab_size
        rng = Random(seed)
        self._text = [rng.randrange(_NOWHERE + 1, vocabulary) for _ in range(TEXT_TOKENS + 8192)]
        self._begins = {tenant: rng.randrange(TEXT_TOKENS) for tenant in tenants}  # of what its prompts have in common
        self._tell, self._told = tell, time.monotonic()

    def run(self) -> Run:
        """Until every request has ended."""
        while self._round():
            pass
        stages = self._stages
        return Run(
            books=self.books,
            ended=self._ended,
            seconds=max((one.ended for one in self._ended), default=0.0),
            busy_s=stages.busy_s,
            passes=stages.num_passes,
            members=stages.members,
            tenants=stages.tenants,
            rows=stages.rows,
            planner_s=stages.planner_s,
        )

    def _round(self) -> bool:
        """All that happens at one moment; then the next moment. False when there is none."""
        while self._arrived < len(self._requests) and self._requests[self._arrived].at <= self.clock.now:
            self._waiting.add(self._requests[self._arrived])
            self._arrived += 1
        self._claim()
        began = time.process_time()
        step(self._scheduler, self._stages)
        self._stages.planner_s += time.process_time() - began
        outcomes = self._scheduler.take_outcomes()
        for outcome in outcomes:
            self._end(outcome)
        self._scheduler.take_progress()
        self._say()
        if outcomes or (self._stages.have_room() and self._scheduler.has_work()):
            return True
        moments = [at for at in (self._next_arrival, self._stages.next_end) if at is not None]
        if not moments:
            return False
        self.clock.now = max(self.clock.now, min(moments))
        return True

    @property
    def _next_arrival(self) -> float | None:
        return self._requests[self._arrived].at if self._arrived < len(self._requests) else None

    def _claim(self) -> None:
        for one in self._waiting.claim(self._policy.max_active - len(self._active), self._held):
            program = self._program(one)
            self._held[one.tenant] += 1
            self._active[program.request] = one
            self._scheduler.add(program)

    def _program(self, one: Asked) -> Program:
        worked = self._deployment.worked[one.experiment][one.length]
        begin, text = self._begins[one.tenant], self._text
        own = text[one.place + worked.shared : one.place + one.length]
        tokens = [*text[begin : begin + worked.shared], *own, _NOWHERE]
        return worked.of(
            RequestId(f"{one.tenant}.{one.number}"),
            tokens,
            one.tenant,
            is_interactive=one.is_interactive or not self._policy.is_fair,
        )

    def _end(self, outcome: Outcome) -> None:
        one = self._active.pop(outcome.request)
        self._held[one.tenant] -= 1
        receipt, now = outcome.receipt, self.clock.now
        self._ended.append(
            Ended(
                asked=one,
                started=now if receipt is None else now - receipt.run_seconds,
                ended=now,
                token_layers=0 if receipt is None else receipt.token_layers,
                token_layers_alone=0 if receipt is None else receipt.token_layers_alone,
                error=None if outcome.error is None else str(outcome.error),
            )
        )

    def _say(self) -> None:
        if self._tell is not None and time.monotonic() - self._told > 5.0:
            self._told = time.monotonic()
            self._tell(f"{len(self._ended):,} of {len(self._requests):,} requests, {self.clock.now / 3600:.2f} h")


class _Watched(SimulatedStages):
    """Stages that count who is in their passes."""

    def __init__(self, deployment: SimulatedDeployment, clock: Clock, policy: Policy) -> None:
        super().__init__(deployment.costs, clock, policy.depth(deployment.stages))
        self.members = self.tenants = self.rows = 0
        self.planner_s = 0.0

    def submit(self, plan: Plan) -> None:
        super().submit(plan)
        self.members += len(plan.members)
        self.tenants += len({member.program.tenant for member in plan.members})
        self.rows += plan.layer_rows[0]
