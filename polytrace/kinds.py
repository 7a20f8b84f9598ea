"""What recorded values are made of: torch tensors where torch is importable, else objects that become numpy arrays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

from polytrace.asked_shapes import AskedShapes
from polytrace.certificate import ValueShape
from polytrace.graph import Node, NodeId
from polytrace.recording import Recording
from polytrace.step_values import Steps
from polytrace.storage import State
from polytrace.tensors import RawTensor


class Shapes(Protocol):
    def of(self, node: NodeId) -> ValueShape: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One way to be a value."""

    make: Callable[[State], Any]  # the Python object for a value
    become: Callable[[Any, Any], None]  # (value, result): the object is the result from now on
    become_steps: Callable[[Any, Steps], None]  # (value, results): the object is a sequence of these from now on
    another: Callable[[Any], Any]  # a copy of a result
    is_grad_off: (
        Callable[[], bool] | None
    )  # whether what is computed now has no gradients; None: there is no such thing
    shapes: Callable[[Recording, Callable[[Node], ValueShape | None], AskedShapes], Shapes]
    decode: Callable[[RawTensor], Any]  # bytes of a result as a tensor or array, without a copy where one can be had


@cache
def value_kind() -> Kind:
    """The kind for this process. Imports torch when it is there."""
    try:
        import torch  # noqa: F401
    except ImportError:
        from polytrace import array_values

        return Kind(
            make=array_values.array_value,
            become=array_values.become,
            become_steps=array_values.become_steps,
            another=array_values.another,
            is_grad_off=None,
            shapes=lambda recording, leaf, asked: asked,
            decode=array_values.decode,
        )
    from polytrace import meta_shapes, tensor_values

    return Kind(
        make=tensor_values.tensor_value,
        become=tensor_values.become,
        become_steps=tensor_values.become_steps,
        another=tensor_values.another,
        is_grad_off=tensor_values.is_grad_off,
        shapes=lambda recording, leaf, asked: meta_shapes.MetaShapes(recording, leaf, asked.of),
        decode=tensor_values.decode,
    )
