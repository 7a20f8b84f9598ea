"""What requests are told that cannot be run: too large for the memory of shards, or a fault of ours."""

from __future__ import annotations

from polytrace.errors import PolytraceError, ServiceError, TooLargeError
from scheduling.jobs import Job
from scheduling.plan import Plan, Program


def of_ours(error: Exception) -> PolytraceError:
    """What a request is told of a fault that is not its own."""
    if isinstance(error, PolytraceError):
        return error
    told = ServiceError(f"the request could not be planned: {type(error).__name__}: {error}")
    told.__cause__ = error
    return told


def rows_held(plan: Plan) -> int:
    """Rows of a pass, or of those whose gradients it runs back: they have no other there."""
    if plan.of is None:
        return max(plan.layer_rows, default=0)
    return sum(_widest(member.program, member.wave) for member in plan.members)


def too_large(job: Job, wave: int, told: str, *, where: str | None = None) -> TooLargeError:
    """Of a wave that does not fit though it is alone; `told`: what the shard said."""
    rows = _widest(job.now, wave)
    return TooLargeError(
        f"pass {wave + 1} of {job.num_waves} does not fit into memory though the request has it to itself, "
        f"{rows:,} rows at its widest layer: {told}. Ask for fewer or shorter prompts in one invoke, or smaller values",
        where=where,
    )


def _widest(program: Program, wave: int) -> int:
    """Rows of a wave's widest layer, or of the one that it runs back."""
    of = program.waves[wave].of
    return program.waves[wave if of is None else of].rows.widest
