"""Values that are known before the run: what is made of constants and masks only.

Where a shape depends on values (a boolean index, a slice to a recorded bound), a constant's or a mask's values decide
it at submit. Values are made on demand and small; what is read from the model or from a parameter is not known.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from engine.ops import TORCH_DTYPES, resolve, run_op
from polytrace.errors import TooLargeError
from polytrace.graph import Constant, Mask, NodeId, Op, Ref, Request, operands, refs
from polytrace.ops import OPS, Cost, Reach
from polytrace.tensors import RawTensor

_MAX_ELEMENTS = 1 << 18  # of one known value
_MAX_OPS = 4_096  # values made for one request
_MAX_MADE = 1 << 24  # their elements together
_DEAR = frozenset({Cost.PRODUCT, Cost.TRANSFORM, Cost.DECOMPOSITION})  # not worth running to learn a shape


class KnownValues:
    """The data behind nodes of one request, as far as it is known."""

    def __init__(self, request: Request, needs: Sequence[tuple[NodeId, ...]]) -> None:
        self._request = request
        self._needs = needs  # per node, the nodes whose values it needs
        self._data: dict[NodeId, Tensor] = {}
        self._is_known: list[bool] = []
        self._ops_left = _MAX_OPS
        self._elements_left = _MAX_MADE

    def note(self, node: NodeId, num_elements: int) -> None:
        """Takes in the next node, in order."""
        kind = self._request.graph.nodes[node]
        is_constant = isinstance(kind, Constant) and self._request.constants[kind.name].is_here
        is_known = is_constant or isinstance(kind, Mask) or (isinstance(kind, Op) and _is_known(kind))
        if is_known:
            for part in self._needs[node]:
                is_known = is_known and self._is_known[part]
        self._is_known.append(is_known and num_elements <= _MAX_ELEMENTS)

    def data(self, node: NodeId) -> Tensor | None:
        """The node's value on the CPU, or None when it depends on the model, is drawn, or is large."""
        if not self._is_known[node]:
            return None
        needed = {node}
        pending = [node]
        while pending:
            fresh = [part for part in self._needs[pending.pop()] if part not in needed]
            needed.update(fresh)
            pending.extend(part for part in fresh if part not in self._data)
        for current in sorted(needed - self._data.keys()):  # operands come before their users
            if not self._may_run():
                return None
            made = self._data[current] = self._run(current)
            self._elements_left -= made.numel() if isinstance(made, Tensor) else sum(one.numel() for one in made)
        return self._data[node]

    def value_of(self, op: Op) -> Tensor | None:
        """The value of an op whose node is not noted yet, None where an operand is not known."""
        if not _is_known(op):
            return None
        found = {part: self.data(part) for part in operands(op)}
        known = {part: data for part, data in found.items() if data is not None}
        if len(known) < len(found) or not self._may_run():
            return None
        if op.name == "bincount" and isinstance(op.args[0], Ref):  # has as many places as its largest number says
            least = op.kwargs.get("minlength", op.args[2] if len(op.args) > 2 else 0)
            numbers = known[op.args[0].node]
            largest = max(int(numbers.max()) if numbers.numel() else 0, least if isinstance(least, int) else 0)
            if largest > _MAX_ELEMENTS:
                raise TooLargeError(f"bincount would count {largest} numbers; the limit is {_MAX_ELEMENTS}")
        value = _value(op, known)
        self._elements_left -= sum(data.numel() for data in known.values())
        return value

    def _may_run(self) -> bool:
        self._ops_left -= 1
        return self._ops_left >= 0 and self._elements_left > 0

    def _run(self, position: NodeId) -> Tensor:
        node = self._request.graph.nodes[position]
        if isinstance(node, Constant):
            return tensor_of_raw(self._request.constants[node.name])
        if isinstance(node, Mask):
            return mask_of(self._request, node.invoke)
        assert isinstance(node, Op)
        return _value(node, self._data)


def _value(op: Op, data: Mapping[NodeId, Tensor]) -> Tensor:
    args = tuple([resolve(argument, data) for argument in op.args])
    kwargs = {key: resolve(argument, data) for key, argument in op.kwargs.items()}
    with torch.no_grad():
        value: Tensor = run_op(op.name, args, kwargs)
    return value


def _is_known(op: Op) -> bool:
    """Whether the op's value is as good as known where its operands are."""
    spec = OPS[op.name]
    return not spec.is_random and spec.cost not in _DEAR and spec.reach is not Reach.LOSS


def looks_at_data(op: Op) -> bool:
    """Whether the shape of the op's result may follow from its operands' values, not from their shapes alone."""
    if op.name in ("getitem", "setitem", "set_view"):
        return bool(refs(op.args[1]))
    if op.name == "repeat_interleave":
        return bool(refs(op.args[1:]) or refs(tuple(op.kwargs.values())))
    if OPS[op.name].needs_values:
        return True
    return op.name == "one_hot" and len(op.args) == 1 and not op.kwargs


def mask_of(request: Request, invoke: int) -> Tensor:
    """`[sequences, longest]` bool, True where the left-padded view has a token."""
    prompts = request.invokes[invoke]
    lengths = torch.tensor([len(sequence) for sequence in prompts.sequences])
    return torch.arange(prompts.longest) >= prompts.longest - lengths[:, None]


def tensor_of_raw(raw: RawTensor) -> Tensor:
    """A constant as a tensor of its own memory."""
    dtype = TORCH_DTYPES[raw.dtype]
    if not math.prod(raw.shape):
        return torch.empty(raw.shape, dtype=dtype)
    return torch.frombuffer(bytearray(raw.data), dtype=dtype).reshape(raw.shape)
