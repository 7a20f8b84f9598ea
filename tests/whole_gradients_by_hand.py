"""Plain autograd with hooks, for models that are called as they are: the oracle of their gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from called_by_hand import Call, first_tensor
from torch import Tensor, nn

TOLERANCE = 1e-6  # of max(1, max|of plain autograd|), float32
Change = Callable[[Tensor], None]  # of a module's first tensor, in place


def weights_of(result: Tensor, seed: int) -> Tensor:
    return torch.randn(result.shape, generator=torch.Generator().manual_seed(seed))


def plain_gradients(
    model: nn.Module, path: str, call: Call, change: Change, scale: float, seeds: tuple[int, ...]
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """What a call gives, and of each loss the gradients of what a module gets and returns in its first visit.

    What it returns is changed, and the gradient of that scaled on its way back.
    """
    got: dict[str, Tensor] = {}
    seen: dict[str, Tensor] = {}

    def watch(name: str, tensor: Tensor) -> Tensor:
        """The tensor as the rest of the model has it."""
        seen[name] = tensor
        tensor.register_hook(lambda gradient: got.__setitem__(name, gradient.clone()))
        return tensor

    def before(_module: nn.Module, args: Any) -> Any:
        if "input" not in seen:
            watch("input", args[0])

    def behind(_module: nn.Module, _args: Any, output: Any) -> None:
        if "output" not in seen:
            tensor = first_tensor(output)
            change(tensor)
            watch("output", tensor).register_hook(lambda gradient: gradient * scale)

    module = model.get_submodule(path)
    handles = [module.register_forward_pre_hook(before), module.register_forward_hook(behind)]
    given = {name: value.clone() if isinstance(value, Tensor) else value for name, value in call.items()}
    try:
        result = first_tensor(model(**given))
    finally:
        for handle in handles:
            handle.remove()
    found = []
    for seed in seeds:
        got.clear()
        (result * weights_of(result, seed)).sum().backward(retain_graph=True)
        found.append((got["input"], got["output"]))
    return result.detach(), found
