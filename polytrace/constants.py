"""The tensors that a user's program brings along, copied when they are used and each kept once."""

from __future__ import annotations

from typing import Any

from polytrace.contents import LARGE_BYTES, digest_of
from polytrace.errors import GraphError
from polytrace.not_values import refuse_among
from polytrace.tensors import DTYPES, RawTensor


class Constants:
    """A request's constants while it is recorded."""

    def __init__(self) -> None:
        self.tensors: dict[str, RawTensor] = {}
        self._by_content: dict[tuple[str, tuple[int, ...], bytes | str], str] = {}  # or by the hash of a large one
        self._again: dict[tuple[int, int], str] = {}  # objects used more than once, and the line of the second use
        self._by_object: dict[tuple[int, int], tuple[Any, str]] = {}  # the object is kept: ids are reused

    def add(self, value: Any, where: str) -> str:
        """The name of a torch tensor or numpy array as it is now, or of what is kept on the service.

        Raises GraphError for anything else.
        """
        if isinstance(kept := getattr(value, "kept_tensor", None), RawTensor):
            return self._named(kept, (kept.dtype, kept.shape, kept.digest or f"state {kept.state}"))
        version = getattr(value, "_version", None)
        if version is not None and (id(value), version) in self._by_object:
            self._again.setdefault((id(value), version), where)
            return self._by_object[id(value), version][1]
        dtype, shape, data = content(value, where)
        digest = digest_of(dtype, shape, data) if len(data) >= LARGE_BYTES else None
        raw = RawTensor(dtype=dtype, shape=shape, data=memoryview(data), digest=digest)
        name = self._named(raw, (dtype, shape, digest or bytes(data)))
        if version is not None:
            self._by_object[id(value), version] = (value, name)
        return name

    def name_of(self, value: Any) -> str | None:
        """The name of a tensor or array as it is now; None when it is no part of the program."""
        found = self._by_object.get((id(value), getattr(value, "_version", None)))  # type: ignore[arg-type]
        return found[1] if found is not None and found[0] is value else None

    def check(self) -> None:
        """Raises GraphError where a tensor used twice is not what it was: torch counts no change through `.data`."""
        for key, where in self._again.items():
            value, name = self._by_object[key]
            if value._version == key[1] and memoryview(content(value, where)[2]) != self.tensors[name].data:
                raise GraphError(
                    "a tensor was changed through .data in this trace, where nothing counts it, and it is used with "
                    "other content before: change it with in-place code under torch.no_grad(), or use a new tensor",
                    where=where,
                )

    def take(self, raw: RawTensor) -> str:
        """The name of a tensor that was recorded before."""
        if (id(raw), -1) not in self._by_object:
            content = raw.digest or (bytes(raw.data) if raw.state is None else f"state {raw.state}")
            self._by_object[id(raw), -1] = (raw, self._named(raw, (raw.dtype, raw.shape, content)))
        return self._by_object[id(raw), -1][1]

    def _named(self, raw: RawTensor, content: tuple[str, tuple[int, ...], bytes | str]) -> str:
        """The name of a content, which is kept once."""
        name = self._by_content.get(content)
        if name is None:
            name = self._by_content[content] = f"c{len(self.tensors)}"
            self.tensors[name] = raw
        return name


def requires_gradients(value: Any) -> bool:
    """Whether it is a tensor of the user's that torch would give a gradient."""
    is_kept = hasattr(type(value), "kept_tensor")  # whose attributes are those of a value
    return not is_kept and bool(getattr(value, "requires_grad", False))


def content(value: Any, where: str) -> tuple[str, tuple[int, ...], bytes | bytearray]:
    """Dtype, shape and a copy of the bytes: one that may be shared with a tensor where it is large."""
    if hasattr(value, "untyped_storage"):
        return _torch_content(value, where)
    if hasattr(value, "__array__") and not isinstance(value, type):
        import numpy as np

        array = np.asarray(value)
        if array.dtype.name in DTYPES:
            little = array.astype(array.dtype.newbyteorder("<"), copy=False)
            return array.dtype.name, array.shape, _copy(little)
        raise _unknown_dtype(array.dtype.name, where)
    refuse_among(value)
    raise GraphError(
        f"a {type(value).__name__} cannot be part of a trace; use tensors, arrays and numbers", where=where
    )


def _copy(array: Any) -> bytes | bytearray:
    if array.nbytes < LARGE_BYTES:
        return bytes(array.tobytes())
    import numpy as np

    return bytearray(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def _torch_content(value: Any, where: str) -> tuple[str, tuple[int, ...], bytes | bytearray]:
    import torch

    dtype = str(value.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise _unknown_dtype(dtype, where)
    if value.layout is not torch.strided or value.is_meta:
        raise GraphError("only dense tensors with data can be part of a trace", where=where)
    dense = value.detach().cpu().resolve_conj().resolve_neg().contiguous()
    # Not reshape: a single element counts as contiguous and would keep a stride that forbids viewing it as bytes.
    flat = dense.as_strided((dense.numel(),), (1,))
    return dtype, tuple(value.shape), _copy(flat.view(torch.uint8).numpy())


def _unknown_dtype(name: str, where: str) -> GraphError:
    return GraphError(f"a tensor of dtype {name} cannot be part of a trace; there are {', '.join(DTYPES)}", where=where)
