"""What modules of a model that is called as it is take and give: the tensors in it, and what lies beside them.

Owns which containers are looked into, and how deep: tuples, lists, mappings and dataclasses.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from engine.arguments import Selector
from engine.writes import is_record
from polytrace.description import MemberInfo

_DEPTH = 4  # keys of a selector at most, as on the wire
_MAX_BESIDE = 256  # of what is no tensor, in one port: the rest is not told of
_PLAIN = (bool, int, float, complex, str, bytes)


def leaves_of(value: Any) -> tuple[str, dict[Selector, Tensor]]:
    """The structure of what a module takes or gives, and the tensors in it, four levels deep."""
    leaves = own_tensors(dict(_tensors(value, ())))
    if isinstance(value, Tensor):
        return "tensor", leaves
    if isinstance(value, Mapping) or is_record(value):
        return "dict", leaves
    return ("list" if isinstance(value, list) else "tuple") if isinstance(value, (tuple, list)) else "other", leaves


def own_tensors(leaves: Mapping[Selector, Tensor]) -> dict[Selector, Tensor]:
    """Without those inside of `torch.func` and `torch.vmap`, which are not what a caller has there."""
    return {selector: tensor for selector, tensor in leaves.items() if not _is_wrapped(tensor)}


def members_of(value: Any) -> tuple[MemberInfo, ...]:
    """What there is beside tensors that are read."""
    return tuple(islice(_beside(value, ()), _MAX_BESIDE))


def _tensors(value: Any, way: Selector) -> Iterator[tuple[Selector, Tensor]]:
    if isinstance(value, Tensor):
        yield way, value
    elif len(way) < _DEPTH:
        for key, member in _inside(value):
            yield from _tensors(member, (*way, key))


def _beside(value: Any, way: Selector) -> Iterator[MemberInfo]:
    if isinstance(value, Tensor) and not _is_wrapped(value):
        return
    inside = list(_inside(value)) if len(way) < _DEPTH else []
    names, why_not = _names_of(value), None if inside or value is None else _why_not(value)
    if names or why_not or value is None or is_record(value):
        yield MemberInfo(selector=way, class_name=type(value).__name__, names=names, why_not=why_not)
    for key, member in inside:
        yield from _beside(member, (*way, key))


def _inside(value: Any) -> Iterator[tuple[int | str, Any]]:
    """The members of what is looked into."""
    if isinstance(value, Mapping):
        yield from ((key, member) for key, member in value.items() if isinstance(key, (str, int)))
    elif is_record(value):
        yield from ((field.name, getattr(value, field.name, None)) for field in fields(value))
    elif isinstance(value, (tuple, list)):
        yield from enumerate(value)


def _names_of(value: Any) -> tuple[str, ...]:
    """The fields of a namedtuple, and of what `max`, `topk` and such give."""
    if type(value).__module__ == "torch.return_types":
        return tuple(type(value).__match_args__)
    return tuple(getattr(value, "_fields", ())) if isinstance(value, tuple) else ()


def _why_not(value: Any) -> str:
    if isinstance(value, Tensor):
        return "is a tensor inside of torch.func or torch.vmap, which its caller does not have"
    if isinstance(value, _PLAIN):
        return "is no tensor"
    if isinstance(value, (tuple, list, Mapping)) or is_record(value):
        return "has no tensors in it, or has them too deep"
    return "is not looked into"


def _is_wrapped(tensor: Tensor) -> bool:
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(tensor))
