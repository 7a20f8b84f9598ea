"""What gradients must be like: floating, of their value's shape, of one number unless it is said how it is weighed."""

from __future__ import annotations

import math
from collections.abc import Sequence

from engine.meta import Meta, contiguous
from engine.ops import DTYPE_NAMES
from polytrace.errors import GraphError
from polytrace.graph import Backward, GradWrite, Ref

Values = Sequence[Meta | tuple[Meta, ...] | None]  # per node


def check_gradient(node: Backward | GradWrite, values: Values) -> None:
    """Raises GraphError with the user's line for a loss that has no gradients, or a change that does not fit."""
    if isinstance(node, Backward):
        _check_loss(node, values)
        return
    of, value = _one(node.of, values, node.where), _one(node.value, values, node.where)
    gradient_of(of)
    if value.shape != of.shape:
        raise GraphError(
            f"the gradient of a value of shape {list(of.shape)} cannot become one of shape {list(value.shape)}: a "
            "gradient has its value's exact shape",
            where=node.where,
        )
    if not value.dtype.is_floating_point:
        raise GraphError(f"a gradient is floating, and this one would be {DTYPE_NAMES[value.dtype]}", where=node.where)


def gradient_of(value: Meta) -> Meta:
    """What a value's gradient is like. Raises GraphError for a value that has none."""
    if not value.dtype.is_floating_point:
        raise GraphError(f"gradients are of floating values, and this one is {DTYPE_NAMES[value.dtype]}")
    return contiguous(value.shape, value.dtype)


def _check_loss(node: Backward, values: Values) -> None:
    loss = _one(node.loss, values, node.where)
    if not loss.dtype.is_floating_point:
        told = f"gradients are of floating values, and this loss is {DTYPE_NAMES[loss.dtype]}"
        raise GraphError(told, where=node.where)
    if node.gradient is None:
        if math.prod(loss.shape) != 1:
            raise GraphError(
                f"this loss has shape {list(loss.shape)}, and gradients are of one number: reduce it with .sum() or "
                ".mean(), or say how its elements are weighed: backward(gradient=weights)",
                where=node.where,
            )
        return
    weights = _one(node.gradient, values, node.where)
    if (weights.shape, weights.dtype) != (loss.shape, loss.dtype):
        raise GraphError(
            f"gradient is {DTYPE_NAMES[weights.dtype]} {list(weights.shape)}, and the loss {DTYPE_NAMES[loss.dtype]} "
            f"{list(loss.shape)}: both have one shape and dtype",
            where=node.where,
        )


def _one(ref: Ref, values: Values, where: str) -> Meta:
    value = values[ref.node]
    if not isinstance(value, Meta):
        raise GraphError("a gradient is of one value: take one of these", where=where)
    return value
