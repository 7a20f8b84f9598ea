"""Plain torch with hooks, for models that are called as they are: the oracle of three interventions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import polytrace

Change = Callable[[Tensor], Tensor | None]  # None: it changed the tensor itself
Call = Mapping[str, Any]


def first_tensor(value: Any) -> Tensor:
    """The tensor that a module is about: what it returns, or the first of that."""
    while not isinstance(value, Tensor):
        value = next(iter(value.values())) if isinstance(value, Mapping) else value[0]
    return value


def with_first(value: Any, tensor: Tensor) -> Any:
    return tensor if isinstance(value, Tensor) else (tensor, *value[1:])


def plain_run(model: nn.Module, path: str, call: Call, change: Change | None = None) -> tuple[Tensor, Tensor]:
    """What a module returns in a call, before the change, and what the model makes of it behind."""
    seen: list[Tensor] = []

    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        tensor = first_tensor(output)
        seen.append(tensor.clone())
        if change is None or len(seen) > 1:
            return None
        new = change(tensor)
        return None if new is None else with_first(output, new)

    handle = model.get_submodule(path).register_forward_hook(hook)
    try:
        with torch.no_grad():
            given = {name: value.clone() if isinstance(value, Tensor) else value for name, value in call.items()}
            return seen_first(seen, first_tensor(model(**given)))
    finally:
        handle.remove()


def seen_first(seen: list[Tensor], result: Tensor) -> tuple[Tensor, Tensor]:
    return seen[0], result


def first_of(port: Any) -> Any:
    """The same of a recorded port."""
    while not hasattr(port, "dtype"):
        port = port[port.keys()[0]]
    return port


def assert_three_interventions(
    plain: nn.Module, path: str, call: Call, other: Call, model: Any = None, shows: float = 0.0
) -> None:
    """A read, an in-place edit and a patch from another call, each with the bits of hooks; and each edit shows by more
    than `shows`. `model`: the same, loaded; None: the plain one is.
    """
    model = polytrace.load(plain) if model is None else model
    module = model.get_submodule(path)
    seen, base = plain_run(plain, path, call)

    with model.trace(**call):
        read, result = first_of(module.output).save(), first_of(model.output).save()
    assert torch.equal(read, seen)
    assert torch.equal(result, base)

    def scale(tensor: Tensor) -> None:
        tensor[..., 0] += 3.0

    _, wanted = plain_run(plain, path, call, scale)
    with model.trace(**call):
        first_of(module.output)[..., 0] += 3.0
        result = first_of(model.output).save()
    assert torch.equal(result, wanted)
    assert (wanted - base).abs().max() > shows

    theirs, _ = plain_run(plain, path, other)
    _, wanted = plain_run(plain, path, call, lambda tensor: 0.5 * tensor + 0.5 * theirs)
    with model.trace() as tracer:
        with tracer.invoke(**other):
            given = first_of(module.output)
        with tracer.invoke(**call):
            own = first_of(module.output)
            _write_first(module, 0.5 * own + 0.5 * given)
            result = first_of(model.output).save()
    assert torch.equal(result, wanted)
    assert (wanted - base).abs().max() > shows


def _write_first(module: Any, value: Any) -> None:
    if hasattr(module.output, "dtype"):
        module.output = value
    else:
        module.output[module.output.keys()[0]] = value
