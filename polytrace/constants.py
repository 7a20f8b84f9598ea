"""The tensors that a user's program brings along, copied when they are used and each kept once."""

from __future__ import annotations

from typing import Any

from polytrace.errors import GraphError
from polytrace.tensors import DTYPES, RawTensor


class Constants:
    """A request's constants while it is recorded."""

    def __init__(self) -> None:
        self.tensors: dict[str, RawTensor] = {}
        self._by_content: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._by_object: dict[tuple[int, int], tuple[Any, str]] = {}  # the object is kept: ids are reused

    def add(self, value: Any, where: str) -> str:
        """The name of a torch tensor or numpy array as it is now. Raises GraphError for anything else."""
        version = getattr(value, "_version", None)
        if version is not None and (id(value), version) in self._by_object:
            return self._by_object[id(value), version][1]
        key = content(value, where)
        name = self._by_content.get(key)
        if name is None:
            name = self._by_content[key] = self._new(*key)
        if version is not None:
            self._by_object[id(value), version] = (value, name)
        return name

    def _new(self, dtype: str, shape: tuple[int, ...], data: bytes) -> str:
        name = f"c{len(self.tensors)}"
        self.tensors[name] = RawTensor(dtype=dtype, shape=shape, data=memoryview(data))
        return name


def content(value: Any, where: str) -> tuple[str, tuple[int, ...], bytes]:
    """Dtype, shape and a copy of the bytes."""
    if hasattr(value, "untyped_storage"):
        return _torch_content(value, where)
    if hasattr(value, "__array__") and not isinstance(value, type):
        import numpy as np

        array = np.asarray(value)
        if array.dtype.name in DTYPES:
            little = array.astype(array.dtype.newbyteorder("<"), copy=False)
            return array.dtype.name, array.shape, little.tobytes()
        raise _unknown_dtype(array.dtype.name, where)
    raise GraphError(
        f"a {type(value).__name__} cannot be part of a trace; use tensors, arrays and numbers", where=where
    )


def _torch_content(value: Any, where: str) -> tuple[str, tuple[int, ...], bytes]:
    import torch

    dtype = str(value.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise _unknown_dtype(dtype, where)
    if value.layout is not torch.strided or value.is_meta:
        raise GraphError("only dense tensors with data can be part of a trace", where=where)
    flat = value.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return dtype, tuple(value.shape), flat.view(torch.uint8).numpy().tobytes()


def _unknown_dtype(name: str, where: str) -> GraphError:
    return GraphError(f"a tensor of dtype {name} cannot be part of a trace; there are {', '.join(DTYPES)}", where=where)
