"""What autograd keeps of a forward for its way back, and that it stays what it was.

A graph may write to a tensor of the model in place where a gradient stops (`engine.tape`). Plain autograd would refuse
to use what it has kept of that memory before; here whoever kept it gets a copy first. What the model itself changes in
place behind the back of autograd is an error, as it is there.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from polytrace.errors import ServiceError


class SavedTensor:
    """One tensor that an operation keeps."""

    __slots__ = ("__weakref__", "tensor", "version")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()  # the same memory
        self.version = tensor._version

    @property
    def is_unchanged(self) -> bool:
        """Whether nobody has written to the memory."""
        return self.tensor._version == self.version


class SavedTensors:
    """What the operations of one forward keep."""

    def __init__(self, coming: Collection[int] = ()) -> None:
        """`coming`: memory of weights that are not there anyway, but come for the forward."""
        self._coming = coming
        self._by_memory: dict[int, list[weakref.ref[SavedTensor]]] = {}
        self._weights: set[int] = set()

    def keeping(self) -> saved_tensors_hooks:
        """A context: operations inside keep their tensors here."""
        return saved_tensors_hooks(self._pack, self._unpack)

    def protect(self, tensors: Iterable[Tensor]) -> None:
        """Their memory is about to be written to: whoever keeps it gets a copy."""
        for tensor in tensors:
            for kept in self._of(tensor):
                if kept.is_unchanged:
                    kept.tensor = kept.tensor.clone()
                    kept.version = kept.tensor._version

    @property
    def num_bytes(self) -> int:
        """Of the memory that is kept; weights are there anyway."""
        return self.num_bytes_with(())

    def num_bytes_with(self, others: Iterable[Tensor]) -> int:
        """The same, with other tensors that are kept."""
        alive = (kept.tensor for refs in self._by_memory.values() for ref in refs if (kept := ref()) is not None)
        sizes = {_memory(tensor): tensor.untyped_storage().nbytes() for tensor in (*alive, *others)}
        return sum(size for memory, size in sizes.items() if memory not in self._weights)

    @contextmanager
    def unchanged(self, tensor: Tensor) -> Iterator[None]:
        """Operations inside count as writing to a tensor's memory and leave it as it is."""
        own = [kept for kept in self._of(tensor) if kept.is_unchanged]
        yield
        for kept in own:
            kept.version = kept.tensor._version

    def _of(self, tensor: Tensor) -> list[SavedTensor]:
        """Those that share a tensor's memory."""
        refs = self._by_memory.get(_memory(tensor), [])
        return [kept for kept in (ref() for ref in refs) if kept is not None]

    def _pack(self, tensor: Tensor) -> SavedTensor:
        kept = SavedTensor(tensor)
        is_weight = isinstance(tensor._base if tensor._is_view() else tensor, nn.Parameter)
        if is_weight and _memory(tensor) not in self._coming:
            self._weights.add(_memory(tensor))
        else:
            refs = self._by_memory.setdefault(_memory(tensor), [])
            refs[:] = [ref for ref in refs if ref() is not None]  # memory may be another's by now
            refs.append(weakref.ref(kept))
        return kept

    def _unpack(self, kept: SavedTensor) -> Tensor:
        if not kept.is_unchanged:
            raise ServiceError("the model changes a tensor in place that its gradient needs, so it has no gradients")
        return kept.tensor


def _memory(tensor: Tensor) -> int:
    number: int = tensor.untyped_storage()._cdata
    return number
