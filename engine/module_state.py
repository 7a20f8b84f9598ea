"""What a module that is called as it is has beside its weights: tensors in attributes, buffers, settings, chance.

Owns what is found among them and what is put back: attributes of modules, what lists and dicts among them have, and
the content of buffers and of tensors in attributes. What objects of other kinds have in them is not.
"""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Hashable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from engine.probe import named_tensors
from engine.recorder import memory_of
from engine.whole_places import gpus_of

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


def kept_memory(model: nn.Module) -> frozenset[int]:
    """Of these tensors. What is on no device, because it comes when it is needed, has none that stays."""
    return frozenset(memory_of(tensor) for tensor in kept_tensors(model) if not tensor.is_meta)


def settings_of(model: nn.Module) -> Hashable:
    """What a forward may go by and a user may set after loading: modes, dtypes, numbers, texts, configurations, hooks,
    another forward.
    """
    tensors = tuple([(path, tensor.shape, tensor.dtype) for path, tensor in named_tensors(model)])
    configs: dict[int, Any] = {}
    found: list[Hashable] = []
    for path, module in model.named_modules():
        hooks = tuple(module._forward_pre_hooks), tuple(module._forward_hooks)  # numbers, of which each is used once
        forward = vars(module).get("forward"), getattr(type(module), "forward", None)
        found.append((path, type(module), hooks, forward, *_plain_members(module)))
        config = vars(module).get("config")
        if hasattr(config, "__dict__"):
            configs[id(config)] = config
    return tensors, tuple(found), tuple([_plain_members(config) for config in configs.values()])


class ModuleState:
    """What a module has beside its weights, and what random numbers come next, at one moment."""

    def __init__(self, model: nn.Module) -> None:
        tensors = (*model.buffers(), *attribute_tensors(model))
        self._tensors = [
            (one, one.detach().clone()) for one in tensors if one.layout is torch.strided and not one.is_meta
        ]
        self._members = [(vars(module), dict(vars(module))) for module in model.modules()]
        self._contents = [
            (value, copy.copy(value))
            for _, members in self._members
            for value in members.values()
            if type(value) in (list, dict, OrderedDict, defaultdict)
        ]
        self._host = torch.get_rng_state()
        self._own = {gpu: torch.cuda.get_rng_state(gpu) for gpu in gpus_of(model)}

    def put(self) -> None:
        """Makes everything as it was."""
        for owner, had in (*self._members, *self._contents):
            if isinstance(owner, list):
                owner[:] = had
                continue
            for new in owner.keys() - had.keys():
                del owner[new]
            owner.update(had)
        with torch.no_grad():
            for tensor, content in self._tensors:
                if not torch.equal(tensor, content):
                    tensor.copy_(content)
        torch.set_rng_state(self._host)
        for gpu, state in self._own.items():
            torch.cuda.set_rng_state(state, gpu)


def _plain_members(owner: Any) -> tuple[Hashable, ...]:
    members = vars(owner).items()
    return tuple(
        [(name, type(value), repr(value)) for name, value in members if name not in _OF_TORCH and _is_plain(value)]
    )


_OF_TORCH = frozenset(vars(nn.Module())) - {"training"}


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return len(value) <= _MAX_MEMBERS and all(isinstance(one, _PLAIN) for pair in value.items() for one in pair)
    if isinstance(value, (tuple, list)):
        return len(value) <= _MAX_MEMBERS and all(isinstance(one, _PLAIN) for one in value)
    return isinstance(value, _PLAIN)


def _tensors(value: Any, depth: int) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif depth < _DEPTH and isinstance(value, Mapping):
        for member in value.values():
            yield from _tensors(member, depth + 1)
    elif depth < _DEPTH and isinstance(value, (tuple, list)):
        for member in value:
            yield from _tensors(member, depth + 1)
