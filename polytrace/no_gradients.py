"""What has no gradients, and why: the refusals, each with the user's line and the next step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from polytrace.certificate import ValueShape
from polytrace.errors import GraphError
from polytrace.generation import NO_GRADIENTS
from polytrace.graph import Grad, Mask, Parameter
from polytrace.lineages import Lineage
from polytrace.storage import State

if TYPE_CHECKING:
    from polytrace.recording import Recording

NONE_YET = "this value has no gradient yet: call loss.backward() before, or read it inside `with loss.backward():`"


def check_allowed(recording: Recording, create_graph: bool, where: str) -> None:
    """GraphError where nothing can be run backwards."""
    if create_graph:
        raise GraphError(
            "create_graph=True asks for gradients of gradients, which no trace gives: what is computed from a "
            "gradient has none",
            where=where,
        )
    if recording.goes_on or recording.loops.are_used:
        raise GraphError(NO_GRADIENTS, where=where)
    if recording.is_edit:
        raise GraphError("an edit has no gradients of its own: call backward() in the traces from it", where=where)


def check_loss(loss: ValueShape, gradient: ValueShape | None, where: str) -> None:
    """GraphError for a loss that is no number, unless a `gradient` of its shape weighs its elements."""
    if "float" not in loss.dtype:
        raise GraphError(f"gradients are of floating values, and this loss is {loss.dtype}", where=where)
    if gradient is None:
        if any(size != 1 for size in loss.shape):
            raise GraphError(
                f"this loss has shape {list(loss.shape)}, and gradients are of one number: reduce it with .sum() or "
                ".mean(), or say how its elements are weighed: backward(gradient=weights)",
                where=where,
            )
    elif gradient != loss:
        raise GraphError(
            f"gradient is {gradient.dtype} {list(gradient.shape)}, and the loss {loss.dtype} {list(loss.shape)}: both "
            "have one shape and dtype",
            where=where,
        )


def check_value(recording: Recording, state: State, where: str) -> None:
    """GraphError for what has no gradient whatever the loss is."""
    node = recording.own_node(state, where)
    made = recording.nodes[node]
    if isinstance(made, Parameter):
        raise GraphError(
            f"{made.path} is a weight of the model, and weights are frozen: gradients are of what modules get and "
            "return (`.input`, `.output`), and of what is computed from these",
            where=where,
        )
    if isinstance(made, Grad):
        raise GraphError("a gradient has no gradient: what is computed from it has one, as g.clone()", where=where)
    dtype = "bool" if isinstance(made, Mask) else recording.facts.dtypes.of(node)
    dtype = dtype or recording.session.shape_of(node).dtype
    if "float" not in dtype:
        raise GraphError(f"gradients are of floating values, and this one is {dtype}", where=where)


def why_not(where: str, lineage: Lineage) -> str:
    """Why a loss does not depend on a value. `where` is the line of its backward."""
    told = f"the loss of the backward at {where} does not depend on this value"
    if lineage.is_detached:
        return (
            f"{told}: some of what it is made of was recorded while torch's gradients were off (torch.no_grad(), "
            "torch.set_grad_enabled(False)), and that is detached"
        )
    if lineage.is_of_gradients:
        return f"{told}, but for gradients that it is made of, and what is computed from a gradient has none"
    return (
        f"{told}: take `.grad` of the value that the loss was computed from, and index that (`value.grad[:, -1]`, not "
        "`value[:, -1].grad`)"
    )
