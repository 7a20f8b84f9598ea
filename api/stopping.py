"""The end of a service in good order: nothing new is taken, what was accepted is finished, for a bounded time.

What is left then stays in the store and runs after the next start: what waits as it is, what runs from its first pass.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from api.away import AwayError
from api.status import RequestState
from api.store import Store
from cluster.requests import DeploymentState

LOOK_S = 0.1
_RUNS = (DeploymentState.READY, DeploymentState.RECOVERING, DeploymentState.DRAINING, DeploymentState.DRAINED)
QUEUED, RUNNING = RequestState.QUEUED, RequestState.RUNNING


def finish_accepted(
    store: Store, drain_s: float, report: Callable[[str], None], *, goes_on: Callable[[], bool]
) -> None:
    """Returns when what deployments have is finished, after `drain_s`, or when it no longer `goes_on`, which is asked
    all the time.

    Requests of a deployment that cannot run any now are not waited for.
    """
    deadline = time.monotonic() + drain_s
    try:
        store.draining.begin("default/default", until=time.time() + drain_s)
    except AwayError as error:
        report(f"what was accepted stays in the store: {error}")
        return
    told = (0, 0)
    while goes_on():
        try:
            waiting, running = _left(store)
        except AwayError:
            waiting, running = told  # it may be back in time
        if waiting + running == 0:
            return
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            report(f"{running} that run and {waiting} that wait stay in the store, for the next start")
            return
        if (waiting, running) != told:
            told = (waiting, running)
            report(
                f"draining: {running} requests run and {waiting} wait; at most {left_s:.0f} s (a second signal: now)"
            )
        time.sleep(LOOK_S)


def what_is_left(store: Store, place: str | None) -> str:
    """Of a service that has stopped, in one line; `place` is where it stays, None when the store goes as well."""
    try:
        left = sum(sum(counts.values()) for counts in store.open_requests().values())
    except AwayError as error:
        return f"stopped; what is left cannot be counted now: {error}"
    if left == 0:
        return "stopped; no request is left"
    where = "go with its store" if place is None else f"are left in {place} and run after its next start"
    return f"stopped; {left} requests that have not ended {where}"


def _left(store: Store) -> tuple[int, int]:
    """Requests that wait and that run on deployments that get on."""
    able = {one.model for one in store.deployments() if one.state in _RUNS}
    counts = [count for model, count in store.open_requests().items() if model in able]
    return sum(count.get(QUEUED, 0) for count in counts), sum(count.get(RUNNING, 0) for count in counts)
