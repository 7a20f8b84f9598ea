"""What tutorials of older versions write, in these literal forms alone.

`attn_dropout.input[0][0]` are attention weights: `.input` was the call's `((args), {kwargs})`, and is the first
argument itself now. A decoder layer returned a tuple once, so `layer.output = (hidden, *others)` is that of `hidden`.
"""

from __future__ import annotations

from typing import Any, NoReturn

from polytrace.errors import GraphError
from polytrace.lines import user_line
from polytrace.literals import first_int
from polytrace.storage import State


def hidden_of(value: Any) -> Any:
    """The tensor of `(hidden,)` and `(hidden, None)`, given for a decoder layer's one; anything else as it is."""
    if isinstance(value, (tuple, list)) and value and all(other is None for other in value[1:]):
        return value[0]
    return value


def historic_arguments(state: State, index: Any) -> HistoricArguments:
    """`input[0]`; every other integer there would mean something else to every reader."""
    if isinstance(index, tuple) or first_int(index) != 0:
        _refuse(f"input[{index!r}]")
    return HistoricArguments(state)


class HistoricArguments:
    """The positional arguments of a dropout's call, of which the one is the weights."""

    __slots__ = ("_state",)

    def __init__(self, state: State) -> None:
        object.__setattr__(self, "_state", state)

    def __getitem__(self, index: Any) -> Any:
        state = self._weights(index)
        return state.recording.session.wrap(state.recording.alias(state))

    def __setitem__(self, index: Any, value: Any) -> None:
        state = self._weights(index)
        place = state.storage.place
        assert place is not None, "the weights are read from a site"
        state.recording.write_edge(place.site, place.invoke, value)

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        _refuse(f"input[0].{name}")

    def __setattr__(self, name: str, value: Any) -> None:
        _refuse(f"input[0].{name}")

    def _weights(self, index: Any) -> State:
        if isinstance(index, tuple) or first_int(index) != 0:
            _refuse(f"input[0][{index!r}]")
        state: State = self._state
        return state


def _refuse(written: str) -> NoReturn:
    raise GraphError(
        f"`{written}` means different things on an attention dropout, whose `.input` was all arguments once and is the "
        "weights [sequences, heads, queries, keys] now: write `input` (or `input[0][0]`) for the weights, "
        "`input[i:i+1]` for sequence i, `input[:, h]` for head h",
        where=user_line(),
    )
