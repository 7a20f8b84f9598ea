"""What every recorded value can do, whatever it is made of (`tensor_values`, `array_values`).

Owns the refusals: Python code that needs a number now cannot have it, and each such message says what to write instead.
"""

from __future__ import annotations

import math
import operator
from collections import namedtuple
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, NoReturn

from polytrace import hints
from polytrace.certificate import ValueShape
from polytrace.edits.open_shapes import is_open
from polytrace.errors import GraphError
from polytrace.grammar import nearest
from polytrace.graph import Op
from polytrace.historic import historic_arguments
from polytrace.lines import user_line
from polytrace.literals import first_int
from polytrace.ops import OPS, Results
from polytrace.part_counts import num_parts
from polytrace.positions import OPEN, position_index
from polytrace.storage import Several, State, is_recorded, recorded_in, state_of
from polytrace.tree import NoSuchNameError

if TYPE_CHECKING:
    from polytrace.recording import Recording


_A_TUPLE_ONCE = (
    "layers that attend gave a tuple with the hidden states in front for years, and this one gives these alone now, "
    "with sequences in front"
)


@cache
def results_of(fields: tuple[str, ...]) -> Callable[..., Any]:
    """The named tuple of what an op returns that returns several values, as torch's own."""
    return namedtuple("Results", fields)


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

    def keep(self, name: str | None = None, ttl: float | None = None) -> Any:
        """Leaves the value on the service when the request has ended well, and gives a `polytrace.Kept` for it.

        `name`: what `model.kept(name)` finds it by; it replaces another one of that name. `ttl`: seconds until it is
        purged; without, it stays until it is deleted. It counts in its owner's quota, and nothing of it comes here.
        """
        from polytrace.keeping import keep

        return keep(self, name, ttl)

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
                "scores, patterns and others whose tokens are not in the second dimension have these in columns of the "
                "left-padded view: index them, as in value[:, :, -1] for the last token's",
                where=user_line(),
            )
        lengths = state.recording.lengths_of(state, invoke)
        shape = shape_of(self).shape
        if lengths is None and is_open(shape, 0) and is_open(shape, 1):
            return session.wrap(state.recording.at(state, (OPEN, position)))
        if lengths is None or shape[:2] != (len(lengths), max(lengths)):
            raise GraphError(
                f"positions are counted in values of shape [sequences, tokens, ...]{_counts(lengths)}; "
                f"this one is {shape if lengths is None else list(shape)}",
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
        if state.refuses_ints:
            _check_index(index)
        made = state.recording.op("getitem", (self, index), {})
        assert isinstance(made, State)
        made.is_others = state.is_layer_output and isinstance(index, slice) and index == slice(1, None)
        return state.recording.session.wrap(made)

    def __radd__(self, other: Any) -> Any:
        if isinstance(other, tuple) and state_of(self).is_others:
            return other  # `layer.output = (hidden,) + layer.output[1:]`
        return record("add", (self, other), {})

    def __setitem__(self, index: Any, value: Any) -> None:
        state = state_of(self)
        if state.is_dropout_input and first_int(index) is not None:
            historic_arguments(state, (index,))  # raises
        if state.refuses_ints:
            _check_index(index)
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
        if state_of(self).refuses_ints:
            raise GraphError(
                f"unpacking this layer's output means two things: {_A_TUPLE_ONCE}: write `.output` for these, "
                "`.output.unbind(0)` for each sequence's",
                where=user_line(),
            )
        return iter(record("unbind", (self,), {}))

    # what Python cannot have yet

    def __bool__(self) -> bool:
        if not can_peek(self):
            _refuse(
                f"{_told(self)}, so `if`, `while`, `and`, `or`, `not` and `in` cannot look "
                f"at it: write torch.where(condition, a, b), or save it and decide after the block{_hint(self)}"
            )
        return bool(peeked(self))

    def __contains__(self, item: Any) -> bool:
        if not can_peek(self):
            _refuse(f"`in` cannot look into a recorded value: save it and look after the block{_hint(self)}")
        return bool((peeked(self) == item).any())

    def __float__(self) -> float:
        return float(data_of(self, "float()"))

    def __int__(self) -> int:
        return int(data_of(self, "int()"))

    def __index__(self) -> int:
        return operator.index(data_of(self, "an index or a range"))

    def __complex__(self) -> complex:
        return complex(data_of(self, "complex()"))

    def item(self) -> Any:
        return data_of(self, ".item()").item()

    def tolist(self) -> Any:
        return data_of(self, ".tolist()").tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        return np_array(data_of(self, ".numpy()"))

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        if not can_peek(self):
            refuse_client_change("numpy")
        return np_array(peeked(self)).__array__(*args, **kwargs)

    # gradients

    def backward(
        self,
        gradient: Any = None,
        retain_graph: bool | None = None,
        create_graph: bool = False,
        inputs: Any = None,
    ) -> Any:
        """Asks for the gradients of this value, of one element unless `gradient` says how its elements are weighed.

        Values have them in `.grad` from then on, summed over all calls as in torch; as `with loss.backward():` they
        have this call's own in the block, and what is put into `.grad` there goes on backwards instead. `retain_graph`
        means nothing. Raises GraphError with the user's line for what has no gradient.
        """
        from polytrace import autograd

        grads = None if gradient is None else [gradient]
        return autograd.backward([self], grads, create_graph=create_graph, inputs=inputs)

    @property
    def grad(self) -> Any:
        """The gradient with regard to this value, of its shape and dtype; see `backward`."""
        state = state_of(self)
        found = state.recording.gradients.of(state)
        if found is None:
            return None
        seen = state.recording.alias(found)  # each that is looked at can be saved by itself
        seen.dims = found.dims
        return state.recording.session.wrap(seen)

    @grad.setter
    def grad(self, value: Any) -> None:
        state = state_of(self)
        state.recording.gradients.assign(state, value)

    @grad.deleter
    def grad(self) -> None:
        self.grad = None

    def retain_grad(self) -> None:
        """Nothing: every value has its gradient."""

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        """The value itself: every one has gradients where a loss depends on it."""
        self.requires_grad = requires_grad
        return self

    @property
    def requires_grad(self) -> bool:
        return bool(vars(self).get("_requires_grad", False))

    @requires_grad.setter
    def requires_grad(self, wanted: bool) -> None:
        if not wanted:
            _refuse("a value without gradients is another one: write value = value.detach()")
        vars(self)["_requires_grad"] = True

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        known = sorted({method for method in dir(type(self)) if not method.startswith("_")})
        told = f": {words}" if (words := hints.of_value(name)) else nearest(name, known)
        raise NoSuchNameError(f"a recorded value has no {name!r}{told}", where=user_line())

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
            _refuse(
                "a recorded value without dimensions has no len(); one tensor of several values is torch.stack([a, b])"
            )
        return shape[0]

    def dim(self) -> int:
        return len(shape_of(self).shape)

    def numel(self) -> int:
        return math.prod(shape_of(self).shape)

    def __repr__(self, **kwargs: Any) -> str:
        if can_peek(self):
            return repr(peeked(self))
        state = state_of(self)
        told = state.gone or state.recording.closed
        return f"<recorded value: {describe(state)}" + (f"; {told}>" if told else ">")

    def __format__(self, spec: str) -> str:
        return format(peeked(self), spec) if can_peek(self) else repr(self)


def shape_of(value: Any) -> ValueShape:
    """Shape and dtype of a recorded value."""
    state = state_of(value)
    recording = state.recording
    node = state.node if recording.keeps_shapes else recording.node_of(state)  # in-place code changes no shape
    return recording.session.shape_of(node)


def _counts(lengths: Sequence[int] | None) -> str:
    return "" if lengths is None else f" = {[len(lengths), max(lengths)]}"


def can_peek(value: Any) -> bool:
    """Whether the value's trace lets Python look at values while it records."""
    recording = state_of(value).recording
    return recording.peeks is not None and recording.closed is None


def peeked(value: Any) -> Any:
    """The value's data now, as a plain tensor or array: asked for once. Its trace lets values be looked at."""
    state = state_of(value)
    assert state.recording.peeks is not None
    return state.recording.peeks.look(state.recording.node_of(state))


def np_array(data: Any) -> Any:
    """A plain tensor or array as an array."""
    return data.numpy() if hasattr(data, "untyped_storage") else data


def describe(state: State) -> str:
    """What a value is, in a few words, without asking anyone."""
    node = state.recording.nodes[state.node]
    if isinstance(node, Op):
        return f"{node.name}, {node.where}"
    what = getattr(node, "site", None) or getattr(node, "path", None) or getattr(node, "module", None)
    return f"{what or type(node).__name__.lower()}, {node.where}"


def record(name: str, args: Sequence[Any], kwargs: Mapping[str, Any], recording: Recording | None = None) -> Any:
    """A call of the op table on values as the user wrote them: one value, a named tuple or a tuple of values.

    `recording` is where it belongs that has no recorded value among its arguments.
    """
    first = args[0] if args else None
    found = state_of(first) if is_recorded(first) else next(recorded_in((tuple(args), tuple(kwargs.values()))), None)
    recording = found.recording if found is not None else recording
    assert recording is not None, "an op is recorded on a recorded value"
    is_list = name in OPS and OPS[name].results is Results.LIST
    members = _count(name, args, kwargs) if is_list else len(OPS[name].fields) if name in OPS else 0
    made = recording.op(name, args, kwargs, members)
    wrap = recording.session.wrap
    if not isinstance(made, Several):
        return wrap(made)
    values = tuple(wrap(part) for part in made.states)
    return values if is_list else results_of(OPS[name].fields)(*values)


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
    try:
        return num_parts(name, args, kwargs, shape_of(args[0]).shape if is_recorded(args[0]) else ())
    except ValueError as error:
        raise GraphError(str(error), where=user_line()) from None


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


def _check_index(index: Any) -> None:
    """Raises GraphError for an int directly on the output of a layer whose model returns what it returns."""
    number = None if isinstance(index, tuple) else first_int(index)
    if number is None:
        return
    one = {0: "the first sequence", -1: "the last sequence"}.get(number, f"sequence {number}")
    raise GraphError(
        f"`output[{number}]` means two things on this layer: {_A_TUPLE_ONCE}: write `.output` for the hidden states, "
        f"`.output[{number}:{number + 1 or ''}]` for {one}'s",
        where=user_line(),
    )


def _refuse(message: str) -> NoReturn:
    raise GraphError(message, where=user_line())


def data_of(value: Any, what: str) -> Any:
    """The value's data where its trace lets it be looked at."""
    if can_peek(value):
        return peeked(value)
    _refuse(
        f"{_told(value)}, so {what} cannot have its number: keep computing with the value "
        "itself, or save it and use it after the block (several: `results.append(value.save())`)" + _hint(value)
    )


def _hint(value: Any) -> str:
    return state_of(value).recording.session.hint


def _told(value: Any) -> str:
    """Why a value has no data yet. Raises GraphError when its trace has ended, so that it will have none."""
    state = state_of(value)
    if state.recording.closed is not None:
        _refuse(f"{state.recording.closed}; it was made at {state.where}")
    return state.recording.session.told
