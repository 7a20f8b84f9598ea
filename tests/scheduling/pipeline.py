"""Stages that take the time that they are said to take: a pipeline without processes, on a clock of its own.

A pass starts at a stage when the stage before it is through with it and the stage itself with the pass before. What it
takes there is so much for the pass and so much a row and layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from polytrace.graph import NodeId, Read, Save, Write
from scheduling.loop import step
from scheduling.plan import Plan, Program, RequestId, ShardResult
from scheduling.policy import passes_in_flight
from scheduling.scheduler import Outcome, Scheduler


@dataclass
class TimedStages:
    """The loop's shards: one rank a stage."""

    stages: int
    depth: int | None = None  # passes in flight; None: as many as the product has
    pass_s: float = 1.0  # a stage takes for any pass: what kernels cost that wait for memory
    row_s: float = 0.01  # more for each row of each of its layers
    way_s: float = 0.0  # until the loop hears of the end of a pass
    now: float = 0.0
    plans: list[Plan] = field(default_factory=list)
    busy: list[float] = field(default_factory=list)  # seconds, by stage
    _free: list[float] = field(default_factory=list)  # from when on a stage takes another pass
    _flying: list[tuple[float, Plan]] = field(default_factory=list)  # when the loop hears of its end

    def __post_init__(self) -> None:
        self.busy = [0.0] * self.stages
        self._free = [0.0] * self.stages

    def have_room(self) -> bool:
        return len(self._flying) < (self.depth or passes_in_flight(self.stages))

    def submit(self, plan: Plan) -> None:
        self.plans.append(plan)
        here = self.now
        per_stage = len(plan.layer_rows) // self.stages
        for stage in range(self.stages):
            rows = plan.layer_rows[stage * per_stage : (stage + 1) * per_stage]
            seconds = self.pass_s + self.row_s * sum(rows)
            here = self._free[stage] = max(here, self._free[stage]) + seconds
            self.busy[stage] += seconds
        self._flying.append((here + self.way_s, plan))

    def finished(self) -> Iterator[tuple[Plan, tuple[ShardResult, ...]]]:
        while self._flying and self._flying[0][0] <= self.now:
            _, plan = self._flying.pop(0)
            yield plan, all_fired(plan, self.stages)

    def wait(self) -> None:
        """Until a pass ends."""
        self.now = max(self.now, self._flying[0][0])

    @property
    def idle_shares(self) -> list[float]:
        """By stage, of the time so far."""
        return [1 - busy / self.now for busy in self.busy]


def run_all(
    scheduler: Scheduler, shards: TimedStages, ended: Callable[[Outcome], Program | None] = lambda _: None
) -> list[Outcome]:
    """Runs until nobody has anything to run; `ended` may give a client's next request for an outcome."""
    outcomes: list[Outcome] = []
    while True:
        step(scheduler, shards)
        news = scheduler.take_outcomes()
        outcomes += news
        more = [program for outcome in news if (program := ended(outcome)) is not None]
        for program in more:
            scheduler.add(program)
        if more or (scheduler.has_work() and shards.have_room()):
            continue
        if not shards._flying:
            return outcomes
        shards.wait()


def fired_nodes(plan: Plan, stage: int) -> dict[RequestId, tuple[NodeId, ...]]:
    """What each member reads, writes and saves in the stage."""
    return {
        member.program.request: tuple(
            node
            for fragment in member.program.waves[member.wave].stages[stage].fragments
            for node in fragment.nodes
            if isinstance(member.program.graph.nodes[node], (Read, Write, Save))
        )
        for member in plan.members
    }


def all_fired(plan: Plan, stages: int) -> tuple[ShardResult, ...]:
    """What shards answer that ran everything."""
    return tuple(answer_of(plan, stage) for stage in range(stages))


def answer_of(plan: Plan, stage: int) -> ShardResult:
    """What one of them answers."""
    return ShardResult(
        pass_id=plan.pass_id,
        stage=stage,
        rank=0,
        failures=(),
        fired=fired_nodes(plan, stage),
        saved_bytes={},
        carried_bytes=0,
        gathered_bytes=0,
        seconds=0.0,
        busy_seconds=0.0,
    )
