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
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from engine.bits import mark_of
from engine.call_axis import MIXED, SAME, Along, Content, Mixed, Place, Same, Total, alone
from engine.call_lookups import is_filling
from engine.call_rules import may_differ, rule_of
from engine.call_step import Step
from engine.recorder import memory_of, tensors_of
from engine.whole_manner import operation_by_operation

_LOOKING = frozenset({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape})
_LOOKING_FUNCTIONS = (  # that are no operations; compared with ==, because some are made anew each time
    *(Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.data_ptr, Tensor.untyped_storage, Tensor.storage),
    *(Tensor.__dlpack__, Tensor.__deepcopy__, Tensor.__reduce_ex__, Tensor.__repr__, Tensor.__format__),
    Tensor.data.__set__,  # type: ignore[attr-defined]
)
_OTHERS = "several calls run other operations than one"
_ALIKE = {"aten._unsafe_view.default": "aten.view.default"}  # the same but for what shares memory
_COPY = "aten.clone.default"


class UnprovenError(Exception):
    """Nothing can be said of any tensor of the call."""


@dataclass(frozen=True, slots=True)
class _Ran:
    """An operation that a call has run alone."""

    name: str  # with the overload
    numbers: Mapping[str, Any]  # arguments, without the tensors among them
    shapes: tuple[tuple[int, ...], ...]
    others: tuple[Any, ...]  # results that are no tensors
    strangers: Mapping[int, tuple[int, Tensor]]  # tensors that no operation made, by their place: `mark_of`, and itself


