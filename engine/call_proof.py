"""Proof that calls which run as one do not depend on each other: where the calls lie in every tensor of the model.

A call runs alone and then as several, as the model is. Each operation of torch has to be the same in both, but for the
number of calls in its sizes, and a rule (`engine.call_rules`) says where it leaves the calls. What no rule is about is
mixed from there on. So for every site it is known whether each call has its own rows there, whatever calls are given:
the operations that run are those that ran here, since no code may look at what calls have. Where it does (`if x.max() >
9`, `x[mask]`, `x.tolist()`) nothing is proven.

The idea of following a dimension through operations is that of batching rules (`torch.vmap`, JAX): these make a
function of one example one of many, while here a function of many is shown to be one of each.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from engine.bits import mark_of
from engine.call_axis import MIXED, SAME, Along, Content, Mixed, Place, Same, Total, alone
from engine.call_rules import Step, may_differ, rule_of, tensors_of
from engine.recorder import memory_of
from engine.whole_manner import operation_by_operation

_LOOKING = frozenset({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape})
_LOOKING_FUNCTIONS = frozenset(
    {
        *(Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.data_ptr, Tensor.untyped_storage, Tensor.storage),
        *(Tensor.__dlpack__, Tensor.__deepcopy__, Tensor.__reduce_ex__),
    }
)
_OTHERS = "several calls run other operations than one"
_MARK = "_polytrace_place"


class UnprovenError(Exception):
    """Nothing can be said of any tensor of the call."""


@dataclass(frozen=True, slots=True)
class _Ran:
    """An operation that a call has run alone."""

    name: str  # with the overload
    plain: tuple[tuple[str, Any], ...]  # arguments that are no tensors
    shapes: tuple[tuple[int, ...], ...]
    others: tuple[Any, ...]  # results that are no tensors
    strangers: Mapping[int, int]  # tensors that nobody knows: their place among its tensors -> `mark_of`


class _Known:
    """Places of tensors, in one run. They are kept at the tensors, which need not be held for it."""

    def __init__(self, kept: Iterable[Tensor]) -> None:
        """`kept`: the tensors that the model has."""
        self._run = object()
        self._kept = {id(tensor) for tensor in kept}

    def of(self, tensor: Tensor) -> Place | None:
        """None of one that nobody has seen."""
        mark = getattr(tensor, _MARK, None)
        if mark is not None and mark[0] is self._run:
            place: Place = mark[1]
            return place
        return SAME if id(tensor) in self._kept else None

    def put(self, tensor: Tensor, place: Place) -> None:
        setattr(tensor, _MARK, (self._run, place))


class Alone(TorchDispatchMode):
    """A call runs alone inside; what it runs is noted."""

    def __init__(self, kept: Iterable[Tensor]) -> None:
        """`kept`: the tensors that the model has."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.ran: list[_Ran] = []
        self._known = _Known(kept)

    @contextmanager
    def running(self, given: Iterable[Tensor]) -> Iterator[None]:
        """The call runs inside; `given`: the tensors among its arguments."""
        for tensor in given:
            self._known.put(tensor, SAME)
        with self, operation_by_operation():
            yield

    def __torch_dispatch__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        arguments = _named(function, args, kwargs)
        strangers: dict[int, int] = {}
        for place, tensor in enumerate(tensors_of(arguments)):
            if self._known.of(tensor) is None:
                strangers[place] = mark_of(tensor)
                self._known.put(tensor, SAME)
        made = function(*args, **kwargs)
        results = _results(made)
        tensors = [one for one in results if isinstance(one, Tensor)]
        for tensor in tensors:
            self._known.put(tensor, SAME)
        self.ran.append(
            _Ran(
                name=str(function),
                plain=_plain(arguments),
                shapes=tuple([tuple(one.shape) for one in tensors]),
                others=tuple([one for one in results if not isinstance(one, Tensor)]),
                strangers=strangers,
            )
        )
        return made


