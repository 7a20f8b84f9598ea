"""Who goes into the next pass, and its plan: more than a choice foresees where requests have rows in common.

Owns how the parts of a choice come together (`scheduling.fair_choice` orders, `scheduling.policy` chooses,
`scheduling.packing` plans), and what was learnt about the size of passes. Of a request's life it knows nothing: who may
go, with what, and what shards are to forget are the scheduler's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeAlias

from polytrace.description import ModelDescription, PassLayout
from scheduling.alike import MOST_CALLS
from scheduling.fair_choice import FairChoice, by_tenant
from scheduling.jobs import Job
from scheduling.packing import Going, Packer
from scheduling.plan import PassId, Plan, RequestId
from scheduling.policy import (
    Choice,
    FirstComeFirstServed,
    InTurns,
    PassPolicy,
    Patience,
    passes_in_flight,
    share_of,
    step_share,
)

_MAX_REFILLS = 3  # times that a pass is planned again because it has room left

Chosen: TypeAlias = list[tuple[Job, int]]  # with their rows


class Filler:
    """Fills the passes of one deployment. Belongs to a scheduler."""

    def __init__(
        self,
        description: ModelDescription,
        policy: PassPolicy,
        fair: FairChoice,
        *,
        going: Callable[[Chosen], list[tuple[Job, Going]]],
        take_ended: Callable[[], tuple[RequestId, ...]],
    ) -> None:
        """`going` gives the chosen what they go with, `take_ended` says what shards are to forget, each once."""
        self.depth = passes_in_flight(description.stages)
        self.tried: list[Job] = []  # whom the pass that is planned now is for
        self.fair = fair
        is_packed = description.layout is PassLayout.PACKED
        is_merging = description.layout is PassLayout.WHOLE and policy.merges_calls
        choice = FirstComeFirstServed if is_packed or is_merging else InTurns
        self._choice: Choice = choice(min(policy.max_members, MOST_CALLS) if is_merging else policy.max_members)
        self._policy = policy
        self._patience = Patience(policy.max_waits)
        self._packer = Packer(description)
        self._going = going
        self._take_ended = take_ended

    @property
    def budget_tokens(self) -> int:
        """Rows that a pass may have: the policy's, or fewer since one did not fit into memory."""
        return self._policy.budget_tokens

    def learn(self, rows: int) -> None:
        """A pass of so many rows did not fit."""
        most = max(self._policy.least_tokens, min(self._policy.budget_tokens, rows) // 2)
        self._policy = replace(self._policy, budget_tokens=min(self._policy.budget_tokens, most))

    def fill(
        self, pass_id: PassId, waiting: Sequence[Job], num_steps: int, num_flying: int
    ) -> tuple[list[tuple[Job, Going]], Plan]:
        """Who goes of those who wait, and their plan. `num_steps`: rows of all steps, those that are on their way too.

        What it raises is of one of `tried`, if it is of anybody.
        """
        self.tried = []
        tenants = by_tenant(waiting)
        in_order = self.fair.ordered(waiting, tenants)
        ready = self._patience.ordered(in_order)
        others = share_of(sum(job.num_rows for job in ready), self.depth - num_flying, self._policy)
        is_beside_steps = num_steps and not self.fair.is_behind_steps(tenants)
        budget = min(others, self._policy.tokens_beside_steps) if is_beside_steps else others
        foreseen, steps = budget, step_share(num_steps, self.depth, self._policy)
        chosen = self.fair.trimmed(self._choice.choose(ready, steps, foreseen), tenants)
        self.tried = [job for job, _ in chosen]
        going = self._going(chosen)
        ended = self._take_ended()
        plan = self._packer.pack(pass_id, [one for _, one in going], ended)
        for _ in range(_MAX_REFILLS):
            rows = max(plan.layer_rows, default=0)
            if num_steps or len(chosen) == len(ready) or not 0 < rows * 4 < budget * 3:
                break
            foreseen = foreseen * budget // rows
            more = self.fair.trimmed(self._choice.choose(ready, steps, foreseen), tenants)
            if len(more) <= len(chosen):
                break
            self.tried = [job for job, _ in more]
            fuller = self._going(more)
            filled = self._packer.pack(pass_id, [one for _, one in fuller], ended)
            if max(filled.layer_rows) > budget:
                break
            chosen, going, plan = more, fuller, filled
        self._patience.went(in_order, [job for job, _ in chosen])
        self.fair.went(chosen, tenants)
        for job, rows in chosen:
            job.charged += job.cost(rows)
        return going, plan

    def of_nobody(self, pass_id: PassId, ended: tuple[RequestId, ...]) -> Plan:
        """A pass that only says what shards are to forget."""
        return self._packer.pack(pass_id, [], ended)

    def went(self, jobs: Sequence[Job]) -> None:
        """These are in a pass, or nobody is."""
        self._choice.went(jobs)
