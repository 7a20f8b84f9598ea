"""Forms of torch's functions that a graph may reach: those that torch would let write, draw or leave their range.

Every row of the op table without a form here runs its torch function as it is, behind `guarded`.

Invariants
- No operand is ever changed: forms that write (`out`, `inplace`, running statistics) cannot be reached.
- An index that is out of range is an error of the op on every device: a GPU kernel would end the process for all.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor

from engine.copies import to_device
from engine.ranges import check_along, check_index, check_range
from engine.row_products import by_equation, product

_WRITING = ("inplace", "out")  # parameters that make a function change a tensor


def guarded(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function without its parameters that write; itself when it has none."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return function  # torch's own kernels take `out` by keyword only, and the table lets none pass
    names = [one.name for one in parameters if one.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    first = min((names.index(name) for name in _WRITING if name in names), default=None)
    if first is None:
        return function

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        if len(args) > first:
            raise TypeError(f"{function.__name__} takes {first} positional arguments here, not {len(args)}")
        return function(*args, **kwargs)

    return run


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


def _left_pad(parts: list[Tensor], dims: tuple[int, ...], *, unseen: tuple[int, ...] = ()) -> Tensor:
    """Views below each other, each with zeros in front along `dims`; -inf at each sequence's first `unseen` keys."""
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
    if unseen and len(unseen) != shape[0]:
        raise ValueError(f"{len(unseen)} numbers of pads do not go with {shape[0]} sequences")
    for sequence, pads in enumerate(unseen):
        padded[sequence, :, pads:, :pads] = -torch.inf
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


def _cond(predicate: Tensor, if_true: Tensor, if_false: Tensor) -> Tensor:
    """One of two values, whole; chosen where the number is, so that no host waits for a device."""
    if predicate.numel() != 1:
        raise TypeError(f"polytrace.cond looks at one number, not at a value of shape {list(predicate.shape)}")
    if (if_true.shape, if_true.dtype) != (if_false.shape, if_false.dtype):
        raise TypeError(
            f"both sides of polytrace.cond have one shape and dtype, not {list(if_true.shape)} of {if_true.dtype} and "
            f"{list(if_false.shape)} of {if_false.dtype}"
        )
    return torch.where(predicate.reshape(()) != 0, if_true, if_false)


# --- forms that cannot write, name files or devices


def _to(base: Tensor, dtype: torch.dtype | Tensor) -> Tensor:
    target = dtype.dtype if isinstance(dtype, Tensor) else dtype
    if not isinstance(target, torch.dtype):
        raise TypeError("to takes a dtype, or a tensor whose dtype is meant; values have no device to choose")
    return base.to(target)


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


def _empty_like(input: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.zeros_like(input, dtype=dtype)


def _new_empty(base: Tensor, *size: Any, **named: Any) -> Tensor:
    return base.new_zeros(*size, **named)


def _lstsq(A: Tensor, B: Tensor, rcond: float | None = None, *, driver: str | None = None) -> tuple[Tensor]:
    """The solution alone: whether there are residuals depends on values."""
    solution: Tensor = torch.linalg.lstsq(A, B, rcond, driver=driver).solution
    return (solution,)


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
) -> Tensor:
    if max_norm is not None:
        raise TypeError("embedding with max_norm changes its weight; write the norm down")
    if input.is_cuda:
        check_range(input, weight.shape[0], is_signed=False)
    return functional.embedding(input, weight, padding_idx)


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if training and running_mean is not None:
        raise TypeError("batch_norm in training mode changes its running statistics: call module.eval() first")
    return functional.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if use_input_stats and running_mean is not None:
        raise TypeError("instance_norm in training mode changes its running statistics: call module.eval() first")
    return functional.instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **named: Any,
) -> Tensor:
    if dropout_p:
        raise TypeError("scaled_dot_product_attention draws nothing here: write dropout_p=0.0")
    return functional.scaled_dot_product_attention(query, key, value, attn_mask, 0.0, is_causal, **named)


# --- index ops: the range is checked first, because a GPU kernel does not raise


