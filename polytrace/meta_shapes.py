"""Shapes by torch's own rules: the same function on tensors that have no data. Needs torch, and no weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from polytrace.certificate import ValueShape
from polytrace.derived import Derived
from polytrace.errors import GraphError, PolytraceError
from polytrace.graph import Call, Constant, DType, Grad, Last, Node, NodeId, Op, Operand, Ref, operands
from polytrace.ops import OPS
from polytrace.recording import Recording
from polytrace.shape_rules import CLIENT_RULES
from polytrace.tensor_values import TORCH_DTYPES
from polytrace.torch_names import find

_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


class MetaShapes:
    """Shape and dtype of every node of one recording, worked out when somebody asks."""

    def __init__(
        self, recording: Recording, leaf: Callable[[Node], ValueShape | None], ask: Callable[[NodeId], ValueShape]
    ) -> None:
        self._recording = recording
        self._leaf = leaf  # what the model's description says of a node
        self._ask = ask  # what only the service knows: the shapes of called modules
        self._metas = Derived(self._parts, self._make)

    def of(self, node: NodeId) -> ValueShape:
        """Raises GraphError with the user's line when the op does not fit its operands."""
        leaf = self._leaf(self._recording.nodes[node])
        if leaf is not None:
            return leaf
        meta = self._metas.of(node)
        return ValueShape(shape=tuple(meta.shape), dtype=_NAMES[meta.dtype])

    def _parts(self, node: NodeId) -> tuple[NodeId, ...]:
        made = self._recording.nodes[node]
        if isinstance(made, (Last, Grad)):
            return operands(made)[:1]
        if not isinstance(made, Op):
            return ()
        if made.name in ("setitem", "set_view"):
            return operands(made)[:1]  # the base says it all
        return operands(made)

    def _make(self, node: NodeId) -> Any:
        made = self._recording.nodes[node]
        if isinstance(made, Op):
            try:
                return self._run(made)
            except PolytraceError:
                raise
            except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError) as error:
                first = str(error).strip().split("\n", 1)[0]
                raise GraphError(f"{made.name}: {first}", where=made.where) from error
        if isinstance(made, (Last, Grad)):
            return self._metas.known[operands(made)[0]]
        known = self._leaf(made) or (self._ask(node) if isinstance(made, Call) else None)
        assert known is not None, "only values are asked for their shape"
        return torch.empty(known.shape, dtype=TORCH_DTYPES[known.dtype], device="meta")

    def _run(self, op: Op) -> Any:
        if op.name in ("setitem", "set_view"):
            return self._resolve(op.args[0])
        args = [self._resolve(arg) for arg in op.args]
        kwargs = {key: self._resolve(value) for key, value in op.kwargs.items() if key != "draw"}
        if op.name == "getitem":  # a mask of the user's own has data, so what it selects has a shape
            args[1] = self._resolve(op.args[1], with_masks=True)
        if op.name == "item":
            return args[0][args[1]]
        if op.name == "left_pad":
            return _padded_shape(*args)
        if (result := _pointwise(op.name, args)) is not None:
            return result
        if OPS[op.name].needs_values:
            raise GraphError(f"{op.name}: its shape depends on values; use torch.where or topk", where=op.where)
        if OPS[op.name].is_made:
            return getattr(torch, op.name)(*args, **kwargs, device="meta")
        if op.name in CLIENT_RULES:
            return CLIENT_RULES[op.name](*args, **kwargs)
        failure: TypeError | None = None
        for name in OPS[op.name].torch:  # the method and the function may take other forms of the same arguments
            function = find(name)
            if function is None:
                continue
            try:
                result = function(*args, **kwargs)
            except TypeError as error:
                failure = failure or error
                continue
            if isinstance(result, (Tensor, tuple)):
                return result
        raise failure or TypeError("these operands do not fit")

    def _resolve(self, operand: Operand, *, with_masks: bool = False) -> Any:
        if isinstance(operand, Ref):
            made = self._recording.nodes[operand.node]
            if with_masks and isinstance(made, Constant):
                raw = self._recording.constants.tensors[made.name]
                if raw.dtype == "bool" and raw.data.nbytes:
                    return torch.frombuffer(bytearray(raw.data), dtype=torch.bool).reshape(raw.shape)
            return self._metas.known[operand.node]
        if isinstance(operand, DType):
            return TORCH_DTYPES[operand.name]
        if isinstance(operand, tuple):
            return tuple([self._resolve(part, with_masks=with_masks) for part in operand])
        if isinstance(operand, list):
            return [self._resolve(part, with_masks=with_masks) for part in operand]
        return operand


# torch works these out in Python, behind a second of imports; among floats of one kind the answer is short
_ARITHMETIC = frozenset({"add", "sub", "rsub", "mul", "div", "rdiv", "pow", "maximum", "minimum"})
_COMPARISONS = frozenset({"eq", "ne", "lt", "le", "gt", "ge"})


def _pointwise(name: str, args: list[Any]) -> Tensor | None:
    """Broadcasting by hand; None where torch's promotion has to be asked."""
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    if name not in _ARITHMETIC | _COMPARISONS or not tensors[0].is_floating_point():
        return None
    if not all(isinstance(arg, (Tensor, int, float)) for arg in args) or len({arg.dtype for arg in tensors}) != 1:
        return None
    shape = torch.broadcast_shapes(*(arg.shape for arg in tensors))
    return torch.empty(shape, dtype=torch.bool if name in _COMPARISONS else tensors[0].dtype, device="meta")


def _padded_shape(parts: list[Tensor], dims: tuple[int, ...]) -> Tensor:
    shape = [sum(part.shape[0] for part in parts), *parts[0].shape[1:]]
    for dim in dims:
        shape[dim] = max(part.shape[dim] for part in parts)
    return torch.empty(shape, dtype=parts[0].dtype, device="meta")
