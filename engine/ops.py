"""What every row of the op table runs: one callable a name. Nothing else is ever called for a graph.

Owns which callable a row has: a form of `engine.forms`, a draw or a tensor of sizes alone (`engine.draws`), else the
torch function that the row is recorded from. Owns how operands become arguments. Knows no graph, model or plan.

Invariants
- No operand is ever changed: every row is out of place, and forms that write (`out`, `inplace`) cannot be reached.
- A result may share memory with an operand (views, `to` without a change): values are read-only for everyone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from engine.draws import draw, make
from engine.forms import FORMS, guarded
from polytrace.errors import GraphError
from polytrace.graph import DType, NodeId, Operand, Ref
from polytrace.ops import OPS
from polytrace.tensors import VALUE_DTYPES
from polytrace.torch_names import function_of

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
    "complex64": torch.complex64,
    "complex128": torch.complex128,
}
DTYPE_NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in TORCH_DTYPES.items()}
assert TORCH_DTYPES.keys() == VALUE_DTYPES.keys()
_CPU = torch.device("cpu")


def run_op(
    name: str,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    seed: tuple[int, ...] | None = None,
    device: torch.device = _CPU,
) -> Any:
    """Runs one op of the table and returns its tensor, or its tuple of tensors for ops with several results.

    `args` and `kwargs` are resolved: tensors for values, torch dtypes, python scalars, slices, nested tuples and lists.
    `seed` is (request seed, number of the draw); random ops need it and their draws depend on nothing else, so they are
    equal on every rank, stage and device. `device` is where ops without operands make their value.
    Raises GraphError for a name or keyword outside the table, torch's errors otherwise.
    """
    if kwargs and name in OPS and not kwargs.keys() <= OPS[name].kwargs:
        unknown = ", ".join(sorted(kwargs.keys() - OPS[name].kwargs))
        raise GraphError(f"{name} does not take {unknown} here")
    run = CALLABLES.get(name)
    if run is not None:
        return run(*args, **kwargs)
    if name in OPS and OPS[name].is_random:
        named = {key: value for key, value in kwargs.items() if key != "draw"}
        return draw(name, args, named, seed, device)
    if name in OPS and OPS[name].is_made:
        return make(name, args, kwargs, device)
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


def _callables() -> dict[str, Callable[..., Any]]:
    found: dict[str, Callable[..., Any]] = {}
    for name, spec in OPS.items():
        if spec.is_random or spec.is_made:
            continue
        form = FORMS.get(name) or function_of(spec)
        if form is not None:
            found[name] = form if name in FORMS else guarded(form)
    return found


CALLABLES: dict[str, Callable[..., Any]] = {**_callables(), "set_view": _set_view}