def _along_dim(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function of (input, dim, index, ...) whose index has its range checked."""

    def run(input: Tensor, dim: int, index: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if index.is_cuda:
            check_along(input, dim, index)
        return function(input, dim, index, *args, **kwargs)

    return run


def _take_along_dim(input: Tensor, indices: Tensor, dim: int | None = None) -> Tensor:
    if indices.is_cuda and dim is None:
        check_range(indices, input.numel(), is_signed=False)
    elif indices.is_cuda and dim is not None:
        check_along(input, dim, indices)
    return torch.take_along_dim(input, indices, dim)


def _take(input: Tensor, index: Tensor) -> Tensor:
    if index.is_cuda:
        check_range(index, input.numel(), is_signed=True)
    return torch.take(input, index)


def _put(input: Tensor, index: Tensor, source: Tensor, accumulate: bool = False) -> Tensor:
    if index.is_cuda:
        check_range(index, input.numel(), is_signed=True)
    return torch.put(input, index, source, accumulate)


def _index_put(input: Tensor, indices: Sequence[Tensor], values: Tensor, accumulate: bool = False) -> Tensor:
    if input.is_cuda:
        check_index(input, tuple(indices))
    return torch.index_put(input, tuple(indices), values, accumulate)


def _matmul(input: Tensor, other: Tensor) -> Tensor:
    found = product(input, other)
    return torch.matmul(input, other) if found is None else found


def _einsum(equation: str, *operands: Any) -> Tensor:
    parts = operands[0] if len(operands) == 1 and isinstance(operands[0], (tuple, list)) else operands
    found = by_equation(equation, *parts) if len(parts) == 2 else None
    return torch.einsum(equation, *operands) if found is None else found


def _one_hot(tensor: Tensor, num_classes: int = -1) -> Tensor:
    if tensor.is_cuda:
        check_range(tensor, num_classes if num_classes >= 0 else None, is_signed=False)
    return functional.one_hot(tensor, num_classes)


def _of_classes(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A loss whose targets are numbers of classes, in dimension 1 or alone."""

    def run(input: Tensor, target: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if target.is_cuda and not target.is_floating_point():
            ignored = kwargs.get("ignore_index", -100)
            classes = input.shape[1 if input.dim() > 1 else 0]
            check_range(torch.where(target == ignored, 0, target), classes, is_signed=False)
        return function(input, target, *args, **kwargs)

    return run


def _between(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A loss of two values that broadcast, of which torch would warn."""

    def run(input: Tensor, target: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return function(*torch.broadcast_tensors(input, target), *args, **kwargs)

    return run


def _cross_entropy(input: Tensor, target: Tensor, weight: Tensor | None = None, **named: Any) -> Tensor:
    return functional.cross_entropy(input, target, weight, **named)


def _nll_loss(input: Tensor, target: Tensor, weight: Tensor | None = None, **named: Any) -> Tensor:
    return functional.nll_loss(input, target, weight, **named)


def _binary_cross_entropy(input: Tensor, target: Tensor, weight: Tensor | None = None, **named: Any) -> Tensor:
    if input.is_cuda and not bool(((input >= 0) & (input <= 1)).all()):
        raise ValueError("binary_cross_entropy needs probabilities from 0 to 1")
    return functional.binary_cross_entropy(input, target, weight, **named)


def _kl_div(input: Tensor, target: Tensor, reduction: str = "mean", *, log_target: bool = False) -> Tensor:
    """As torch's, which warns of its mean."""
    if reduction not in ("none", "mean", "sum", "batchmean"):
        raise ValueError(f"{reduction} is not a reduction")
    parts = functional.kl_div(input, target, reduction="none", log_target=log_target)
    if reduction == "none":
        return parts
    if reduction == "mean":
        return parts.mean()
    return parts.sum() if reduction == "sum" else parts.sum() / (input.shape[0] if input.dim() else 1)


_TENSOR_GETITEM: Callable[[Tensor, Any], Tensor] = Tensor.__getitem__

_INDEXED = ("gather", "index_select", "scatter", "scatter_add", "scatter_reduce")
_FILLED = ("index_add", "index_copy", "index_fill")

# Methods stand where torch takes sizes or dims one by one as well as in a tuple (`h.permute(0, 2, 1)`).
FORMS: dict[str, Callable[..., Any]] = {
    **{name: _along_dim(getattr(torch, name)) for name in (*_INDEXED, *_FILLED)},
    **{name: _between(getattr(functional, name)) for name in ("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss")},
    "batch_norm": _batch_norm,
    "binary_cross_entropy": _binary_cross_entropy,
    "cond": _cond,
    "cross_entropy": _of_classes(_cross_entropy),
    "einsum": _einsum,
    "embedding": _embedding,
    "empty_like": _empty_like,
    "flip": Tensor.flip,
    "getitem": _getitem,
    "index_put": _index_put,
    "instance_norm": _instance_norm,
    "item": _item,
    "kl_div": _kl_div,
    "lstsq": _lstsq,
    "matmul": _matmul,
    "new_empty": _new_empty,
    "nll_loss": _of_classes(_nll_loss),
    "norm": Tensor.norm,
    "one_hot": _one_hot,
    "permute": Tensor.permute,
    "put": _put,
    "reshape": Tensor.reshape,
    "scaled_dot_product_attention": _attention,
    "setitem": _setitem,
    "left_pad": _left_pad,
    "split": _split,
    "take": _take,
    "take_along_dim": _take_along_dim,
    "tile": Tensor.tile,
    "to": _to,
    "type_as": _type_as,
    "unflatten": Tensor.unflatten,
    "where_method": _where_method,
}
