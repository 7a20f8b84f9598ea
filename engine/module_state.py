"""What a module that is called as it is has beside its weights: tensors in attributes, buffers, settings, chance.

Owns what is found among them and what is put back: buffers, numbers and texts. A list that a forward appends to is not.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from engine.probe import named_tensors

_DEPTH = 3  # of lists, tuples and dicts in an attribute
_MAX_MEMBERS = 64  # of a setting that is a list
_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)


def attribute_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Tensors that modules keep as attributes of their own, which are neither parameters nor buffers."""
    known = {id(tensor) for _, tensor in named_tensors(model)}
    for module in model.modules():
        for value in vars(module).values():
            for tensor in _tensors(value, 0):
                if id(tensor) not in known:
                    known.add(id(tensor))
                    yield tensor


def kept_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Those and all weights and buffers: what is there behind a call. Dense ones."""
    for tensor in (*(own for _, own in named_tensors(model)), *attribute_tensors(model)):
        if tensor.layout is torch.strided:
            yield tensor


def settings_of(model: nn.Module) -> Hashable:
    """What a forward may go by and a user may set after loading: modes, dtypes, numbers, texts, configurations."""
    tensors = tuple([(path, tensor.shape, tensor.dtype) for path, tensor in named_tensors(model)])
    configs: dict[int, Any] = {}
    found: list[Hashable] = []
    for path, module in model.named_modules():
        found.append((path, type(module), *_plain_members(module)))
        config = vars(module).get("config")
        if hasattr(config, "__dict__"):
            configs[id(config)] = config
    return tensors, tuple(found), tuple([_plain_members(config) for config in configs.values()])


class ModuleState:
    """Buffers, numbers and texts of modules, and what random numbers come next, at one moment."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._device = device
        self._buffers = [
            (module._buffers, name, buffer, buffer.clone())
            for module in model.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        self._plain = [
            (vars(module), {name: value for name, value in vars(module).items() if isinstance(value, _PLAIN)})
            for module in model.modules()
        ]
        self._host = torch.get_rng_state()
        self._own = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def put(self) -> None:
        """Makes everything as it was."""
        with torch.no_grad():
            for buffers, name, buffer, content in self._buffers:
                buffers[name] = buffer
                if not buffer.is_meta and not torch.equal(buffer, content):
                    buffer.copy_(content)
        for members, plain in self._plain:
            members.update(plain)
        torch.set_rng_state(self._host)
        if self._own is not None:
            torch.cuda.set_rng_state(self._own, self._device)


def _plain_members(owner: Any) -> tuple[Hashable, ...]:
    return tuple([(name, plain) for name, value in vars(owner).items() if (plain := _plain(value)) is not _OTHER])


_OTHER = object()


def _plain(value: Any) -> Any:
    if isinstance(value, _PLAIN):
        return type(value), repr(value)
    is_short = isinstance(value, (tuple, list)) and len(value) <= _MAX_MEMBERS
    return (type(value), repr(value)) if is_short and all(isinstance(one, _PLAIN) for one in value) else _OTHER


def _tensors(value: Any, depth: int) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif depth < _DEPTH and isinstance(value, Mapping):
        for member in value.values():
            yield from _tensors(member, depth + 1)
    elif depth < _DEPTH and isinstance(value, (tuple, list)):
        for member in value:
            yield from _tensors(member, depth + 1)
