"""What the steps of a generation take and move behind its prompts, for certificates and receipts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from scheduling.checks import ModelTable
from scheduling.costs import carried_bytes, gathered_bytes, read_bytes
from scheduling.op_costs import program_flops
from scheduling.plan import Program


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCosts:
    """What the steps of a generation take and move, behind its prompts."""

    tokens: int = 0
    token_layers: int = 0
    read_bytes: int = 0
    carried_bytes: int = 0
    gathered_bytes: int = 0
    hidden_link_bytes: int = 0
    op_flops: int = 0


def step_costs(program: Program, rows: Sequence[int], table: ModelTable) -> StepCosts:
    """Of the steps behind the prompts; `rows` has the sequences that each of them had."""
    if program.chain is None:
        return StepCosts()
    chain = program.chain
    parts = [chain.parts[step.part] for step in chain.steps[: len(rows)]]
    if chain.ending is not None:
        parts.append(chain.parts[chain.ending.part])
    own = {id(part): part for part in parts}
    known = {
        key: (read_bytes(p), carried_bytes(p, table), gathered_bytes(p, table), program_flops(p, table))
        for key, p in own.items()
    }
    totals = [sum(each) for each in zip(*(known[id(part)] for part in parts), strict=True)] or [0, 0, 0, 0]
    borders = len(set(table.levels.stages)) - 1 if table.levels.stages else 0
    return StepCosts(
        tokens=sum(rows),
        token_layers=sum(rows) * table.levels.count,
        read_bytes=totals[0],
        carried_bytes=totals[1],
        gathered_bytes=totals[2],
        hidden_link_bytes=sum(rows) * borders * table.description.hidden_bytes * table.description.ranks,
        op_flops=totals[3],
    )


def most_rows(program: Program) -> list[int]:
    """Sequences of each step behind the prompts, when none ends early."""
    counts = [
        (one.generation.max_new_tokens, len(one.sequences)) for one in program.invokes if one.generation is not None
    ]
    last = max((steps for steps, _ in counts), default=0)
    return [sum(count for steps, count in counts if steps > step) for step in range(1, last)]
