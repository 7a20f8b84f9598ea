"""A layer's attention and its MLP as modules: the smallest with all of its parts in it, and what it takes and gives."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from torch import Tensor

from engine.parts import Added, Block, Packed, Role
from engine.residual import SIDE_BY_SIDE, Middle
from engine.seen_layer import SeenLayer, as_rows, first_tensor, is_matrix, is_parallel, is_same


def find_blocks(
    layer: SeenLayer,
    middle: Middle,
    roles: Mapping[Role, Packed],
    out: str | None,
    down: str | None,
    experts: str | None,
) -> dict[str, Block | None]:
    """Both, by the names that `Parts` has for them."""
    attention, mlp = _attention_block(layer, middle, roles, out), _mlp_block(layer, middle, roles, down, experts)
    if middle.why_not == SIDE_BY_SIDE and attention is not None and mlp is not None:
        sides = ("", "input"), ("", "output"), (attention.given or "", "output"), (mlp.given or "", "output")
        first, last, *given = (own for path, side in sides if (own := layer.rows_of(path, side)) is not None)
        if len(given) == 2 and is_same(last - first, given[0] + given[1]):
            attention, mlp = replace(attention, added=attention.given), replace(mlp, added=mlp.given)
    return {"attention_block": attention, "mlp_block": mlp}


def _attention_block(layer: SeenLayer, middle: Middle, roles: Mapping[Role, Packed], out: str | None) -> Block | None:
    if layer.attention is None:
        return None
    module = _around([layer.attention] if out is None else [layer.attention, _owner(out)])
    query = roles.get("q")
    return _block(layer, module, None if query is None else query.module, out, middle.attention_adds, middle)


def _mlp_block(
    layer: SeenLayer, middle: Middle, roles: Mapping[Role, Packed], down: str | None, experts: str | None
) -> Block | None:
    gate = roles["gate"].module if "gate" in roles else None
    inside = [_owner(path) for path in (gate, down, experts) if path is not None]
    if not inside:  # activations that are no modules
        last = layer.rows_of("", "output")
        module = None if middle.rows is None or last is None else _giver(layer, last - middle.rows)
        return None if module is None else _block(layer, module, None, None, middle.mlp_adds, middle)
    if experts is not None and down is not None and not _around(inside):
        return Block(module="", taken=None, given=None)
    return _block(layer, _around(inside), gate, down, middle.mlp_adds, middle)


def _block(
    layer: SeenLayer, module: str, first: str | None, last: str | None, adds: Added | None, middle: Middle
) -> Block | None:
    """What it `adds` was told from the residual (`engine.residual`); here that is beside what the module gives.

    `first` and `last` take and give where there is no module around all of it.
    """
    own = None if adds is None else layer.rows_of(adds.module, "output")
    exact = None if adds is None or adds.is_scaled else adds.module
    if not module:
        rows = None if last is None else layer.rows_of(last, "output")
        is_added = exact is not None and rows is not None and own is not None and is_same(rows, own)
        return Block(module="", taken=first, given=last, added=last if is_added else None)
    block = Block(module=module, taken=module, given=module)
    given = layer.rows_of(module, "output")
    if given is None or middle.rows is None:
        told = None if middle.why_not == SIDE_BY_SIDE else "what the layer makes of it could not be told"
        return replace(block, note=told)
    if adds is None or own is None:
        return replace(block, note="the layer adds something else to the residual")
    if is_parallel(given, own):
        if adds.is_scaled:
            return replace(block, note=f"before the layer adds {adds.scale:.4g} times it to the residual")
        return replace(block, added=module)
    path = adds.module
    if path.startswith(f"{module}."):
        told = f"{path}.output: what {module} gives has the residual in it"
        return replace(block, given=path, added=exact, note=told)
    taken = layer.rows_of(path, "input")
    if taken is not None and is_same(taken, given):
        told = f"before {path}, which makes of it what is added to the residual"
        return replace(block, added=exact, note=told)
    return replace(block, note="the layer adds something else to the residual")


def _giver(layer: SeenLayer, added: Tensor) -> str | None:
    """The outermost module with parts of its own whose output is what is added, but for a norm behind it."""
    wanted = added
    path: str
    for path, side, value in reversed(layer.calls):
        tensor = first_tensor(value)
        if not path or not isinstance(tensor, Tensor) or not is_parallel(as_rows(tensor), wanted):
            continue
        if side == "output" and next(layer.modules[path].children(), None) is not None:
            return path
        taken = None if is_matrix(layer.modules[path]) else layer.rows_of(path, "input")
        if side == "output" and taken is not None and taken.shape == added.shape:
            wanted = taken
    return None


def _owner(path: str) -> str:
    """The module that has another one as a part of its own."""
    return path.rpartition(".")[0]


def _around(paths: Iterable[str]) -> str:
    """The innermost module that is one of these or has it inside, for each."""
    ways = [path.split(".") for path in paths]
    common: list[str] = []
    for names in zip(*ways, strict=False):
        if len(set(names)) > 1:
            break
        common.append(names[0])
    return ".".join(common)
