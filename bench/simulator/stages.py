"""Shards that take the time that the cost model says, on a clock of their own: nobody waits, nothing is computed.

A pass begins at a stage when the stage before has handed it on and the stage itself is through with the pass before.
What shards answer is what they answer when everything works: all that was planned has fired; sequences go on with
tokens that nobody looks at.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from bench.simulator.costs import PlanCosts
from scheduling.plan import NO_ROWS, Drawn, Plan, RequestId, ShardResult

_TOKEN = 7  # what every sequence goes on with


class Clock:
    """Seconds of simulated time."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class SimulatedStages:
    """The shards of a deployment, as `scheduling.loop` sees them: one rank answers for its stage."""

    def __init__(self, costs: PlanCosts, clock: Clock, depth: int) -> None:
        """`depth` passes may be in flight."""
        self.costs, self.clock, self.depth = costs, clock, depth
        stages = costs.description.stages
        self.busy_s = [0.0] * stages
        self.num_passes = 0
        self._free_at = [0.0] * stages  # when a stage takes another pass
        self._flying: deque[tuple[float, Plan, list[float]]] = deque()

    @property
    def next_end(self) -> float | None:
        """When the next pass ends; None: there is none."""
        return self._flying[0][0] if self._flying else None

    def have_room(self) -> bool:
        return len(self._flying) < self.depth

    def submit(self, plan: Plan) -> None:
        self.num_passes += not plan.is_of_nobody
        seconds, here = self.costs.seconds(plan), self.clock.now
        for stage, own in enumerate(seconds):
            here = self._free_at[stage] = max(here, self._free_at[stage]) + own
            self.busy_s[stage] += own
        self._flying.append((here, plan, seconds))

    def finished(self) -> Iterator[tuple[Plan, tuple[ShardResult, ...]]]:
        while self._flying and self._flying[0][0] <= self.clock.now:
            _, plan, seconds = self._flying.popleft()
            yield plan, self._answers(plan, seconds)

    def _answers(self, plan: Plan, seconds: list[float]) -> tuple[ShardResult, ...]:
        parts = [(member.program.request, self.costs.parts(member.program, member.wave)) for member in plan.members]
        drawn = _drawn(plan)
        last = len(seconds) - 1
        return tuple(
            [
                ShardResult(
                    pass_id=plan.pass_id,
                    stage=stage,
                    rank=0,
                    failures=(),
                    fired={request: own[stage].fired for request, own in parts},
                    saved_bytes={request: own[stage].saved_bytes for request, own in parts if own[stage].saved_bytes},
                    carried_bytes=0,
                    gathered_bytes=0,
                    seconds=busy_s,
                    busy_seconds=busy_s,
                    drawn=drawn if stage == last else {},
                )
                for stage, busy_s in enumerate(seconds)
            ]
        )


def _drawn(plan: Plan) -> dict[RequestId, tuple[Drawn, ...]]:
    found: dict[RequestId, tuple[Drawn, ...]] = {}
    for view in plan.views:
        if view.is_drawing:
            tokens = tuple([NO_ROWS if segment == NO_ROWS else _TOKEN for segment in view.segments])
            request = plan.members[view.member].program.request
            found[request] = (*found.get(request, ()), Drawn(invoke=view.invoke, tokens=tokens))
    return found
