"""What a user calls for gradients: `loss.backward()`, and torch's functions `torch.autograd.grad` and `backward`.

What they mean is `polytrace.gradients`'s. Knows nothing of torch: the same arguments come from values without it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from polytrace.errors import GraphError
from polytrace.gradients import Gradients, Sweep
from polytrace.lines import user_line
from polytrace.storage import State, is_recorded, recorded_in, state_of
from polytrace.values import record


class BackwardBlock:
    """What `loss.backward()` returns: used in `with`, values have that backward's own gradients in the block."""

    def __init__(self, gradients: Gradients, sweep: Sweep) -> None:
        self._gradients = gradients
        self._sweep = sweep

    def __enter__(self) -> Self:
        self._gradients.begin(self._sweep)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._gradients.end()

    def __repr__(self) -> str:
        return f"<backward at {self._sweep.where}>"


def backward(
    tensors: Any,
    grad_tensors: Any = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    grad_variables: Any = None,
    inputs: Any = None,
) -> BackwardBlock:
    """`torch.autograd.backward`: gradients of one loss or the sum of several, which `.grad` of values has behind it.

    `retain_graph` means nothing: a trace's backwards may be as many as it likes.
    """
    loss, weight = _one_loss(tensors, grad_variables if grad_tensors is None else grad_tensors)
    gradients = loss.recording.gradients
    return BackwardBlock(gradients, gradients.backward(loss, weight, create_graph=create_graph, inputs=inputs))


def grad(
    outputs: Any,
    inputs: Any,
    grad_outputs: Any = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    only_inputs: bool = True,
    allow_unused: bool | None = None,
    is_grads_batched: bool = False,
    materialize_grads: bool = False,
) -> tuple[Any, ...]:
    """`torch.autograd.grad`: gradients of one output or the sum of several with regard to each input; none accumulates.

    Inputs are values, or tensors with requires_grad=True that the trace uses. Raises GraphError for one that the
    outputs do not depend on, unless `allow_unused` (None for it) or `materialize_grads` (zeros) is given.
    """
    where = user_line()
    if is_grads_batched:
        raise GraphError("is_grads_batched=True is not taken: call grad for each, they share passes", where=where)
    loss, weight = _one_loss(outputs, grad_outputs)
    gradients = loss.recording.gradients
    sweep = gradients.sweep(loss, weight, create_graph=create_graph)
    found: list[Any] = []
    for number, given in enumerate(_listed(inputs)):
        state = gradients.in_sweep(given, sweep)
        if state is not None:
            found.append(loss.recording.session.wrap(state))
        elif materialize_grads:
            found.append(record("zeros_like", (given,), {}, loss.recording))
        elif allow_unused:
            found.append(None)
        else:
            told = f"the outputs do not depend on input {number}"
            raise GraphError(f"{told}: leave it out, or say allow_unused=True for a None there", where=where)
    return tuple(found)


def _one_loss(outputs: Any, weights: Any) -> tuple[State, Any]:
    """One loss and what it is weighed with; of several outputs their weighed sum."""
    where, losses = user_line(), _listed(outputs)
    given = [None] * len(losses) if weights is None else _listed(weights)
    if len(given) != len(losses):
        raise GraphError(f"there are {len(losses)} outputs, and {len(given)} weights of them", where=where)
    if next(recorded_in(tuple(losses)), None) is None or not all(map(is_recorded, losses)):
        raise GraphError("gradients are of values of a trace, and these outputs are not", where=where)
    if len(losses) == 1:
        return state_of(losses[0]), given[0]
    total: Any = None
    for loss, weight in zip(losses, given, strict=True):
        if weight is None and loss.numel() != 1:
            told = (
                f"an output of shape {list(loss.shape)} is no one number: reduce it with .sum(), or weigh its elements"
            )
            raise GraphError(told, where=where)
        own = record("sum", (loss if weight is None else record("mul", (loss, weight), {}),), {})
        total = own if total is None else record("add", (total, own), {})
    return state_of(total), None


def _listed(given: Any) -> Sequence[Any]:
    if isinstance(given, Mapping):
        return list(given.values())
    return list(given) if isinstance(given, (tuple, list)) else [given]
