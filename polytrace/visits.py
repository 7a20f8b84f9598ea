"""Calls of one module within one forward: `module.visits[2].output`, of a model that is called as it is.

Where a forward runs a module several times (a shared layer, the steps of a diffusion loop), `module.output` is what its
first call returned.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from polytrace.graph import Port
from polytrace.lines import user_line
from polytrace.literals import scalar
from polytrace.tree import NoSuchLayerError

if TYPE_CHECKING:
    from polytrace.modules import Module


class Visits:
    """All calls of a module, in their order."""

    def __init__(self, module: Module) -> None:
        self._module = module

    def __len__(self) -> int:
        table, path, ports = self._module._table, self._module._path, self._module._ports
        count = max([len(table.visits.get((path, port.value), ())) for port in (Port.INPUT, Port.OUTPUT)])
        if not count and not ports.keys() & {Port.INPUT.value, Port.OUTPUT.value}:
            self._module._refuse_port(Port.OUTPUT.value)
        return max(1, count)

    def __getitem__(self, number: Any) -> Any:
        """The module as it is at one of its calls; negative numbers count from the last."""
        place, count = scalar(number), len(self)
        if not isinstance(place, int) or not -count <= place < count:
            path = self._module._path or "the model"
            raise NoSuchLayerError(f"{path} is called {count} times in this forward, not {number!r}", where=user_line())
        return self._module.at_visit(place % count)

    def __iter__(self) -> Iterator[Any]:
        return (self._module.at_visit(number) for number in range(len(self)))

    def __repr__(self) -> str:
        return f"<{len(self)} calls of {self._module._path or 'the model'}>"
