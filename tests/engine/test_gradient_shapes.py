"""What the service holds gradients to before anything runs, whatever a client has sent."""

from __future__ import annotations

import pytest
import torch

from engine.gradient_shapes import Values, check_gradient, gradient_of
from engine.meta import Meta, contiguous
from polytrace.errors import GraphError
from polytrace.graph import Backward, GradWrite, NodeId, Ref

HIDDEN, NUMBER, WHOLE, HALF = (
    contiguous((1, 3, 8), torch.float32),
    contiguous((), torch.float32),
    contiguous((1,), torch.int64),
    contiguous((1, 3, 8), torch.bfloat16),
)
VALUES: Values = [HIDDEN, NUMBER, WHOLE, HALF, None, (HIDDEN, NUMBER)]  # of nodes 0, 1, ...


def ref(node: int) -> Ref:
    return Ref(NodeId(node))


def backward(loss: int, gradient: int | None = None) -> Backward:
    return Backward(loss=ref(loss), gradient=None if gradient is None else ref(gradient), where="a.py:9")


def change(of: int, value: int) -> GradWrite:
    return GradWrite(of=ref(of), backward=ref(4), value=ref(value), where="a.py:9")


@pytest.mark.parametrize("node", [backward(1), backward(0, 0), change(0, 0), change(0, 3), change(3, 0)])
def test_what_fits_is_taken(node: Backward | GradWrite) -> None:
    check_gradient(node, VALUES)


@pytest.mark.parametrize(
    ("node", "told"),
    [
        (backward(0), r"shape \[1, 3, 8\], and gradients are of one number"),
        (backward(2), "this loss is int64"),
        (backward(5), "of one value"),
        (backward(0, 1), r"gradient is float32 \[\], and the loss float32 \[1, 3, 8\]"),
        (backward(0, 3), r"gradient is bfloat16 \[1, 3, 8\], and the loss float32"),
        (change(0, 1), r"shape \[1, 3, 8\] cannot become one of shape \[\]"),
        (change(2, 2), "gradients are of floating values"),
        (change(5, 0), "of one value"),
    ],
)
def test_what_does_not_fit_names_the_line(node: Backward | GradWrite, told: str) -> None:
    with pytest.raises(GraphError, match=told) as caught:
        check_gradient(node, VALUES)
    assert caught.value.where in ("a.py:9", None)


def test_a_gradient_is_like_its_value_and_lies_dense() -> None:
    assert gradient_of(Meta((3, 2), (1, 3), torch.float32)) == contiguous((3, 2), torch.float32)
    with pytest.raises(GraphError, match="this one is int64"):
        gradient_of(WHOLE)