class Together(TorchDispatchMode):
    """The same call runs inside as several, and every tensor has a place."""

    def __init__(self, calls: int, ran: Sequence[_Ran], kept: Iterable[Tensor]) -> None:
        """`ran`: what a call has run alone; `kept`: the tensors that the model has."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._calls, self._ran, self._at = calls, ran, 0
        self._known = _Known(kept)
        self._mixed: set[int] = set()  # memory of which nothing is known
        self._written: set[int] = set()  # memory that is not what it was made as

    @contextmanager
    def running(self, given: Iterable[Tensor]) -> Iterator[None]:
        """The calls run inside; `given`: the tensors among their arguments. UnprovenError where nothing can be told."""
        for tensor in given:
            content = Content.OWN if tensor.is_floating_point() or tensor.is_complex() else Content.ARGUMENT
            self._known.put(tensor, Along(0, 1, len(tensor) // self._calls, content))
        with self, _Looking(self), operation_by_operation():
            yield
        if self._at != len(self._ran):
            raise UnprovenError(_OTHERS)

    def place(self, tensor: Tensor) -> Place:
        """Where the calls lie in a tensor."""
        place = self._known.of(tensor)
        memory = memory_of(tensor)
        if place is None or memory in self._mixed:
            return MIXED
        if memory in self._written and isinstance(place, Along) and place.content is not Content.OWN:
            return MIXED if place.content is Content.COUNT else place.of(Content.OWN)
        return place

    def is_of_calls(self, tensor: Tensor) -> bool:
        """Whether what calls have may be in a tensor. One that no operation has had is not made of any other."""
        is_known = self._known.of(tensor) is not None or memory_of(tensor) in self._mixed
        return is_known and not isinstance(self.place(tensor), Same)

    def __torch_dispatch__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        arguments = _named(function, args, kwargs)
        ran = self._ran[self._at] if self._at < len(self._ran) else None
        if ran is None or ran.name != str(function):
            raise UnprovenError(_OTHERS)
        self._at += 1
        given = list(tensors_of(arguments))
        for place, tensor in enumerate(given):
            if self._known.of(tensor) is None:
                self._known.put(tensor, SAME if mark_of(tensor) == ran.strangers.get(place) else MIXED)
        self._look(function, arguments, given)
        memories = {memory_of(tensor) for tensor in given}
        written = [one for name in _written(function) for one in tensors_of(arguments[name])]
        places = [self.place(tensor) for tensor in written]
        before = {id(tensor): self.place(tensor) for tensor in given}  # as they are when it runs
        made = function(*args, **kwargs)
        results = _results(made)
        tensors = [one for one in results if isinstance(one, Tensor)]
        if len(tensors) != len(ran.shapes) or [one for one in results if not isinstance(one, Tensor)] != [*ran.others]:
            raise UnprovenError(_OTHERS)
        name = function.overloadpacket.__name__ if function.namespace == "aten" else str(function)
        for tensor, shape in zip(tensors, ran.shapes, strict=True):
            found = self._found(
                Step(
                    name=name,
                    arguments=arguments,
                    out=tensor,
                    alone=shape,
                    numbers=dict(ran.plain),
                    calls=self._calls,
                    place=lambda one: before.get(id(one), MIXED),
                ),
                ran,
                function.tags,
            )
            is_written = [one is tensor for one in written]
            if any(is_written):
                self._write(tensor, places[is_written.index(True)], found)
                continue
            if memory_of(tensor) not in memories:  # what was there before is gone
                self._mixed.discard(memory_of(tensor))
                self._written.discard(memory_of(tensor))
            self._known.put(tensor, found)
        for tensor in written:
            if not any(one is tensor for one in tensors):
                self._mixed.add(memory_of(tensor))
        return made

    def _look(self, function: Any, arguments: Mapping[str, Any], given: Sequence[Tensor]) -> None:
        """UnprovenError where code comes to know what calls have."""
        looks = function.namespace != "aten" or not _LOOKING.isdisjoint(function.tags)  # others do whatever they do
        if "indices" in arguments and str(function).startswith(("aten.index.", "aten.index_put")):
            looks = any(at is not None and at.dtype in (torch.bool, torch.uint8) for at in arguments["indices"])
        if looks and any(not isinstance(self.place(tensor), Same) for tensor in given):
            raise UnprovenError(f"{function} looks at what calls have")

    def _found(self, step: Step, ran: _Ran, tags: Any) -> Place:
        names = may_differ(step)
        for (name, value), (_, own) in zip(_plain(step.arguments), ran.plain, strict=True):
            if name not in names and not _is_same(value, own):
                return MIXED  # a number that follows from how many calls there are
        places = [step.place(tensor) for tensor in step.tensors]
        if any(isinstance(place, Mixed) or (isinstance(place, Total) and step.name != "eq") for place in places):
            return MIXED
        place = rule_of(step.name, tags)(step)
        return place if alone(step.out.shape, place, self._calls) == step.alone else MIXED

    def _write(self, tensor: Tensor, had: Place, found: Place) -> None:
        """A tensor, which others may see a part of, has been written to."""
        memory = memory_of(tensor)
        if isinstance(had, Along) and isinstance(found, Along) and had.is_at(found):
            if not had.content is found.content is Content.SAME:
                self._written.add(memory)
        elif not (isinstance(had, Same) and isinstance(found, Same)):
            self._mixed.add(memory)


class _Looking(TorchFunctionMode):
    """Around a run of several calls: finds code that looks at them without an operation."""

    def __init__(self, together: Together) -> None:
        super().__init__()
        self.together = together

    def __torch_function__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in _LOOKING_FUNCTIONS and self.together.is_of_calls(args[0]):
            raise UnprovenError(f"{getattr(function, '__name__', function)} looks at what calls have")
        return function(*args, **kwargs)


def _named(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of an operation by the names of its schema, also those that are not given."""
    named: dict[str, Any] = {}
    for place, argument in enumerate(function._schema.arguments):
        if place < len(args):
            named[argument.name] = args[place]
        else:
            named[argument.name] = kwargs.get(argument.name, argument.default_value)
    return named


def _written(function: Any) -> Iterator[str]:
    for argument in function._schema.arguments:
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield argument.name


def _plain(arguments: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """Arguments that are no tensors; of lists with tensors how many these have."""
    return tuple([(name, _without_tensors(value)) for name, value in arguments.items()])


def _without_tensors(value: Any) -> Any:
    if isinstance(value, Tensor):
        return "a tensor"
    if isinstance(value, (list, tuple)):
        return tuple(map(_without_tensors, value))
    return value


def _is_same(value: Any, other: Any) -> bool:
    return type(value) is type(other) and bool(value == other or (value != value and other != other))


def _results(made: Any) -> list[Any]:
    return [part for one in made for part in _results(one)] if isinstance(made, (tuple, list)) else [made]
