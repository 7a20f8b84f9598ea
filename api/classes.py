"""Whether somebody waits for a request: what its header says, or how its caller waits."""

from __future__ import annotations

from fastapi import Request

from polytrace.errors import UserError

CLASS_HEADER = "X-Polytrace-Class"
INTERACTIVE, BATCH = "interactive", "batch"


def is_interactive(request: Request, wait_s: float) -> bool:
    """`X-Polytrace-Class: interactive` or `batch`; without it, whether the caller waits (`Prefer: wait=SECONDS`).

    Raises UserError for another class.
    """
    named = request.headers.get(CLASS_HEADER)
    if named is None:
        return wait_s > 0
    if named not in (INTERACTIVE, BATCH):
        raise UserError(f"{CLASS_HEADER} is {named[:40]!r}; it is {INTERACTIVE} or {BATCH}")
    return named == INTERACTIVE
