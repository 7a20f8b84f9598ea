"""Which sites of an invoke a program has closed: those behind a `tracer.stop()`, and those inside of a skipped module.

What nobody could have in nnsight, whose forward ends or goes around there, is refused here with both lines.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property

from polytrace.description import ModelDescription
from polytrace.errors import GraphError
from polytrace.graph import Port, Site
from polytrace.timing import FIRST, When


class _Own:
    """What one invoke has done so far."""

    def __init__(self) -> None:
        self.used: dict[Site, str] = {}  # sites that were read or written, each with its first line
        self.skipped: dict[str, str] = {}  # paths of modules -> lines
        self.stop: tuple[int, str] | None = None  # the order of the last site that may be used, and the line

    @property
    def is_open(self) -> bool:
        return self.stop is None and not self.skipped


class Closings:
    """Belongs to one recording."""

    def __init__(self, description: ModelDescription) -> None:
        self._description = description
        self._own: dict[tuple[int, When], _Own] = {}

    def use(self, site: Site, invoke: int, done: str, where: str, when: When = FIRST) -> None:
        """Notes that a site is read or written. Raises GraphError when it is closed; `done` is "read" or "written"."""
        own = self._own.get((invoke, when))
        if own is None:
            own = self._own[invoke, when] = _Own()
        if own.is_open:
            own.used.setdefault(site, where)
            return
        for module, line in own.skipped.items():
            if _is_inside(site, module):
                raise GraphError(f"{site} cannot be {done}: {_told(module, line)}", where=where)
        if own.stop is not None and self._order(site) > own.stop[0]:
            raise GraphError(
                f"{site} cannot be {done}: tracer.stop() at {own.stop[1]} ended this prompt's run before it comes "
                "there; stop behind what is read or written last",
                where=where,
            )
        own.used.setdefault(site, where)

    def stop(self, invokes: Iterable[int], where: str) -> None:
        """The run ends behind the last site that was used so far."""
        for invoke in invokes:
            own = self._own.setdefault((invoke, FIRST), _Own())
            last = max(map(self._order, own.used), default=-1)
            own.stop = own.stop or (last, where)

    def skip(self, module: str, invoke: int, where: str, when: When = FIRST) -> None:
        """A module is not run. Raises GraphError when something inside of it, or its own output, was used before."""
        own = self._own.setdefault((invoke, when), _Own())
        if module in own.skipped:
            raise GraphError(f"{module} is skipped already, at {own.skipped[module]}", where=where)
        for site, line in own.used.items():
            if _is_inside(site, module) or (site.module == module and site.port is Port.OUTPUT):
                raise GraphError(
                    f"{module} cannot be skipped: {site} is used at {line}, and a module that does not run has none. "
                    "Skip it first; behind that line its output is what was given",
                    where=where,
                )
        own.skipped[module] = where

    def _order(self, site: Site) -> int:
        """The site's place in the model's order; of one that has none of its own, that of the output around it."""
        order, path = self._orders.get((site.module, site.port, site.visit)), site.module
        while order is None:
            order = self._orders.get((path, Port.OUTPUT, 0), None if path else 0)
            path = path.rpartition(".")[0]
        return order

    @cached_property
    def _orders(self) -> dict[tuple[str, Port, int], int]:
        return {(info.module, info.port, info.visit): info.order for info in self._description.sites}


def _is_inside(site: Site, module: str) -> bool:
    """Whether a site exists only while the module runs."""
    return site.module.startswith(f"{module}.") or (site.module == module and site.port.is_inner)


def _told(module: str, line: str) -> str:
    return f"{module} is skipped for this prompt ({line}), so nothing inside of it runs; its output is what was given"
