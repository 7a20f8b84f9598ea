"""The torch callables that names of the op table stand for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.fft
import torch.linalg
import torch.nn.functional
import torch.special

from polytrace.ops import OpSpec

_ROOMS: dict[str, Any] = {
    "Tensor": torch.Tensor,
    "torch": torch,
    "functional": torch.nn.functional,
    "linalg": torch.linalg,
    "special": torch.special,
    "fft": torch.fft,
}


def find(name: str) -> Any:
    """The callable that a name of the op table stands for, None when this torch has none."""
    room, _, function = name.partition(".")
    return getattr(_ROOMS.get(room), function, None)


def function_of(spec: OpSpec) -> Callable[..., Any] | None:
    """What a row runs where nothing else is said: its first function, else its first method; None without either."""
    names = sorted(spec.torch, key=lambda name: name.startswith("Tensor."))  # stable: functions first
    found: Callable[..., Any] | None = next((made for made in map(find, names) if made is not None), None)
    return found


def is_in_place(name: str) -> bool:
    """Whether a torch name is that of in-place code, which torch has in no other form (`Tensor.normal_`)."""
    return name.endswith("_") and not name.endswith("__")
