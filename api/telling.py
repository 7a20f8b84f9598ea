"""What the store counts of requests and passes (`api.figures`): one function for each thing that happens."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from api import figures
from api.figures import class_of
from api.tally import Tally
from cluster.requests import Finished, PassFigures
from polytrace.errors import CancelledError, PolytraceError

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Ended:
    """A request that has ended, as its row says."""

    end: Finished
    tenant: str
    user: str
    model: str
    is_interactive: bool
    created: float
    started: float | None
    tokens: int  # as certified


def tell_ended(tally: Tally, ended: Ended, now: float) -> None:
    """A request ended that had been claimed."""
    end, model, kind = ended.end, ended.model, class_of(ended.is_interactive)
    tell_end(tally, model, kind, end.error)
    if ended.started is not None:
        tally.observe(figures.QUEUE, model, kind, value=max(0.0, ended.started - ended.created))
        tally.observe(figures.RUN, model, kind, value=max(0.0, now - ended.started))
    if _log.isEnabledFor(logging.INFO):
        state = "done" if end.error is None else f"ended: {end.error.code}"
        _log.info("request %s is %s", end.request, state, extra=_about(ended, now))
    tally.count(figures.TOKEN_LAYERS, model, by=end.token_layers)
    tally.count(figures.MOVED, model, by=end.moved_bytes)
    if end.error is None:
        tally.count(figures.TOKENS, model, by=ended.tokens if end.tokens is None else end.tokens)
        tally.count(figures.RETURNED, model, by=end.size or 0)
        tally.count(figures.TOKEN_LAYERS_ALONE, model, by=end.token_layers_alone)
        tally.count(figures.TOKEN_LAYERS_SAVED, model, by=max(0, end.token_layers_alone - end.token_layers))


def tell_end(tally: Tally, model: str, kind: str, error: PolytraceError | None) -> None:
    """A request of a class ended."""
    state = "done" if error is None else "cancelled" if isinstance(error, CancelledError) else "failed"
    tally.count(figures.ENDED, model, state, kind)
    if error is not None:
        tally.count(figures.ERRORS, model, error.code)


def tell_pass(tally: Tally, model: str, told: PassFigures) -> None:
    """A pass ran."""
    tally.count(figures.PASSES, model)
    tally.count(figures.PASS_ROWS, model, by=told.rows)
    tally.observe(figures.PASS_USERS, model, value=told.users)
    tally.observe(figures.PASS_SECONDS, model, value=told.seconds)
    for stage, seconds in enumerate(told.busy_seconds):
        tally.count(figures.STAGE_BUSY, model, str(stage), by=seconds)


def _about(ended: Ended, now: float) -> dict[str, Any]:
    return {
        "request": ended.end.request,
        "tenant": ended.tenant,
        "user": ended.user,
        "model": ended.model,
        "seconds": round(now - ended.created, 6),
        "code": None if ended.end.error is None else ended.end.error.code,
    }
