"""In a worker: the nearest request to a refused one that would be taken. Imports torch: workers alone import it.

What is told was worked out like a request that comes: it is taken, and one more is not. Where that takes too long,
nothing is told.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import nn

from api.checked_calls import CheckedCalls
from api.limits import demand_of
from cluster.contents import with_contents
from cluster.requests import read_request
from engine.shapes import infer
from polytrace.description import ModelDescription
from polytrace.errors import PolytraceError
from polytrace.graph import Request
from polytrace.wire import encode_request
from scheduling.fewer import most as most_that_fit
from scheduling.fewer import smaller_save, ways
from scheduling.plan import Program, RequestId
from scheduling.program import certify
from scheduling.step_saves import all_slots
from scheduling.whole import described, taped
from scheduling.working_out import work_out

PATIENCE_S = 3.0
MOST_NODES = 100_000  # each try of which takes a second


class _TooLong(Exception):
    """Nobody waits for this any longer."""


def nearest(
    description: ModelDescription,
    meta: nn.Module,
    path: Path,
    contents: Path,
    most: Mapping[str, int],
    calls: CheckedCalls | None,
) -> str | None:
    """As of `CheckerPool.nearest`."""
    request = read_request(path, max_nodes=description.limits.max_nodes)
    if len(request.graph.nodes) > MOST_NODES:
        return None
    request, _ = with_contents(request, contents, None)
    if calls is not None:
        description = described(description, calls.of_all(request))
    search = _Search(description, meta, calls, most, time.monotonic() + PATIENCE_S)
    return next(search.found(request), None)


class _Search:
    """Works requests out until the time is over."""

    def __init__(
        self,
        description: ModelDescription,
        meta: nn.Module,
        calls: CheckedCalls | None,
        most: Mapping[str, int],
        deadline: float,
    ) -> None:
        self._description = description
        self._meta = meta
        self._calls = calls
        self._most = most
        self._deadline = deadline

    def found(self, request: Request) -> Iterator[str]:
        """What fits, in words, the best first."""
        if (told := self._of_saves(request)) is not None:
            yield told
        for way in ways(request):
            try:
                count = most_that_fit(way.counts, lambda some, way=way: self._fits(way.take(some)))  # type: ignore[misc]
            except _TooLong:
                return
            if count is not None:
                yield way.told(count)

    def _of_saves(self, request: Request) -> str | None:
        """Where nothing but the saves is too large: how much of the largest would not be."""
        try:
            program, takes = self._worked_out(request, has_room=True)
        except PolytraceError:
            return None
        over = {what for what, limit in self._limits().items() if takes[what] > limit}
        if not over or not over <= {"result_bytes", "stored_bytes"}:
            return None
        slots = list(all_slots(program))
        if any(slot.is_of_step for slot in slots):
            return None  # the same at every step: fewer of them is what is meant
        excess = max(takes[what] - self._limits()[what] for what in over)
        return smaller_save(slots, excess, lambda slot: program.graph.nodes[slot.node].where)

    def _fits(self, request: Request) -> bool:
        if time.monotonic() > self._deadline:
            raise _TooLong
        try:
            _, takes = self._worked_out(request)
        except PolytraceError:
            return False
        return all(takes[what] <= limit for what, limit in self._limits().items())

    def _limits(self) -> dict[str, int]:
        hard = {"result_bytes": self._description.limits.max_result_bytes}
        return {**hard, **{what: min(limit, hard.get(what, limit)) for what, limit in self._most.items()}}

    def _worked_out(self, request: Request, *, has_room: bool = False) -> tuple[Program, dict[str, int]]:
        """The program and what it takes; `has_room`: as if results could have any size."""
        from dataclasses import fields, replace

        about = self._description
        if has_room:
            about = replace(about, limits=replace(about.limits, max_result_bytes=1 << 62))
        program, facts = work_out(RequestId("0" * 32), request, about, lambda part: infer(about, part, self._meta))
        if self._calls is not None:
            program = taped(program, self._calls.tape_bytes(program, about.of_invokes), about.limits)
        size = sum(map(len, encode_request(request))) if "request_bytes" in self._most else 0
        demand = demand_of(certify(program, facts, about, has_values=False, request_bytes=size))
        takes = {each.name: int(getattr(demand, each.name)) for each in fields(demand)}
        return program, takes | {"stored_bytes": demand.stored_bytes}
