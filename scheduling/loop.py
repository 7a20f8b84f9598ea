"""The loop: next pass, run, complete. The same in one process and on a cluster; only the shards differ."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from polytrace.errors import PolytraceError
from scheduling.plan import PassTooLargeError, Plan, ShardResult
from scheduling.scheduler import Scheduler


class Shards(Protocol):
    """The shards of a deployment, seen from outside: plans go in, results come out, in the order they went in."""

    def have_room(self) -> bool:
        """Whether another pass may be submitted: `scheduling.policy.passes_in_flight` says how many there may be."""

    def submit(self, plan: Plan) -> None:
        """Starts a pass on every shard."""

    def finished(self) -> Iterable[tuple[Plan, tuple[ShardResult, ...] | PolytraceError]]:
        """The passes that ended since the last call, each once: all shards' answers, or why the pass died with them."""


def step(scheduler: Scheduler, shards: Shards) -> None:
    """One round of the loop. Never waits: the caller does, when nothing can be submitted and nothing has finished."""
    while shards.have_room() and scheduler.has_work():
        shards.submit(scheduler.next_pass())
    for plan, results in shards.finished():
        if isinstance(results, PassTooLargeError):
            scheduler.again(plan, results)
        elif isinstance(results, PolytraceError):
            scheduler.lost(plan, results)
        else:
            scheduler.complete(plan, results)
