"""What a module takes or gives at one visit of a call, while a request reads and writes it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from engine.arguments import Selector
from engine.recorder import memory_of
from engine.writes import member_of, with_member


class Side:
    """What a module takes or gives at one visit, while a request looks at it."""

    def __init__(
        self, value: Any, changing: Callable[[Tensor], None], kept: Collection[int], *, is_graded: bool = False
    ) -> None:
        """`changing` hears of tensors that are about to be written to; `kept` is memory of the model itself;
        `is_graded`: the model has gradients on by itself.
        """
        self.value = value
        self.is_graded = is_graded
        self._changing = changing
        self._kept = kept

    def has_past(self, selector: Selector) -> bool:
        """Whether torch knows what a tensor in it was made of, or differentiates by it."""
        return self._tensor(selector).requires_grad

    def read(self, selector: Selector) -> Tensor:
        """A snapshot of a tensor in it."""
        return self._tensor(selector).clone()

    def write(self, selector: Selector, given: Tensor, *, in_place: bool) -> None:
        """Gives a tensor in it other content (`in_place`), or puts another in its place for who takes it from here."""
        tensor = self._tensor(selector)
        if given.shape != tensor.shape:
            raise ValueError(f"the value has shape {list(given.shape)}, the site {list(tensor.shape)} in this call")
        if in_place:
            if memory_of(tensor) in self._kept:
                raise ValueError("the model keeps this tensor behind the call: write `site = value`")
            self._changing(tensor)
            tensor.copy_(given)
        else:
            self._put(selector, given)

    def _put(self, selector: Selector, given: Tensor) -> None:
        self.value = with_member(self.value, selector, torch.empty_like(self._tensor(selector)).copy_(given))

    def _tensor(self, selector: Selector) -> Tensor:
        return self._whole(selector)

    def _whole(self, selector: Selector) -> Tensor:
        found = self.value
        for key in selector:
            found = member_of(found, key)
        if not isinstance(found, Tensor):
            raise LookupError("there is no tensor here in this call: what it gives depends on its values")
        if found.layout is not torch.strided or found.is_nested:
            raise LookupError("in this call the tensor here is a nested or sparse one, which is not read or written")
        return found
