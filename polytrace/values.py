"""What every recorded value can do, whatever it is made of (`tensor_values`, `array_values`).

Owns the refusals: Python code that needs a number now cannot have it, and each such message says what to write instead.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

from polytrace.certificate import ValueShape
from polytrace.errors import GraphError
from polytrace.graph import Op
from polytrace.historic import historic_arguments
from polytrace.lines import user_line
from polytrace.literals import first_int
from polytrace.ops import OPS, Results
from polytrace.positions import position_index
from polytrace.storage import Several, State, is_recorded, recorded_in, state_of


class Pair(NamedTuple):
    """What `max(dim)`, `topk`, `sort` return."""

    values: Any
    indices: Any


class Recorded:
    """A value of a trace: read from the model or computed from what was. Its data exists only at the service."""

    __slots__ = ()
    polytrace_value = True

    # what a trace adds to a tensor

    def save(self) -> Any:
        """Marks the value to be returned when the block ends; returns itself."""
        state = state_of(self)
        state.recording.save(state, self)
        return self

    def at(self, position: int | Sequence[int]) -> Any:
        """The rows at one or several token positions, counted in each prompt; negative from its end.

        `[sequences, *tail]` for an int, `[sequences, len(position), *tail]` for a list. In-place code on it reaches the
        value. Raises GraphError when a prompt is shorter, or the value has no `[sequences, tokens]` of one invoke.
        """
        state = state_of(self)
        session = state.recording.session
        invoke = state.recording.invoke_of(state)
        if invoke is None:
            raise GraphError(
                "positions are counted in prompts, and this value has no prompts of its own", where=user_line()
            )
        if state.recording.is_of_pairs(state):
            raise GraphError(
                "scores and patterns have their queries and keys in columns of the left-padded view: index them, as in "
                "value[:, :, -1] for the last token's",
                where=user_line(),
            )
        lengths = session.lengths_of(invoke)
        shape = shape_of(self).shape
        if shape[:2] != (len(lengths), max(lengths)):
            raise GraphError(
                f"positions are counted in values of shape [sequences, tokens, ...] = {[len(lengths), max(lengths)]}; "
                f"this one is {list(shape)}",
                where=user_line(),
            )
        return session.wrap(state.recording.at(state, position_index(lengths, position)))

    # indexing

    def __getitem__(self, index: Any) -> Any:
        state = state_of(self)
        if state.is_dropout_input and first_int(index) is not None:
            return historic_arguments(state, index)
        if state.is_layer_output or state.is_hidden_states:
            number = first_int(index)
            if number is not None:
                return _hidden_states(state, index, number)
        made = state.recording.op("getitem", (self, index), {})
        assert isinstance(made, State)
        return state.recording.session.wrap(made)

    def __setitem__(self, index: Any, value: Any) -> None:
        state = state_of(self)
        if state.is_dropout_input and first_int(index) is not None:
            historic_arguments(state, (index,))  # raises
        number = first_int(index) if state.is_layer_output or state.is_hidden_states else None
        if number is not None:
            _hidden_states(state, index, number)  # raises for all but the literal 0
            place = state.storage.place
            assert place is not None
            state.recording.write_edge(place.site, place.invoke, value)
        else:
            state.recording.set_item(state, index, value)

    def __iter__(self) -> Iterator[Any]:
        if state_of(self).is_layer_output:
            raise GraphError(
                "a decoder layer's output is its hidden states alone here, not a tuple to unpack: write `.output[0]`",
                where=user_line(),
            )
        return iter(record("unbind", (self,), {}))

    # what Python cannot have yet

    def __bool__(self) -> NoReturn:
        _refuse(
            "a recorded value has no data yet, so `if`, `while`, `and`, `or`, `not` and `in` cannot look at it: "
            "write torch.where(condition, a, b), or save it and decide after the block"
        )

    def __contains__(self, item: Any) -> NoReturn:
        _refuse("`in` cannot look into a recorded value: save it and look after the block")

    def __float__(self) -> NoReturn:
        _refuse_number("float()")

    def __int__(self) -> NoReturn:
        _refuse_number("int()")

    def __index__(self) -> NoReturn:
        _refuse_number("an index or a range")

    def __complex__(self) -> NoReturn:
        _refuse_number("complex()")

    def item(self) -> NoReturn:
        _refuse_number(".item()")

    def tolist(self) -> NoReturn:
        _refuse_number(".tolist()")

    def numpy(self, *args: Any, **kwargs: Any) -> NoReturn:
        _refuse_number(".numpy()")

    def __array__(self, *args: Any, **kwargs: Any) -> NoReturn:
        refuse_client_change("numpy")

    def backward(self, *args: Any, **kwargs: Any) -> NoReturn:
        _refuse("gradients are not part of polytrace yet")

    def __hash__(self) -> int:
        return id(self)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        _refuse("a recorded value cannot be copied or pickled: save it first")

    def __deepcopy__(self, memo: Any) -> NoReturn:
        _refuse("a recorded value cannot be copied with Python's copy: write .clone()")

    # what can be said of it now

    @property
    def dims(self) -> tuple[str, ...] | None:
        """Names of the dimensions of a value as it was read at a named point; None of what was computed."""
        return state_of(self).dims

    def __len__(self) -> int:
        shape = shape_of(self).shape
        if not shape:
            raise TypeError("len() of a 0-d tensor")
        return shape[0]

    def dim(self) -> int:
        return len(shape_of(self).shape)

    def numel(self) -> int:
        return math.prod(shape_of(self).shape)

    def __repr__(self, **kwargs: Any) -> str:
        state = state_of(self)
        return f"<recorded value: {describe(state)}>"

    def __format__(self, spec: str) -> str:
        return repr(self)


def shape_of(value: Any) -> ValueShape:
    """Shape and dtype of a recorded value."""
    state = state_of(value)
    return state.recording.session.shape_of(state.recording.node_of(state))


def describe(state: State) -> str:
    """What a value is, in a few words, without asking anyone."""
    node = state.recording.nodes[state.node]
    if isinstance(node, Op):
        return f"{node.name}, {node.where}"
    what = getattr(node, "site", None) or getattr(node, "path", None) or getattr(node, "module", None)
    return f"{what or type(node).__name__.lower()}, {node.where}"


def record(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """A call of the op table on values as the user wrote them: one value, a Pair or a tuple of values."""
    first = args[0] if args else None
    found = state_of(first) if is_recorded(first) else next(recorded_in((tuple(args), tuple(kwargs.values()))), None)
    assert found is not None, "an op is recorded on a recorded value"
    is_list = name in OPS and OPS[name].results is Results.LIST
    made = found.recording.op(name, args, kwargs, _count(name, args, kwargs) if is_list else 2)
    wrap = found.recording.session.wrap
    if not isinstance(made, Several):
        return wrap(made)
    values = tuple(wrap(part) for part in made.states)
    return values if is_list else Pair(*values)


def record_in_place(name: str, base: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """`base.name_(*args)`: the value gets its new content. Returns `base` itself."""
    if not is_recorded(base):
        refuse_client_change("in-place code")
    state = state_of(base)
    if name in ("fill", "zero", "copy"):
        state.recording.set_item(state, Ellipsis, args[0] if args else 0)
        return base
    made = state.recording.op(name, (base, *args), kwargs)
    if isinstance(made, Several):
        raise GraphError(f"{name} returns several values and has no in-place form", where=user_line())
    state.recording.replace(state, made)
    return base


def refuse_client_change(how: str) -> NoReturn:
    """A tensor or array of the user's own would have to change by a value that does not exist yet."""
    _refuse(
        f"a recorded value has no data yet, so {how} cannot put it into a tensor or array of yours: collect saved "
        "values in a list (`results.append(value.save())`) and torch.stack(results) after the block"
    )


