"""One call on its way through the unmodified model: hooks where it is visited, and its end behind the last visit.

Knows nothing of graphs: who waits at a visit says what goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from engine.arguments import Arguments
from engine.leaves import first_argument
from engine.lockstep import stop
from engine.stage import replace_first_argument
from engine.whole_manner import layer_by_layer
from engine.whole_places import let_go
from engine.whole_tape import NoGradientError, WholeTape
from polytrace.graph import Port

Key = tuple[str, Port, int]  # module, port, visit
Visits = dict[Key, int]  # -> order, of one invoke


@dataclass(slots=True)
class WholeCall:
    """One call on its way."""

    visits: Visits
    come: Callable[[int, Any], Any] = stop  # gives what goes on of what a visit has
    kept: Collection[int] = ()  # memory of the model itself, where something is written in place
    counts: dict[tuple[str, Port], int] = field(default_factory=dict)  # of visits so far
    num_left: int = 0
    tape: WholeTape | None = None  # where its gradient is asked for
    is_graded: bool = False  # the model has gradients on by itself, at this visit
    is_changed: bool = False  # somebody has written to it

    def __post_init__(self) -> None:
        self.num_left = len(self.visits)

    def visit(self, path: str, port: Port, value: Any) -> Any:
        """What goes on of a side of a module; raises where nothing behind it is needed."""
        number = self.counts.get((path, port), 0)
        self.counts[path, port] = number + 1
        order = self.visits.get((path, port, number))
        if order is None:
            return value
        self.is_graded = self.tape is None and torch.is_grad_enabled()
        after = self.come(order, value)
        if self.tape is not None:
            self.is_changed = self.is_changed or after is not value
            after = self.tape.cut(order, value, after)
        self.num_left -= 1
        if not self.num_left:
            raise Enough
        return after

    @contextmanager
    def recording(self) -> Iterator[None]:
        """How the model is run."""
        with layer_by_layer():
            if self.tape is None:
                with torch.no_grad():
                    yield
            else:
                with self.tape.recording(), _OwnGradients(self, self.tape):
                    yield

    def changing(self, tensor: Tensor) -> None:
        """Somebody writes to a tensor in place."""
        self.is_changed = True
        if self.tape is not None:
            self.tape.saved.protect([tensor])


class _OwnGradients(TorchFunctionMode):
    """A model that takes gradients inside its own forward gets none that lack something: of what comes through a place
    where the tape is cut or somebody wrote, and gradients of gradients, for which a tape keeps nothing.
    """

    def __init__(self, call: WholeCall, tape: WholeTape) -> None:
        super().__init__()
        self._call, self._tape = call, tape

    def __torch_function__(
        self,
        function: Any,
        _types: Collection[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if function in _BACKWARDS and _going.get() is self._call:  # not what requests work out at a visit
            is_cut = self._call.is_changed or bool(self._tape.leaves)
            if is_cut or kwargs.get("create_graph"):
                raise NoGradientError(self._tape.first, _OWN_GRADIENTS)
        return function(*args, **kwargs)


_BACKWARDS = (torch.autograd.grad, torch.autograd.backward, Tensor.backward)
_OWN_GRADIENTS = (
    "this model takes gradients inside its own forward, which no gradient can be told through: ask for none of what "
    "comes before it has done so"
)


class Enough(BaseException):
    """Ends a call early: there is nothing left to do. Code of models that catches every Exception lets it through."""


_going: ContextVar[WholeCall | None] = ContextVar("whole_call", default=None)


@contextmanager
def current(call: WholeCall | None) -> Iterator[None]:
    token = _going.set(call)
    try:
        yield
    finally:
        _going.reset(token)


def alone(meet: Callable[[int, Mapping[int, Any]], dict[int, Any]], order: int, value: Any) -> Any:
    with current(None):
        return meet(order, {0: value})[0]


@contextmanager
def hooked(model: nn.Module, call: WholeCall) -> Iterator[None]:
    """Hooks on the modules that a call is visited at; they are about that call alone."""

    def before(path: str, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if _going.get() is not call:
            return None
        first = first_argument(args, kwargs)
        after = call.visit(path, Port.INPUT, first)
        given = Arguments(args, kwargs) if after is first else Arguments(*replace_first_argument(args, kwargs, after))
        given = call.visit(path, Port.INPUTS, given)
        return given.args, dict(given.kwargs)

    def behind(path: str, _module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        return call.visit(path, Port.OUTPUT, output) if _going.get() is call else None

    ports: dict[str, set[bool]] = {}
    for path, port, _ in call.visits:
        ports.setdefault(path, set()).add(port is Port.OUTPUT)
    with ExitStack() as hooks:
        hooks.callback(let_go, model)
        for path, sides in ports.items():
            module = model.get_submodule(path)
            if False in sides:
                handle = module.register_forward_pre_hook(partial(before, path), with_kwargs=True)
                hooks.callback(handle.remove)
            if True in sides:
                hooks.callback(module.register_forward_hook(partial(behind, path)).remove)
        yield
