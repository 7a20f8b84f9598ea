"""Tensors of a decoder layer by one name in every family: its named points, and what attention and MLP give."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from polytrace.errors import GraphError
from polytrace.graph import Port
from polytrace.lines import user_line
from polytrace.methods.places import attention_of
from polytrace.points import DIMS, owners
from polytrace.tree import join

if TYPE_CHECKING:
    from polytrace.model import Model
    from polytrace.modules import Module

SUBLAYERS = ("attention", "mlp")


def value_of(model: Model, number: int, of: str) -> Any:
    """The tensor of a layer in the open invoke, to be read or changed in place.

    `of` is a named point, or "attention" or "mlp": what that module returns, in families that norm it then before that.
    """
    if of in SUBLAYERS:
        return output_of(module_of(model, number, of))
    if of not in DIMS:
        raise GraphError(
            f"a layer has no {of!r}; it has {', '.join([*SUBLAYERS, *(n for n in DIMS if n != 'router')])}",
            where=user_line(),
        )
    return getattr(model.layers[number], of)


def output_of(module: Module) -> Any:
    """What a module returns; of several tensors the first."""
    table = module._table.ports.get((module._path, Port.OUTPUT.value))
    return module.output if table is None or table.info.structure == "tensor" else module.output[0]


def module_of(model: Model, number: int, kind: str) -> Module:
    """The module that attends, or the one that gives what the MLP adds. Raises GraphError where there is none."""
    if kind == "attention":
        return attention_of(model, number)
    return _mlp(model, number, "W_out")


def taken_by_mlp(model: Model, number: int) -> Any:
    """What the MLP of a layer takes, in the open invoke."""
    return _mlp(model, number, "W_in").input


def heads_of(model: Model, number: int, of: str) -> int:
    """How many heads a point of the open invoke has."""
    return int(value_of(model, number, of).shape[DIMS[of].index("head")])


def _mlp(model: Model, number: int, matrix: str) -> Module:
    """The MLP, or where a layer holds its matrices itself, the module of one."""
    layer = model.layers[number]
    table, path = layer._table, layer._path
    for owner in (owners(table, path).get("mlp_post"), owners(table, path).get("router")):
        if owner is not None and owner != path:
            return model.get_submodule(owner)
    weight = table.parameters.get(join(path, matrix))
    if weight is None or weight.of is None:
        raise GraphError(f"layer {number} of this family has no MLP that is known", where=user_line())
    return model.get_submodule(weight.of.rpartition(".")[0])
