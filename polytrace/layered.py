"""Lists with an entry a layer: modules (`model.attentions[2]`), and values to read and write (`layers_output[2]`)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from polytrace.errors import GraphError
from polytrace.lines import user_line
from polytrace.literals import scalar
from polytrace.modules import Module
from polytrace.points import DIMS, owners
from polytrace.ports import OpenPort
from polytrace.tree import NoSuchLayerError, NoSuchNameError

if TYPE_CHECKING:
    from polytrace.standard import StandardModel


class _Layered:
    """One name of a model."""

    def __init__(self, model: StandardModel, name: str, inside: str) -> None:
        """`inside`: what a layer calls it."""
        self._model, self._name, self._inside = model, name, inside

    def __len__(self) -> int:
        return len(self._layers)

    def __call__(self, layer: int) -> Any:
        """The same as an index."""
        return self[layer]

    def __getitem__(self, index: Any) -> Any:
        found = [self._get(number) for number in numbers_of(self, index)]
        return found if isinstance(index, slice) else found[0]

    def __iter__(self) -> Iterator[Any]:
        return (self._get(number) for number in range(len(self)))

    def __repr__(self) -> str:
        return "\n".join(self.lines())

    def refusals(self) -> list[str | None]:
        """Of each layer, why it has no such thing; None where it has."""
        return [self._refusal(layer._path) for layer in self._layers]

    def lines(self) -> Iterator[str]:
        """What it is, and which layers have no such thing."""
        refusals = self.refusals()
        if None in refusals:
            yield f"{self._name}[0-{len(self) - 1}]: {self._told()}"
        for refusal, numbers in _spans(refusals):
            if refusal is not None:
                yield f"{self._name}[{numbers}]: not here, {refusal}"

    @property
    def _layers(self) -> tuple[Module, ...]:
        """The same objects each time, which know their points."""
        layers: Module = self._model
        for name in self._model._table.standard["layers"].split("."):
            layers = getattr(layers, name)
        return layers._members

    def _get(self, number: int) -> Any:
        raise NotImplementedError

    def _refusal(self, layer: str) -> str | None:
        raise NotImplementedError

    def _told(self) -> str:
        raise NotImplementedError


class LayerModules(_Layered):
    """A module of each layer."""

    def _get(self, number: int) -> Module:
        layer = self._layers[number]._path
        refusal = self._refusal(layer)
        if refusal is not None:
            raise NoSuchNameError(f"there is no {self._name}[{number}]: {refusal}", where=user_line())
        return self._model.get_submodule(self._model._table.parts[layer, self._inside].path or "")

    def _refusal(self, layer: str) -> str | None:
        part = self._model._table.parts.get((layer, self._inside))
        return "nobody has told which module that is" if part is None else part.refusal

    def _told(self) -> str:
        parts = [self._model._table.parts.get((layer._path, self._inside)) for layer in self._layers]
        ways = sorted({p.path.removeprefix(f"{p.module}.") for p in parts if p is not None and p.path is not None})
        return f"modules, {' or '.join(ways)} of each layer" if ways else "modules"


class LayerValues(_Layered):
    """A value of each layer inside a trace: an index reads it, a slice reads a list; both are written by assignment."""

    def __setitem__(self, index: Any, value: Any) -> None:
        numbers = numbers_of(self, index)
        if not isinstance(index, slice):
            self._port(numbers[0]).write(value)
            return
        if not isinstance(value, (list, tuple)) or len(value) != len(numbers):
            told = f"a list of {len(value)}" if isinstance(value, (list, tuple)) else f"a {type(value).__name__}"
            raise GraphError(
                f"{self._name}[...] of {len(numbers)} layers takes a list with a value for each, not {told}",
                where=user_line(),
            )
        for number, own in zip(numbers, value, strict=True):
            self._port(number).write(own)

    def _get(self, number: int) -> Any:
        return self._port(number).read()

    def _port(self, number: int) -> OpenPort:
        return self._layers[number]._port(self._inside)

    def _refusal(self, layer: str) -> str | None:
        table = self._model._table
        owner = owners(table, layer).get(self._inside)
        info = table.points.get(owner, {}).get(self._inside) if owner is not None else None
        return f"nothing in it gives a {self._inside}" if owner is None else None if info is None else info.refusal

    def _told(self) -> str:
        return f"[{', '.join(DIMS[self._inside])}]"


def numbers_of(layered: _Layered, index: Any) -> list[int]:
    """The layers that an int, several, a slice or None (all) mean. Raises NoSuchLayerError."""
    total, index = len(layered), index.tolist() if hasattr(index, "tolist") else index
    if index is None or isinstance(index, slice):
        return list(range(total))[index or slice(None)]
    if isinstance(index, Iterable) and not isinstance(index, str) and scalar(index) is None:
        return [number for one in index for number in numbers_of(layered, one)]
    number = scalar(index)
    if not isinstance(number, int) or isinstance(number, bool):
        raise GraphError(f"layers are counted by integers, not by {index!r}", where=user_line())
    if not -total <= number < total:
        raise NoSuchLayerError(
            f"there is no {layered._name}[{number}]; this model has layers 0-{total - 1}", where=user_line()
        )
    return [number % total]


def _spans(values: Sequence[Any]) -> Iterator[tuple[Any, str]]:
    """Equal neighbours and their numbers, as `2` or `2-5`."""
    start = 0
    for value, members in groupby(values):
        stop = start + len(list(members))
        yield value, str(start) if stop - start == 1 else f"{start}-{stop - 1}"
        start = stop
