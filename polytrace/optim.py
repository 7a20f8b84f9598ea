"""Optimisers for what a trace learns: an update gives new values and changes none.

    optimiser = polytrace.optim.Adam(lr=0.05)
    vector = tracer.value(torch.zeros(width))
    for _ in range(100):
        with tracer.invoke(prompts):
            ...  # a loss that depends on `vector`
        loss.backward()
        (vector,) = optimiser.step([vector], [vector.grad])

The formulas are torch.optim's (without weight decay), so the same works on plain tensors. What an optimiser remembers
is recorded values as well: one optimiser is for one trace, or for one session.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from polytrace.errors import GraphError
from polytrace.lines import user_line


class SGD:
    """Steps against the gradient: `p - lr * m`, with `m = momentum * m + g`, at first `g`."""

    def __init__(self, lr: float, momentum: float = 0.0) -> None:
        """Raises GraphError for a rate or a momentum below 0."""
        _check({"lr": lr, "momentum": momentum}, most=None)
        self.lr = lr
        self.momentum = momentum
        self._moments: list[Any] = []

    def step(self, params: Sequence[Any], grads: Sequence[Any]) -> list[Any]:
        """The new values of `params`, detached from the old ones. `grads` has one for each, of its shape."""
        _check_pairs(params, grads, len(self._moments))
        moments = list(grads)
        if self.momentum and self._moments:
            pairs = zip(self._moments, grads, strict=True)
            moments = [moment * self.momentum + grad for moment, grad in pairs]
        if self.momentum:
            self._moments = moments
        return [(param - moment * self.lr).detach() for param, moment in zip(params, moments, strict=True)]


class Adam:
    """Adam (Kingma and Ba, arXiv:1412.6980), with torch.optim.Adam's order of operations."""

    def __init__(self, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> None:
        """Raises GraphError for a rate or `eps` below 0, or betas that are not from 0 to below 1."""
        _check({"lr": lr, "eps": eps}, most=None)
        _check({"betas[0]": betas[0], "betas[1]": betas[1]}, most=1.0)
        self.lr = lr
        self.betas = betas
        self.eps = eps
        self._num_steps = 0
        self._means: list[Any] = []  # of gradients
        self._squares: list[Any] = []  # of their squares

    def step(self, params: Sequence[Any], grads: Sequence[Any]) -> list[Any]:
        """The new values of `params`, detached from the old ones. `grads` has one for each, of its shape."""
        _check_pairs(params, grads, len(self._means))
        one, two = self.betas
        if not self._num_steps:
            self._means = [grad * (1 - one) for grad in grads]
            self._squares = [grad * grad * (1 - two) for grad in grads]
        else:
            means, squares = zip(self._means, grads, strict=True), zip(self._squares, grads, strict=True)
            self._means = [mean + (grad - mean) * (1 - one) for mean, grad in means]
            self._squares = [square * two + grad * grad * (1 - two) for square, grad in squares]
        self._num_steps += 1
        size = self.lr / (1 - one**self._num_steps)
        scale = math.sqrt(1 - two**self._num_steps)
        moments = zip(params, self._means, self._squares, strict=True)
        return [(param - mean / (square.sqrt() / scale + self.eps) * size).detach() for param, mean, square in moments]


def _check(numbers: dict[str, float], *, most: float | None) -> None:
    for name, number in numbers.items():
        if not 0 <= number < (math.inf if most is None else most):
            told = "0 or more" if most is None else f"from 0 to below {most}"
            raise GraphError(f"{name} is a number, {told}, not {number!r}", where=user_line())


def _check_pairs(params: Sequence[Any], grads: Sequence[Any], num_before: int) -> None:
    where = user_line()
    if len(params) != len(grads) or num_before not in (0, len(params)):
        before = f", and the step before had {num_before}" if num_before else ""
        told = f"a step takes a gradient for each value: these are {len(params)} values and {len(grads)} gradients"
        raise GraphError(told + before, where=where)
    for number, (param, grad) in enumerate(zip(params, grads, strict=True)):
        is_known = hasattr(param, "untyped_storage")  # without torch each shape would be a question to the service
        if grad is None or (is_known and tuple(param.shape) != tuple(grad.shape)):
            what = "None" if grad is None else f"of shape {list(grad.shape)}"
            told = f"gradient {number} is {what}, and its value has shape {list(param.shape)}"
            raise GraphError(told, where=where)
