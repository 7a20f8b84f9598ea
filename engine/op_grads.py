"""Gradients of a user's own operations: one op or call is run again with one operand as a leaf of autograd.

All places of a call at which the operand stands are one leaf, so its gradient is the sum over them, as autograd has it.
A random op draws again what it drew. What a result does not depend on gets zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from polytrace.graph import NodeId, OpGrad

# Runs the op again on these values of its operands.
Again = Callable[[Mapping[NodeId, Any]], Any]


def operand_gradient(node: OpGrad, values: Mapping[NodeId, Any], again: Again) -> Tensor:
    """Of the operand's shape and dtype."""
    operand = node.needs[node.operand].node
    leaf = values[operand].detach().requires_grad_()
    given = [None if ref is None else values[ref.node] for ref in node.gradients]
    with torch.enable_grad():
        # An op may hand its operand on as it is, or write to what it takes for its own copy.
        results = again({**values, operand: leaf.view_as(leaf)})
    return gradient_through(leaf, results, given)


def gradient_through(leaf: Tensor, results: Any, given: Sequence[Tensor | None]) -> Tensor:
    """What the gradients of results (None: there is none) give to a leaf that they were made of."""
    made = results if isinstance(results, (tuple, list)) else (results,)
    used = [
        (one, gradient.to(one.dtype))
        for one, gradient in zip(made, given, strict=False)
        if gradient is not None and isinstance(one, Tensor) and one.requires_grad
    ]
    found = None
    if used:
        tensors, gradients = zip(*used, strict=True)
        (found,) = torch.autograd.grad(tensors, leaf, gradients, allow_unused=True)
    return torch.zeros_like(leaf) if found is None else found.contiguous()


def ones_like(value: Tensor) -> Tensor:
    """Where a backward begins."""
    return torch.ones_like(value, memory_format=torch.contiguous_format)
