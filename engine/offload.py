"""Weights that stay in the host's memory, and are on the device while their module runs: for models larger than GPUs.

Whatever reads or calls a module stays on one device and need not know. A module whose weights are kept in the host's
memory copies them (not those of modules inside it) to the device before each of its calls, and lets the copies go
behind it. Outside of calls its parameters are the host's, so who reads them by path has to move them. The copies are
exact: so are all values.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


def offload(model: nn.Module, layers: str, num_bytes: int, device: torch.device) -> int:
    """Moves a model from the host to its device but for at least `num_bytes` of weights, or all; returns their bytes.

    Whole decoder layers are kept back, evenly over the model, then what else there is. Host memory of these is pinned
    when the device is a GPU.
    """
    kept: dict[int, nn.Parameter] = {}
    for parameter in _by_preference(model, layers):
        if sum(each.nbytes for each in kept.values()) >= num_bytes:
            break
        kept[id(parameter)] = parameter
    for parameter in model.parameters():
        if id(parameter) not in kept:
            parameter.data = parameter.data.to(device)
        elif device.type == "cuda":
            parameter.data = parameter.data.pin_memory()
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
        own = [p for p in module._parameters.values() if p is not None and id(p) in kept]
        if own:
            _bring_along(module, own, device)
    return sum(parameter.nbytes for parameter in kept.values())


def _by_preference(model: nn.Module, layers: str) -> Iterator[nn.Parameter]:
    found: Any = model.get_submodule(layers)
    owned = [layer for layer in found if any(True for _ in layer.parameters())]
    for layer in _spread(owned):
        yield from layer.parameters()
    yield from model.parameters()


def _spread(layers: list[nn.Module]) -> Iterable[nn.Module]:
    """Every second, then every second of the rest: those that have to be copied have others between them."""
    while layers:
        yield from layers[1::2] or layers
        layers = layers[::2] if len(layers) > 1 else []


def _bring_along(module: nn.Module, own: list[nn.Parameter], device: torch.device) -> None:
    at_home: list[Tensor] = []

    def bring(_module: nn.Module, _args: Any) -> None:
        at_home[:] = [parameter.data for parameter in own]
        for parameter, home in zip(own, at_home, strict=True):
            parameter.data = home.to(device, non_blocking=True, copy=True)

    def let_go(_module: nn.Module, _args: Any, _output: Any) -> None:
        for parameter, home in zip(own, at_home, strict=True):
            parameter.data = home

    module.register_forward_pre_hook(bring, prepend=True)
    module.register_forward_hook(let_go, always_call=True)  # also when somebody's hook ends the forward
