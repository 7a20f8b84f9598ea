"""Caches that models of the padded layout make themselves, one a sequence: whatever `use_cache=True` means to a family.

Owns how a family is handed one and gives it back, how many bytes it has, and where a sequence's cache is kept between
two passes: under its trunk's name, within the store's budget. What is in it (keys and values, states of convolutions
and recurrences) only the model knows.

Invariant: a kept cache has all tokens before `length`, at every layer of this shard's window, and no others.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin
from transformers.modeling_outputs import BaseModelOutput

from engine.windows import Window
from scheduling.plan import RequestId, TrunkId

_ENCODED = "encoder_last_hidden_state"  # in the root's output


@dataclass(slots=True, kw_only=True)
class OwnCache:
    """One sequence's cache."""

    name: str  # as the model's forward takes it, and its output has it
    value: Any  # the model's; None before the first forward of a family that makes it itself
    length: int = 0  # tokens that it has
    has_encoder: bool = False
    encoded: Tensor | None = None  # the prompt, as the encoder of a model that has one made it

    @property
    def arguments(self) -> dict[str, Any]:
        """With what the root's forward goes on from here."""
        given = {} if self.value is None else {self.name: self.value}
        if self.has_encoder:  # to which some families hand on that there is to be a cache
            encoded = None if self.encoded is None else BaseModelOutput(last_hidden_state=self.encoded)
            return {**given, "encoder_outputs": encoded}
        return {**given, "use_cache": True}

    @property
    def num_bytes(self) -> int:
        """Of all tensors in it."""
        return sum(tensor.nbytes for tensor in _tensors((self.value, self.encoded), set()))

    def take(self, output: Any) -> None:
        """What the root's forward gives back."""
        if not isinstance(output, Mapping):
            return
        if output.get(self.name) is not None:
            self.value = output[self.name]
        if output.get(_ENCODED) is not None:
            self.encoded = output[_ENCODED]

    def grow(self, num_tokens: int, window: Window, device: torch.device) -> None:
        """A forward of so many tokens is over. Layers that run elsewhere count them too: models ask the first one."""
        self.length += num_tokens
        if isinstance(self.value, DynamicCache) and window.stages > 1:
            counted = torch.zeros(1, 1, num_tokens, 1, device=device)
            for place, layer in enumerate(self.value.layers):
                if not window.first <= place < window.stop and isinstance(layer, CacheLayerMixin):
                    layer.update(counted, counted)

    def fork(self) -> OwnCache:
        """Another sequence's, which goes on from the same tokens."""
        return replace(self, value=copy.deepcopy(self.value))


class Continuation(Protocol):
    """With what a sequence goes on."""

    @property
    def num_bytes(self) -> int: ...


@dataclass(slots=True)
class OwnCaches:
    """Those of one shard. `take_bytes` refuses more than there is room for; `free_bytes` gives back."""

    take_bytes: Callable[[int], None]
    free_bytes: Callable[[int], None]
    _held: dict[RequestId, dict[TrunkId, tuple[Continuation, int]]] = field(default_factory=dict)

    def keep(self, trunk: TrunkId, cache: Continuation) -> None:
        """From now on this is the sequence's; CapacityError when there is no room for it."""
        held = self._held.setdefault(trunk[0], {})
        before = held[trunk][1] if trunk in held else 0
        num_bytes = cache.num_bytes
        self.free_bytes(before)
        held.pop(trunk, None)
        self.take_bytes(num_bytes)
        held[trunk] = cache, num_bytes

    def of(self, trunk: TrunkId) -> Continuation:
        """A sequence's, as the last pass left it."""
        return self._held[trunk[0]][trunk][0]

    def forget(self, request: RequestId) -> None:
        """All of a request's; unknown ones are fine."""
        for _, num_bytes in self._held.pop(request, {}).values():
            self.free_bytes(num_bytes)

    def reset(self) -> None:
        """All."""
        for request in list(self._held):
            self.forget(request)


def _tensors(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """Each tensor once."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for member in value.values():
            yield from _tensors(member, seen)
    elif isinstance(value, (tuple, list)):
        for member in value:
            yield from _tensors(member, seen)
    elif hasattr(value, "__dict__") and type(value).__module__.startswith("transformers."):
        yield from _tensors(vars(value), seen)
