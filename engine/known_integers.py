"""Integers that are known in a forward on fake tensors: what a model looks at to decide where it goes.

Where an image's patches are, how many there are, how long a sequence is: models work such things out of integers among
their arguments. What is made of known integers and constants alone is worked out beside the forward, so that a model's
`if`, `.item()` and `nonzero` have their answers; everything else stays without data.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from polytrace.errors import TooLargeError

_MAX_ELEMENTS = 1 << 22  # of a tensor that is known


class KnownIntegers(TorchDispatchMode):
    """Entered inside of a mode of fake tensors."""

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._mode = mode
        self._known: Any = WeakTensorKeyDictionary()  # fake tensor -> the real one

    def fake(self, tensor: Tensor) -> Tensor:
        """A fake tensor whose values are known."""
        made = self._mode.from_tensor(tensor, static_shapes=True)
        self._known[made] = tensor
        return made

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = (args, dict(kwargs or {}))
        tensors = _tensors_in(given)
        if tensors and all(self._is_known(tensor) for tensor in tensors):
            return self._of_known(func, given, tensors)
        result = func(*given[0], **given[1])
        if not tensors and _is_known_kind(result):  # it was made of numbers
            self._known[result] = self._really(func, *given)
        elif func._schema.is_mutable:
            for tensor in tensors:
                self._known.pop(tensor, None)
        return result

    def _of_known(self, func: Any, given: tuple[tuple[Any, ...], dict[str, Any]], tensors: list[Tensor]) -> Any:
        """Without data first, which says how large it is: what is too large for a known tensor is never made."""
        try:
            result = func(*given[0], **given[1])
        except (DataDependentOutputException, DynamicOutputShapeException):
            self._check_repeats(func, given[0])
            return self._wrapped(self._really(func, *given), tensors)
        made = _tensors_in(result)
        if all(map(_is_known_kind, made)):
            self._known.update(zip(made, _tensors_in(self._really(func, *given)), strict=True))
        return result

    def _check_repeats(self, func: Any, args: tuple[Any, ...]) -> None:
        """Of the ops whose size is in their values, those that give more than they get."""
        packet = func.overloadpacket
        if packet not in (torch.ops.aten.repeat_interleave, torch.ops.aten.bincount):
            return
        counts: Tensor = args[-1] if packet is torch.ops.aten.repeat_interleave else args[0]
        with unset_fake_temporarily():
            real = self._known.get(counts, counts)
            size = int(real.sum() if packet is torch.ops.aten.repeat_interleave else real.max()) if len(real) else 0
        if size > _MAX_ELEMENTS:
            told = f"a call with these arguments makes a tensor of {size} integers"
            raise TooLargeError(f"{told}; where its model looks at them, {_MAX_ELEMENTS} are the limit")

    def _is_known(self, tensor: Tensor) -> bool:
        """A tensor that is not fake is a constant in the model's code."""
        return tensor in self._known or (not isinstance(tensor, FakeTensor) and _is_known_kind(tensor))

    def _really(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The op on what is known, on the host."""

        def real(leaf: Any) -> Any:
            if isinstance(leaf, Tensor):
                return self._known.get(leaf, leaf)
            return torch.device("cpu") if isinstance(leaf, torch.device) else leaf

        with unset_fake_temporarily():
            return func(*tree_map(real, args), **tree_map(real, kwargs))

    def _wrapped(self, result: Any, tensors: list[Tensor]) -> Any:
        """What an op gave, as fake tensors again; the tensor that it changed is itself."""
        own = {id(self._known[tensor]): tensor for tensor in tensors if tensor in self._known}

        def fake(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            if id(leaf) in own:
                return own[id(leaf)]
            if _is_known_kind(leaf):
                return self.fake(leaf)
            return self._mode.from_tensor(leaf, static_shapes=True)

        return tree_map(fake, result)


class PlainLists(TorchFunctionMode):
    """`torch.tensor` of a list of tensors reads their memory, which fake ones do not have: they are asked instead."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.tensor and args and isinstance(args[0], (list, tuple)):
            args = (tree_map(lambda leaf: leaf.tolist() if isinstance(leaf, Tensor) else leaf, args[0]), *args[1:])
        return func(*args, **dict(kwargs or {}))


def _tensors_in(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, Tensor)]


def _is_known_kind(value: Any) -> bool:
    """Whether it is a tensor of numbers that are few enough to be known."""
    return isinstance(value, Tensor) and value.numel() <= _MAX_ELEMENTS