def _count(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """How many values unbind, split or chunk return, from the shape of their argument."""
    rest = list(args[1:])
    size = kwargs.get("split_size", kwargs.get("split_size_or_sections", kwargs.get("chunks")))
    if name != "unbind" and size is None:
        size = rest.pop(0) if rest else None
    dim = kwargs.get("dim", rest[0] if rest else 0)
    shape = shape_of(args[0]).shape
    if not isinstance(dim, int) or not -len(shape) <= dim < len(shape):
        raise GraphError(f"{name} has no dimension {dim!r} in a value of shape {list(shape)}", where=user_line())
    length = shape[dim]
    if name == "unbind":
        return length
    if isinstance(size, (list, tuple)):
        return len(size)
    if not isinstance(size, int) or size < 1:
        raise GraphError(f"{name} needs a size or a number of parts, not {size!r}", where=user_line())
    part = size if name == "split" else max(1, math.ceil(length / size))
    return max(1, math.ceil(length / part))


def _hidden_states(state: State, index: Any, number: int) -> Any:
    """`output[0]` of a decoder layer; every other integer there would mean something else to every reader."""
    if state.is_layer_output and number == 0 and not isinstance(index, tuple):
        alias = state.recording.alias(state)
        alias.is_hidden_states = True
        return state.recording.session.wrap(alias)
    name = "output" if state.is_layer_output else "output[0]"
    raise GraphError(
        f"`{name}[{number}]` means different things on a decoder layer, whose output was a tuple once and is a tensor "
        f"[sequences, tokens, hidden] now: write `{name}[i:i+1]` for sequence i, `{name}[:, -1]` for the last token",
        where=user_line(),
    )


def _refuse(message: str) -> NoReturn:
    raise GraphError(message, where=user_line())


def _refuse_number(what: str) -> NoReturn:
    _refuse(
        f"a recorded value has no data yet, so {what} cannot have its number: keep computing with the value itself, "
        "or save it and use it after the block (several: `results.append(value.save())`)"
    )
