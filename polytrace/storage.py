"""What a recorded value is: a part of a storage, which in-place code may change.

A `Storage` is one tensor as the user sees it: a root value, which follows in-place code. A `State` is a place in it:
view steps (getitem with slices, transpose, ...) from the root. Values that share a storage see each other's edits, as
in torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from polytrace.graph import NodeId, Operand, Site
from polytrace.timing import FIRST, When

if TYPE_CHECKING:
    from polytrace.gradients import GradPlace
    from polytrace.groups import GroupPlace
    from polytrace.recording import Recording


class Step(NamedTuple):
    """One view taken of another: a call of a view op without its first argument."""

    name: str
    args: tuple[Operand, ...]
    kwargs: tuple[tuple[str, Operand], ...] = ()
    is_view: bool = True  # False: an index that copies (lists, masks), which only `setitem` can write back


@dataclass(slots=True, eq=False)
class Place:
    """A site and the invoke whose rows are meant, with the writes that were recorded there so far."""

    site: Site
    invoke: int
    when: When = FIRST
    writes: int = 0
    line: str = ""  # of the last write
    in_place_refusal: str | None = None  # why in-place code cannot reach it, see `Leaf`
    writer: Storage | None = None  # who wrote last; None: nobody, or `site = value`
    # by writes so far: the first node that is what stands there, which is one tensor to torch however often it is read
    firsts: dict[int, NodeId] = field(default_factory=dict)

    def note(self, line: str, writer: Storage | None) -> None:
        """Takes in another write."""
        self.writes += 1
        self.line, self.writer = line, writer


@dataclass(slots=True, eq=False)
class Storage:
    """What several values may share."""

    node: NodeId  # the root's newest value
    place: Place | GroupPlace | None = None  # the site that edits are handed back to; None: the root was computed
    writes_seen: int = 0  # writes at that place which the root's value has in it
    version: int = 0  # edits so far
    edits: list[tuple[NodeId, str]] = field(default_factory=list)  # and their lines, where there is no place
    past: list[NodeId] = field(default_factory=list)  # the root's values before its newest
    gradient: GradPlace | None = None  # it is the gradient of a value, so edits are changes of that


@dataclass(slots=True, eq=False)
class State:
    """What a recorded value is."""

    recording: Recording
    storage: Storage
    steps: tuple[Step, ...]
    node: NodeId  # the value at `version` of the storage
    version: int
    where: str
    is_layer_output: bool = False  # a decoder layer's `.output`, where a literal index 0 means the hidden states
    is_hidden_states: bool = False  # ... and what that index gave
    refuses_ints: bool = False  # another layer's `.output`, see `PortTable`
    is_others: bool = False  # `output[1:]` of a decoder layer: nothing, where its output was a tuple once
    is_dropout_input: bool = False  # of a family's attention dropout, see `polytrace.historic`
    dims: tuple[str, ...] | None = None  # names of the dimensions of what was read at a named point
    is_saved: bool = False
    is_member: bool = False  # it was saved in a container
    saved_at: When | None = None  # in the body of a loop over steps: which
    gone: str | None = None  # why it has no data though it was saved: its step never came


@dataclass(frozen=True, slots=True)
class Several:
    """What an op returned that returns several values."""

    name: str
    states: tuple[State, ...]


def is_recorded(value: Any) -> bool:
    """Whether a Python object is a value of a trace."""
    return hasattr(type(value), "polytrace_value") and "_state" in value.__dict__


def state_of(value: Any) -> State:
    """The state of a recorded value."""
    state = value.__dict__["_state"]
    assert isinstance(state, State)
    return state


def recorded_in(values: Any) -> Iterator[State]:
    """The recorded values among (nested) arguments."""
    if isinstance(values, (tuple, list)):
        for value in values:
            yield from recorded_in(value)
    elif isinstance(values, slice):
        yield from recorded_in((values.start, values.stop, values.step))
    elif is_recorded(values):
        yield state_of(values)