class Alone(TorchDispatchMode):
    """A call runs alone inside; what it runs is noted."""

    def __init__(self, kept: Iterable[Tensor]) -> None:
        """`kept`: the tensors that the model has."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.ran: list[_Ran] = []
        self._known = WeakTensorKeyDictionary()
        for tensor in kept:
            self.keep(tensor)

    def keep(self, tensor: Tensor) -> None:
        """A tensor of the model's that came later."""
        self._known[tensor] = True

    @contextmanager
    def running(self, given: Iterable[Tensor]) -> Iterator[None]:
        """The call runs inside; `given`: the tensors among its arguments."""
        for tensor in given:
            self.keep(tensor)
        with self, operation_by_operation():
            yield

    def __torch_dispatch__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        arguments = _named(function, args, kwargs)
        strangers: dict[int, tuple[int, Tensor]] = {}
        for place, tensor in enumerate(tensors_of(arguments)):
            if tensor not in self._known:
                strangers[place] = mark_of(tensor), tensor
                self.keep(tensor)
        made = function(*args, **kwargs)
        results = _results(made)
        tensors = [one for one in results if isinstance(one, Tensor)]
        for tensor in tensors:
            self.keep(tensor)
        self.ran.append(
            _Ran(
                name=str(function),
                numbers=_numbers(arguments),
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
        self._places = WeakTensorKeyDictionary()
        self._trusted = WeakTensorKeyDictionary()  # made by no operation, and not of what calls have
        self._trusting = 0  # depth of functions that get nothing of what calls have
        self._mixed: set[int] = set()  # memory of which nothing is known
        self._written: set[int] = set()  # memory that is not what it was made as
        self._told: set[int] = set()  # memory that the proof may go by
        self._models: set[int] = set()  # memory of the model itself
        self._refusal: str | None = None
        for tensor in kept:
            self.keep(tensor)
            if not tensor.is_meta:
                self._models.add(memory_of(tensor))

    def keep(self, tensor: Tensor) -> None:
        """A tensor of the model's, which may have come later."""
        self._put(tensor, SAME)

    @contextmanager
    def running(self, given: Iterable[Tensor]) -> Iterator[None]:
        """The calls run inside; `given`: the tensors among their arguments. UnprovenError where nothing can be told."""
        for tensor in given:
            content = Content.OWN if tensor.is_floating_point() or tensor.is_complex() else Content.ARGUMENT
            self._put(tensor, Along(0, 1, len(tensor) // self._calls, content))
        with self, Functions(self), operation_by_operation():
            yield
        if self._at != len(self._ran) and any(ran.name != _COPY for ran in self._ran[self._at :]):
            self.refuse(_OTHERS)
        if self._refusal is not None:  # code of the model may have caught the error
            raise UnprovenError(self._refusal)

    def refuse(self, reason: str) -> NoReturn:
        """Raises UnprovenError, now and at the end."""
        self._refusal = self._refusal or reason
        raise UnprovenError(reason)

    def place(self, tensor: Tensor) -> Place:
        """Where the calls lie in a tensor."""
        place = self._places.get(tensor)
        try:
            memory = memory_of(tensor)
        except NotImplementedError:  # it is one of another mode's
            return MIXED
        if place is None or memory in self._mixed:
            return MIXED
        return _rewritten(place) if memory in self._written else place

    def is_told(self, tensor: Tensor) -> bool:
        """Whether a tensor, or what shares memory with it, is what the proof may go by: nobody may write there."""
        memory = memory_of(tensor)
        return memory in self._told and memory not in self._written

    @contextmanager
    def trusting(self) -> Iterator[None]:
        """What is made inside without an operation is not made of what calls have."""
        self._trusting += 1
        try:
            yield
        finally:
            self._trusting -= 1

    def meet(self, tensor: Tensor, *, is_trusted: bool) -> None:
        """What a function gave, if no operation has made it."""
        if self._places.get(tensor) is None:
            if is_trusted:
                self._trusted[tensor] = True
            else:
                self._put(tensor, MIXED)

    def _put(self, tensor: Tensor, place: Place) -> None:
        self._places[tensor] = place
        if isinstance(place, Along) and place.content is not Content.OWN:
            self._told.add(memory_of(tensor))

    def __torch_dispatch__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        arguments = _named(function, args, kwargs)
        given = list(tensors_of(arguments))
        ran = self._next(str(function))
        if ran is not None:
            self._greet(given, ran)
        self._look(function, arguments, given)
        memories = {memory_of(tensor) for tensor in given}
        written = [one for name in _written(function) for one in tensors_of(arguments[name])]
        if any(memory_of(tensor) in self._models for tensor in written):
            self.refuse("a call changes what the model keeps")
        before = {id(tensor): self.place(tensor) for tensor in given}  # as they are when it runs
        made = function(*args, **kwargs)
        results = _results(made)
        tensors = [one for one in results if isinstance(one, Tensor)]
        if ran is None:  # a copy that one call alone does not need
            ran = _copied(arguments, alone(given[0].shape, before[id(given[0])], self._calls))
        others = [one for one in results if not isinstance(one, Tensor)]
        if len(tensors) != len(ran.shapes) or others != [*ran.others]:
            self.refuse(_OTHERS)
        name = function.overloadpacket.__name__ if function.namespace == "aten" else str(function)
        for tensor, shape in zip(tensors, ran.shapes, strict=True):
            step = Step(
                name=name,
                arguments=arguments,
                out=tensor,
                alone=shape,
                numbers=ran.numbers,
                calls=self._calls,
                place=lambda one: before.get(id(one), MIXED),
            )
            found = self._found(step, function.tags)
            if any(one is tensor for one in written):
                self._write(tensor, before[id(tensor)], found)
                continue
            memory = memory_of(tensor)
            if memory not in memories:  # what was there before is gone
                for known in (self._mixed, self._written, self._told):
                    known.discard(memory)
            self._put(tensor, found)
        for tensor in written:
            if not any(one is tensor for one in tensors):
                self._mixed.add(memory_of(tensor))
        return made

    def _next(self, name: str) -> _Ran | None:
        """The same operation of the call alone; None of a copy that it did not need, as of a batch of one."""
        while name != _COPY and self._at < len(self._ran) and self._ran[self._at].name == _COPY:
            self._at += 1  # a copy that only one alone needed
        ran = self._ran[self._at] if self._at < len(self._ran) else None
        if ran is not None and _ALIKE.get(ran.name, ran.name) == _ALIKE.get(name, name):
            self._at += 1
            return ran
        if name != _COPY:
            self.refuse(_OTHERS)
        return None

    def _greet(self, given: Sequence[Tensor], ran: _Ran) -> None:
        """Tensors that no operation has had: the same for all where these are, and not made of what calls have."""
        for place, tensor in enumerate(given):
            if self._places.get(tensor) is None:
                mark, own = ran.strangers.get(place, (None, None))
                is_trusted = tensor is own or self._trusting > 0 or tensor in self._trusted
                self._put(tensor, SAME if is_trusted and mark_of(tensor) == mark else MIXED)

    def _look(self, function: Any, arguments: Mapping[str, Any], given: Sequence[Tensor]) -> None:
        """Refuses where code comes to know what calls have."""
        looks = function.namespace != "aten" or not _LOOKING.isdisjoint(function.tags)  # others do whatever they do
        if "indices" in arguments and function.overloadpacket.__name__ in ("index", "index_put", "index_put_"):
            is_by_mask = any(at is not None and at.dtype in (torch.bool, torch.uint8) for at in arguments["indices"])
            looks = is_by_mask and not is_filling(arguments)
        if looks and any(not isinstance(self.place(tensor), Same) for tensor in given):
            self.refuse(f"{function} looks at what calls have")

    def _found(self, step: Step, tags: Any) -> Place:
        names = may_differ(step)
        for name, value in _numbers(step.arguments).items():
            if name not in names and not _is_same(value, step.numbers[name]):
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


class Functions(TorchFunctionMode):
    """Around a run of several calls: finds code that looks at them, or makes tensors of them, without an operation."""

    def __init__(self, together: Together) -> None:
        super().__init__()
        self._together = together

    def __torch_function__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        is_of_calls = self._is_of_calls([args, kwargs])
        if is_of_calls and self._looks(function, args, kwargs):
            self._together.refuse(f"{getattr(function, '__name__', function)} looks at what calls have")
        is_trusted = not is_of_calls or self._makes_nothing_of_them(function, args)
        with self._together.trusting() if is_trusted else nullcontext():
            made = function(*args, **kwargs)
        for tensor in tensors_of(made):
            self._together.meet(tensor, is_trusted=not is_of_calls)
        return made

    def _is_of_calls(self, values: Any) -> bool:
        """Whether there are tensors of which it is not known that they are the same for all; meta ones have nothing."""
        with_data = (tensor for tensor in tensors_of(values) if not tensor.is_meta)
        return any(not isinstance(self._together.place(tensor), Same) for tensor in with_data)

    def _looks(self, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        if function in (torch.tensor_split, Tensor.tensor_split):
            return self._is_of_calls([args[1:], kwargs])
        return any(function == one for one in _LOOKING_FUNCTIONS)

    def _makes_nothing_of_them(self, function: Any, args: Sequence[Any]) -> bool:
        """Whether a tensor that it makes of numbers that it gets is not made of the calls' tensors beside them."""
        if function is Tensor.new_tensor:
            return not self._is_of_calls(args[1:])
        if function in (Tensor.__getitem__, Tensor.__setitem__):
            at = args[1] if isinstance(args[1], tuple) else (args[1],)
            return not self._is_of_calls([one for one in (*at, *args[2:]) if not isinstance(one, Tensor)])
        return False


def _copied(arguments: Mapping[str, Any], shape: tuple[int, ...] | None) -> _Ran:
    return _Ran(name=_COPY, numbers=_numbers(arguments), shapes=(shape or (),), others=(), strangers={})


def _rewritten(place: Place) -> Place:
    """Of a tensor that was written to."""
    if not isinstance(place, Along):
        return place
    return MIXED if place.content is Content.COUNT else place.of(Content.OWN)


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


def _numbers(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments without the tensors among them; of lists with tensors how many these have."""
    return {name: _without_tensors(value) for name, value in arguments.items()}


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
