"""Variables of the user's own code that stand for recorded values: what they are when a body of a loop ends.

Python says nothing when a variable is bound anew, so its frame is looked at: before a loop, and behind each body.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import FrameType
from typing import TYPE_CHECKING, Any

from polytrace.errors import GraphError
from polytrace.graph import Constant, NodeId, Op
from polytrace.pruning import cone
from polytrace.step_values import OfSteps
from polytrace.storage import State, is_recorded, state_of

if TYPE_CHECKING:
    from polytrace.recording import Recording


def variables(frame: FrameType | None) -> dict[str, Any]:
    """The variables of a function, or of a module, as they are now."""
    return dict(frame.f_locals) if frame is not None else {}


def nodes_by_name(recording: Recording, frame: FrameType | None) -> dict[str, NodeId]:
    """Those that stand for values of a recording, and the nodes of these."""
    found: dict[str, NodeId] = {}
    for name, state in _recorded(recording, variables(frame)):
        if state.version == state.storage.version:
            found[name] = state.node
        elif not state.steps:
            found[name] = state.storage.node
    return found


def check_rebinding(
    recording: Recording, nodes: range, frame: FrameType | None, before: Mapping[str, Any], where: str
) -> None:
    """GraphError where a variable from outside stands for a value of a body that is recorded once for several steps.

    `nodes` are the body's, `before` the variables as they were when it began.
    """
    for name, state in _recorded(recording, now := variables(frame)):
        old = before.get(name)
        if now[name] is old or state.node not in nodes or not _is_made_of(recording, state.node, old, nodes):
            continue
        raise GraphError(
            f"`{name}` is from outside, and the body at {where} gives it another value at each step; that body is "
            "recorded once for all of its steps: write `for step in tracer.iter[...]`, whose body is recorded for "
            "each step",
            where=where,
        )


def _recorded(recording: Recording, values: Mapping[str, Any]) -> Iterator[tuple[str, State]]:
    for name, value in values.items():
        if is_recorded(value) and (state := state_of(value)).recording is recording:
            yield name, state


def _is_made_of(recording: Recording, node: NodeId, old: Any, body: range) -> bool:
    """Whether a value is computed from what a variable was before: a value, a tensor of the user's own, a number."""
    if is_recorded(old):
        return state_of(old).recording is recording and state_of(old).node in cone(recording.nodes, node)
    if isinstance(old, (int, float)) and not isinstance(old, bool):
        ops = [recording.nodes[part] for part in cone(recording.nodes, node) if part in body]
        arguments = (argument for op in ops if isinstance(op, Op) for argument in op.args)
        return any(type(argument) is type(old) and argument == old for argument in arguments)
    if isinstance(old, OfSteps):  # what an earlier generation gave: several tensors
        return False
    name = recording.constants.name_of(old)
    parts = [recording.nodes[part] for part in cone(recording.nodes, node)] if name is not None else []
    return any(isinstance(made, Constant) and made.name == name for made in parts)
