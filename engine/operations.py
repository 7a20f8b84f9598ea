"""Visits the operations of modules: calls in their forwards, and in the model's own functions that these call.

Owns how a rewritten forward (`engine.rewriting`) is put on a module for a while, and taken off again: on that instance
only, so that whatever else runs is the unmodified code. Knows nothing of requests; `engine.stage` brings visitors, and
`watch_operations` tells of every operation that a forward comes to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import FunctionType, MethodType
from typing import Any, NamedTuple

from torch import Tensor, nn

from engine.attention import packed_attention
from engine.rewriting import CannotRewrite, Hook, Rewriting, rewriting_of, substituted, written_function
from polytrace.graph import Port
from polytrace.sources import WORD, operation_path

_MAX_DEPTH = 4  # of functions inside of functions
_NOT_THE_MODELS = frozenset(
    {"torch", "engine", "polytrace", "accelerate", "einops", "functools", "warnings", "logging"}
)

# Told of an operation's path, its side, the value there and what is called.
Watch = Callable[[str, Port, Any, Any], None]
Visitor = Callable[[Any], Any]


class CallArguments(NamedTuple):
    """What an operation is called with: the value of its `inputs`."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


@dataclass(slots=True)
class Stops:
    """What to stop at in one operation."""

    inputs: list[Visitor] = field(default_factory=list)
    outputs: list[Visitor] = field(default_factory=list)
    inside: dict[str, Stops] = field(default_factory=dict)  # by name, of what it calls

    def add(self, way: str, port: Port, visitor: Visitor) -> None:
        """A visitor of an operation at a way inside of this one's source."""
        name, _, rest = way.partition(f".{WORD}.")
        stops = self.inside.setdefault(name, Stops())
        if rest:
            stops.add(rest, port, visitor)
        else:
            (stops.inputs if port is Port.INPUTS else stops.outputs).append(visitor)

    def hook(self) -> Hook:
        """What the calls of a function pass through. Those that nobody stops at run as they are."""

        def hook(name: str, called: Any) -> Any:
            stops = self.inside.get(name)
            return called if stops is None else stops.around(called)

        return hook

    def around(self, called: Any) -> Callable[..., Any]:
        """What is called in the place of an operation's function."""

        def call(*args: Any, **kwargs: Any) -> Any:
            given = CallArguments(args, kwargs)
            for visitor in self.inputs:
                given = visitor(given)
            value = self._inner(called)(*given.args, **given.kwargs)
            for visitor in self.outputs:
                value = visitor(value)
            return value

        return call

    def _inner(self, called: Any) -> Any:
        if not self.inside:
            return called
        rewriting = rewriting_inside(called)
        assert rewriting is not None, "probing has rewritten it"
        return substituted(called, rewriting.function, rewriting.bind(self.hook()))


def rewriting_inside(called: Any) -> Rewriting | None:
    """What an operation calls, when that is a function of the model's own that can be rewritten."""
    if not isinstance(called, (FunctionType, MethodType)):
        return None
    if called.__module__ is None or called.__module__.partition(".")[0] in _NOT_THE_MODELS:
        return None
    try:
        rewriting = rewriting_of(written_function(called))
    except CannotRewrite:
        return None
    function = rewriting.function
    return rewriting if substituted(called, function, function) is not None else None


def why_closed(called: Any) -> str | None:
    """Why what an operation calls has no source to be visited, where there is more to say than that it has none."""
    if called is packed_attention:
        points = ", ".join(port.value for port in Port if port.is_inner)
        return f"rows attend in a function of the engine's own; the attention module has the points {points}"
    return None


def forward_of(module: nn.Module) -> Rewriting:
    """A module's forward, as its class has it. Raises CannotRewrite."""
    rewriting = rewriting_of(written_function(type(module).forward))
    if rewriting.function is nn.Module.forward:
        raise CannotRewrite(f"{type(module).__name__} has no forward")
    return rewriting


def is_own_forward(module: nn.Module) -> bool:
    """Whether the forward of its class is what runs in a module; ranks share some modules by another one."""
    function = forward_of(module).function
    return substituted(module.forward, function, function) is not None


@contextmanager
def rewritten(module: nn.Module, hook: Hook) -> Iterator[Rewriting]:
    """The module runs with a hook around the calls of its forward. Raises CannotRewrite before anything is changed."""
    rewriting = forward_of(module)
    made = substituted(module.forward, rewriting.function, rewriting.bind(hook))
    if made is None:
        raise CannotRewrite(f"what runs in {type(module).__name__} is not the forward of its class")
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = made
    try:
        yield rewriting
    finally:
        if before is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = before


@contextmanager
def watch_operations(modules: Mapping[str, nn.Module], watch: Watch) -> Iterator[dict[str, str]]:
    """Forwards inside tell of every operation of these modules; yields why some cannot be visited, by path."""
    refusals: dict[str, str] = {}
    with ExitStack() as stack:
        for path, module in modules.items():
            try:
                stack.enter_context(rewritten(module, _telling(path, watch, _MAX_DEPTH)))
            except CannotRewrite as error:
                refusals[path] = str(error)
        yield refusals


def _telling(path: str, watch: Watch, depth: int) -> Hook:
    def hook(name: str, called: Any) -> Any:
        own = operation_path(path, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            watch(own, Port.INPUTS, CallArguments(args, kwargs), called)
            rewriting = rewriting_inside(called) if depth > 1 else None
            if rewriting is None:
                value = called(*args, **kwargs)
            else:
                inner = rewriting.bind(_telling(own, watch, depth - 1))
                value = substituted(called, rewriting.function, inner)(*args, **kwargs)
            watch(own, Port.OUTPUT, value, called)
            return value

        return call

    return hook


def argument_leaves(value: CallArguments) -> dict[tuple[int | str, ...], Tensor]:
    """The tensors among a call's arguments, and in tuples, lists and dicts among these."""
    found: dict[tuple[int | str, ...], Tensor] = {}
    sides: tuple[Iterable[tuple[int | str, Any]], ...] = (enumerate(value.args), value.kwargs.items())
    for place, members in enumerate(sides):
        for key, member in members:
            if isinstance(member, Tensor):
                found[place, key] = member
            else:
                found.update(((place, key, name), leaf) for name, leaf in _members(member) if isinstance(leaf, Tensor))
    return found


def _members(value: Any) -> Iterable[tuple[int | str, Any]]:
    if isinstance(value, Mapping):
        return value.items()
    return enumerate(value) if isinstance(value, (tuple, list)) else ()
