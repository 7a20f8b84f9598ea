"""What every row of the op table runs: one explicit callable a name. Nothing else is ever called for a graph.

Owns the callables, how operands become arguments, and the draws of random ops. Knows no graph, model or plan.

Invariants
- No operand is ever changed: every row is out of place, and forms that write (`out`, `inplace`) cannot be reached.
- A result may share memory with an operand (views, `to` without a change): values are read-only for everyone.
- An index that is out of range is an error of the op on every device: a GPU kernel would end the process for all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor

from engine.copies import to_device
from engine.ranges import check_along, check_index, check_range
from polytrace.errors import GraphError
from polytrace.graph import DType, NodeId, Operand, Ref
from polytrace.ops import OPS
from polytrace.tensors import DTYPES

TORCH_DTYPES: dict[str, torch.dtype] = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
    "int32": torch.int32,
    "int16": torch.int16,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "bool": torch.bool,
}
DTYPE_NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in TORCH_DTYPES.items()}
assert TORCH_DTYPES.keys() == DTYPES.keys()


def run_op(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, seed: tuple[int, int] | None = None) -> Any:
    """Runs one op of the table and returns its tensor, or its tuple of tensors for ops with several results.

    `args` and `kwargs` are resolved: tensors for values, torch dtypes, python scalars, slices, nested tuples and lists.
    `seed` is (request seed, node id); random ops need it and their draws depend on nothing else, so they are equal on
    every rank, stage and device. Raises GraphError for a name or keyword outside the table, torch's errors otherwise.
    """
    if kwargs and name in OPS and not kwargs.keys() <= OPS[name].kwargs:
        unknown = ", ".join(sorted(kwargs.keys() - OPS[name].kwargs))
        raise GraphError(f"{name} does not take {unknown} here")
    run = CALLABLES.get(name)
    if run is not None:
        return run(*args, **kwargs)
    if name in _RANDOM:
        return _draw(name, args, kwargs, seed)
    raise GraphError(f"there is no operation {name!r}")


def resolve(operand: Operand, values: Mapping[NodeId, Any] | Sequence[Any]) -> Any:
    """An operand as an argument for `run_op`: `values[node id]` for a Ref, the torch dtype for a DType, itself else."""
    if isinstance(operand, Ref):
        return values[operand.node]
    if isinstance(operand, tuple):
        return tuple([resolve(part, values) for part in operand])
    if isinstance(operand, list):
        return [resolve(part, values) for part in operand]
    if isinstance(operand, slice):
        return slice(resolve(operand.start, values), resolve(operand.stop, values), resolve(operand.step, values))
    if isinstance(operand, DType):
        return TORCH_DTYPES[operand.name]
    return operand


# --- indexing and in-place code as new values


def _getitem(base: Tensor, index: Any) -> Tensor:
    if base.is_cuda:
        check_index(base, index)
        index = _on_device(index, base.device)
    return _TENSOR_GETITEM(base, index)


def _item(results: Any, position: int) -> Tensor:
    if not isinstance(results, (tuple, list)):
        raise TypeError("item takes one of several results; this value is one tensor")
    taken: Tensor = results[position]
    return taken


def _left_pad(parts: list[Tensor], dims: tuple[int, ...]) -> Tensor:
    """Views below each other, each with zeros in front along `dims`."""
    shape = [sum(part.shape[0] for part in parts), *parts[0].shape[1:]]
    for dim in dims:
        shape[dim] = max(part.shape[dim] for part in parts)
    padded, first = parts[0].new_zeros(shape), 0
    for part in parts:
        place = [slice(first, first + part.shape[0]), *[slice(None)] * (padded.ndim - 1)]
        for dim in dims:
            place[dim] = slice(shape[dim] - part.shape[dim], None)
        if padded[tuple(place)].shape != part.shape:
            raise ValueError(f"views of shapes {list(parts[0].shape)} and {list(part.shape)} do not go together")
        padded[tuple(place)] = part
        first += part.shape[0]
    return padded


def _setitem(base: Tensor, index: Any, value: Any) -> Tensor:
    if base.is_cuda:
        check_index(base, index)
        index = _on_device(index, base.device)
    if isinstance(value, Tensor) and value.dtype is not base.dtype:
        value = value.to(base.dtype)  # torch does so for slices and refuses it for lists; an assignment is cast, always
    changed = base.clone()
    changed[index] = value
    return changed


def _on_device(index: Any, device: torch.device) -> Any:
    """An index whose lists torch would copy to the device by a copy that the host waits for."""
    if isinstance(index, tuple):
        return tuple([_on_device(part, device) for part in index])
    is_plain = isinstance(index, list) and all(isinstance(part, int) for part in index)
    return to_device(index, device) if is_plain else index


def _set_view(
    base: Tensor, steps: Sequence[tuple[str, tuple[Any, ...], Sequence[tuple[str, Any]]]], value: Any
) -> Tensor:
    changed = base.clone()
    view: Any = changed
    for name, args, kwargs in steps:
        if name != "item" and not (name in OPS and OPS[name].is_view):
            raise GraphError(f"{name} makes a copy: in-place code behind it cannot reach the value")
        view = run_op(name, (view, *args), dict(kwargs))
    if not isinstance(view, Tensor):
        raise TypeError("in-place code needs one tensor; take one of the results first")
    if view.untyped_storage()._cdata != changed.untyped_storage()._cdata:
        raise GraphError("an index with tensors or lists makes a copy: in-place code behind it cannot reach the value")
    view[...] = value
    return changed


# --- forms of torch's functions that cannot write, name files or devices


def _to(base: Tensor, dtype: torch.dtype | Tensor) -> Tensor:
    target = dtype.dtype if isinstance(dtype, Tensor) else dtype
    if not isinstance(target, torch.dtype):
        raise TypeError("to takes a dtype, or a tensor whose dtype is meant; values have no device to choose")
    return base.to(target)


def _silu(input: Tensor) -> Tensor:
    return functional.silu(input)


def _normalize(input: Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12) -> Tensor:
    return functional.normalize(input, p, dim, eps)


def _split(
    tensor: Tensor,
    split_size: int | Sequence[int] | None = None,
    dim: int = 0,
    *,
    split_size_or_sections: int | Sequence[int] | None = None,
) -> tuple[Tensor, ...]:
    # the method and the function name their argument differently
    sizes = split_size if split_size is not None else split_size_or_sections
    if sizes is None:
        raise TypeError("split needs the size of a part, or a list of sizes")
    return torch.split(tensor, sizes if isinstance(sizes, int) else list(sizes), dim)


def _type_as(base: Tensor, other: Tensor) -> Tensor:
    return base.to(other.dtype)


def _where_method(base: Tensor, condition: Tensor, other: Any) -> Tensor:
    return torch.where(condition, base, other)


# --- index ops: the range is checked first, because a GPU kernel does not raise


def _gather(input: Tensor, dim: int, index: Tensor) -> Tensor:
    if index.is_cuda:
        check_along(input, dim, index)
    return torch.gather(input, dim, index)


def _index_select(input: Tensor, dim: int, index: Tensor) -> Tensor:
    if index.is_cuda:
        check_along(input, dim, index)
    return torch.index_select(input, dim, index)


def _take_along_dim(input: Tensor, indices: Tensor, dim: int | None = None) -> Tensor:
    if indices.is_cuda and dim is None:
        check_range(indices, input.numel(), is_signed=False)
    elif indices.is_cuda and dim is not None:
        check_along(input, dim, indices)
    return torch.take_along_dim(input, indices, dim)


def _scatter(input: Tensor, dim: int, index: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if index.is_cuda:
        check_along(input, dim, index)
    return torch.scatter(input, dim, index, *args, **kwargs)


def _scatter_add(input: Tensor, dim: int, index: Tensor, src: Tensor) -> Tensor:
    if index.is_cuda:
        check_along(input, dim, index)
    return torch.scatter_add(input, dim, index, src)


def _index_add(input: Tensor, dim: int, index: Tensor, source: Tensor, *, alpha: float = 1) -> Tensor:
    if index.is_cuda:
        check_along(input, dim, index)
    return torch.index_add(input, dim, index, source, alpha=alpha)


def _one_hot(tensor: Tensor, num_classes: int = -1) -> Tensor:
    if tensor.is_cuda:
        check_range(tensor, num_classes if num_classes >= 0 else None, is_signed=False)
    return functional.one_hot(tensor, num_classes)


# --- random ops


def _draw(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], seed: tuple[int, int] | None) -> Tensor:
    """A draw from a CPU generator of its own, whatever the device, so that all shards draw the same numbers."""
    make = _RANDOM[name]
    like, dtype = _like_dtype(*args, **kwargs)
    if not dtype.is_floating_point:
        raise TypeError(f"{name} needs a floating dtype, not {DTYPE_NAMES.get(dtype, dtype)}")
    if like.is_meta:
        return torch.empty(like.shape, dtype=dtype, device="meta")
    if seed is None:
        raise ValueError(f"{name} needs the request's seed and the node's id")
    digest = hashlib.blake2b(f"{seed[0]}:{seed[1]}".encode(), digest_size=4).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
    drawn: Tensor = make(like.shape, dtype=dtype, generator=generator)
    return to_device(drawn, like.device)


def _like_dtype(input: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, torch.dtype]:
    return input, dtype or input.dtype


_TENSOR_GETITEM: Callable[[Tensor, Any], Tensor] = Tensor.__getitem__

_RANDOM: dict[str, Callable[..., Tensor]] = {"randn_like": torch.randn, "rand_like": torch.rand}

# Methods stand where torch takes sizes or dims one by one as well as in a tuple (`h.permute(0, 2, 1)`).
CALLABLES: dict[str, Callable[..., Any]] = {
    # arithmetic
    "add": torch.add,
    "sub": torch.sub,
    "rsub": torch.rsub,
    "mul": torch.mul,
    "div": torch.div,
    "rdiv": Tensor.__rtruediv__,
    "floor_divide": torch.floor_divide,
    "rfloor_divide": Tensor.__rfloordiv__,
    "remainder": torch.remainder,
    "rremainder": Tensor.__rmod__,
    "pow": torch.pow,
    "rpow": Tensor.__rpow__,
    "neg": torch.neg,
    "abs": torch.abs,
    "exp": torch.exp,
    "expm1": torch.expm1,
    "log": torch.log,
    "log2": torch.log2,
    "log10": torch.log10,
    "log1p": torch.log1p,
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
    "square": torch.square,
    "reciprocal": torch.reciprocal,
    "sign": torch.sign,
    "sin": torch.sin,
    "cos": torch.cos,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "erf": torch.erf,
    "clamp": torch.clamp,
    "round": torch.round,
    "floor": torch.floor,
    "ceil": torch.ceil,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "relu": torch.relu,
    "gelu": functional.gelu,
    "silu": _silu,
    "softplus": functional.softplus,
    "nan_to_num": torch.nan_to_num,
    "lerp": torch.lerp,
    # comparison and logic
    "eq": torch.eq,
    "ne": torch.ne,
    "lt": torch.lt,
    "le": torch.le,
    "gt": torch.gt,
    "ge": torch.ge,
    "isfinite": torch.isfinite,
    "isinf": torch.isinf,
    "isnan": torch.isnan,
    "bitwise_and": torch.bitwise_and,
    "bitwise_or": torch.bitwise_or,
    "bitwise_xor": torch.bitwise_xor,
    "bitwise_not": torch.bitwise_not,
    "logical_and": torch.logical_and,
    "logical_or": torch.logical_or,
    "logical_not": torch.logical_not,
    "where": torch.where,
    "where_method": _where_method,
    "masked_fill": torch.masked_fill,
    # reductions
    "sum": torch.sum,
    "mean": torch.mean,
    "prod": torch.prod,
    "std": torch.std,
    "var": torch.var,
    "amax": torch.amax,
    "amin": torch.amin,
    "median": torch.median,
    "max": torch.max,
    "min": torch.min,
    "argmax": torch.argmax,
    "argmin": torch.argmin,
    "count_nonzero": torch.count_nonzero,
    "all": torch.all,
    "any": torch.any,
    "logsumexp": torch.logsumexp,
    "norm": Tensor.norm,
    "linalg_norm": torch.linalg.norm,
    "vector_norm": torch.linalg.vector_norm,
    "cumsum": torch.cumsum,
    "cumprod": torch.cumprod,
    # products
    "matmul": torch.matmul,
    "rmatmul": Tensor.__rmatmul__,
    "bmm": torch.bmm,
    "mm": torch.mm,
    "dot": torch.dot,
    "outer": torch.outer,
    "einsum": torch.einsum,
    "linear": functional.linear,
    "cosine_similarity": torch.cosine_similarity,
    # softmax and normalisation
    "softmax": torch.softmax,
    "log_softmax": torch.log_softmax,
    "layer_norm": functional.layer_norm,
    "normalize": _normalize,
    # selection
    "topk": torch.topk,
    "sort": torch.sort,
    "argsort": torch.argsort,
    "gather": _gather,
    "index_select": _index_select,
    "take_along_dim": _take_along_dim,
    "scatter": _scatter,
    "scatter_add": _scatter_add,
    "index_add": _index_add,
    "one_hot": _one_hot,
    "tril": torch.tril,
    "triu": torch.triu,
    # joining
    "cat": torch.cat,
    "stack": torch.stack,
    # views and layout
    "getitem": _getitem,
    "view": Tensor.view,
    "reshape": Tensor.reshape,
    "flatten": torch.flatten,
    "unflatten": Tensor.unflatten,
    "transpose": torch.transpose,
    "permute": Tensor.permute,
    "t": torch.t,
    "movedim": torch.movedim,
    "squeeze": torch.squeeze,
    "unsqueeze": torch.unsqueeze,
    "expand": Tensor.expand,
    "expand_as": Tensor.expand_as,
    "select": torch.select,
    "narrow": torch.narrow,
    "diagonal": torch.diagonal,
    "unbind": torch.unbind,
    "split": _split,
    "chunk": torch.chunk,
    "repeat": Tensor.repeat,
    "repeat_interleave": torch.repeat_interleave,
    "flip": Tensor.flip,
    "roll": torch.roll,
    # dtype and copies
    "to": _to,
    "float": Tensor.float,
    "double": Tensor.double,
    "half": Tensor.half,
    "bfloat16": Tensor.bfloat16,
    "long": Tensor.long,
    "int": Tensor.int,
    "bool": Tensor.bool,
    "type_as": _type_as,
    "clone": torch.clone,
    "contiguous": Tensor.contiguous,
    "detach": torch.detach,
    "zeros_like": torch.zeros_like,
    "ones_like": torch.ones_like,
    "full_like": torch.full_like,
    # recorded by the client
    "item": _item,
    "setitem": _setitem,
    "set_view": _set_view,
    "left_pad": _left_pad,
}
