"""What a row keeps of a layer for the way back of gradients, measured without data.

A forward of the meta model is recorded by autograd as a taped pass is; what operations keep of one layer's computation
is counted, memory that several share once. Weights are not counted: they are there anyway. Rows of experts are counted
by themselves as well: in a pass they come in whole tiles, some of which are partly empty.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedModel

from engine.encoders import of_decoder
from engine.experts import is_experts
from engine.leaves import first_argument
from engine.manners import Manner, forward_names
from polytrace.description import PassLayout

_ROWS = 1024  # where rows attend by a family's own formula, each keeps more the longer its prompt is


@dataclass(frozen=True, slots=True, kw_only=True)
class TapeBytes:
    """What one layer keeps at most."""

    row: int  # bytes a row
    expert_row: int = 0  # bytes of one more row of each of its experts


class _Layer:
    """What one layer keeps."""

    def __init__(self, weights: frozenset[int]) -> None:
        self._weights = weights
        self._found: dict[int, Tensor] = {}  # by memory
        self._rows_of_experts: dict[int, Tensor] = {}  # of these
        self._num_routed = 0  # rows of all experts together, while these run
        self.expert_row_bytes = 0

    def pack(self, tensor: Tensor) -> Tensor:
        memory = tensor.untyped_storage()._cdata
        if memory not in self._weights:
            self._found[memory] = tensor.detach()
            if self._num_routed and tensor.ndim and tensor.shape[0] == self._num_routed:
                self._rows_of_experts[memory] = tensor.detach()
        return tensor.detach()

    def enter(self, _experts: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        self._num_routed = max((value.numel() for value in given if not value.is_floating_point()), default=0)

    def leave(self, experts: Any, _args: Any, _output: Any) -> None:
        if self._num_routed:
            held = sum(tensor.untyped_storage().nbytes() for tensor in self._rows_of_experts.values())
            self.expert_row_bytes += -(-held // self._num_routed) * int(experts.num_experts)
        self._num_routed = 0
        self._rows_of_experts.clear()

    @property
    def num_bytes(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in self._found.values())


def tape_bytes(model: PreTrainedModel, layers: str, manner: Manner, max_tokens: int) -> TapeBytes:
    """Of a meta model that attends in its manner. Raises what its forward raises."""
    rows = min(_ROWS, max_tokens)
    has_mask = not manner.has_engine_attention and "attention_mask" in forward_names(model)
    if not has_mask:
        return _measured(model, layers, manner, rows, has_mask=False)
    try:
        return _measured(model, layers, manner, rows, has_mask=True)
    except RuntimeError:  # transformers may look into a mask, which has no data
        return _measured(model, layers, manner, rows, has_mask=False)


def _measured(model: PreTrainedModel, layers: str, manner: Manner, rows: int, *, has_mask: bool) -> TapeBytes:
    stored = (*model.parameters(), *model.buffers())
    weights = frozenset(tensor.untyped_storage()._cdata for tensor in stored)
    ids = torch.zeros(1, rows, dtype=torch.long, device="meta")
    given: dict[str, Any] = of_decoder(model, ids)
    if manner.layout is PassLayout.PACKED:
        given["position_ids"] = ids
    elif has_mask:
        given["attention_mask"] = torch.ones_like(ids)
    found: list[_Layer] = []
    decoder_layers: Any = model.get_submodule(layers)
    with ExitStack() as stack, torch.enable_grad():
        for layer in decoder_layers:
            found.append(_Layer(weights))
            stack.enter_context(_counting(layer, found[-1]))
            for experts in filter(is_experts, layer.modules()):
                entering = experts.register_forward_pre_hook(found[-1].enter, with_kwargs=True)
                stack.callback(entering.remove)
                stack.callback(experts.register_forward_hook(found[-1].leave).remove)
        model(input_ids=ids, use_cache=False, **given)
    return TapeBytes(
        row=max(-(-one.num_bytes // rows) for one in found),
        expert_row=max(one.expert_row_bytes for one in found),
    )


@contextmanager
def _counting(layer: nn.Module, kept: _Layer) -> Iterator[None]:
    """Forwards of a layer inside are counted, as those of hidden states that have gradients."""
    forward = layer.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        hidden = first_argument(args, kwargs)
        own = hidden.detach().requires_grad_()
        args, kwargs = ((own, *args[1:]), kwargs) if args else (args, {**kwargs, next(iter(kwargs)): own})
        with saved_tensors_hooks(kept.pack, lambda tensor: tensor):
            output = forward(*args, **kwargs)
        return _detached(output)

    layer.forward = counted
    try:
        yield
    finally:
        del layer.forward


def _detached(value: Any) -> Any:
    """So that each layer is counted by itself."""
    if isinstance(value, Tensor):
        return value.detach()
    return type(value)(map(_detached, value)) if type(value) in (tuple, list) else value
