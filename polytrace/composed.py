"""Functions that torch composes in Python of ops of the table: their own code is run, and records itself."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch.nn.functional as functional

# Whether a function shall hand its call to the arguments' class instead of running; each asks one of these.
_ASKING = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")

_COMPOSED = (
    functional.multi_head_attention_forward,
    functional.gumbel_softmax,
    functional.multilabel_soft_margin_loss,
    functional.triplet_margin_with_distance_loss,
)


def composed() -> dict[Any, Callable[..., Any]]:
    """Per function the same code, which does not ask and runs."""
    return {function: _running(function) for function in _COMPOSED}


def _running(function: Any) -> Callable[..., Any]:
    names = {**function.__globals__, **dict.fromkeys(_ASKING, lambda *_: False)}
    code = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    code.__kwdefaults__ = function.__kwdefaults__
    return code
