"""Whether a body works on each prompt by itself: the prompts' dimension, followed through every op of its graph.

A body is recorded with one prompt, so every value that has something of it has a dimension of size 1 that stands for
all prompts of a batch. This file follows that dimension. An op that would run over it, pick from it or lose it mixes
prompts (`polytrace.ops.contractions` says what an op runs over); so may an op of which nothing is known. Then the body
means what it says only with all prompts at once, and the map says so instead of giving each prompt a number of its own.

Knows shapes as they are told and no torch.
"""

from __future__ import annotations

from collections.abc import Sequence

from polytrace.certificate import ValueShape
from polytrace.graph import Call, Constant, Mask, Node, Op, Parameter, Read, Ref, Save, Write, operands
from polytrace.maps.row_reach import BY_REACH
from polytrace.maps.row_rules import BY_NAME
from polytrace.maps.row_values import Dim, MixesError, Rows, Rule, Shape
from polytrace.ops import OPS, Reach
from polytrace.ops.contractions import contracted, reduced_dims


class MixesPromptsError(Exception):
    """An op that runs over prompts, or may: in words, and the user's line."""

    def __init__(self, node: Node) -> None:
        name = node.name if isinstance(node, Op) else getattr(node, "module", type(node).__name__.lower())
        is_unknown = isinstance(node, Op) and _rule_of(node) is None
        self.told = f"{name} {'may work' if is_unknown else 'works'} on several prompts at once"
        self.where = node.where
        super().__init__(f"{self.told} ({self.where})")


def prompt_dims(nodes: Sequence[Node], shapes: Sequence[ValueShape | None]) -> list[Dim]:
    """Per node, the prompts' dimension. `shapes`: of values for one prompt. Raises MixesPromptsError."""
    rows = Rows(_with_several(nodes, shapes))
    for node, shape in zip(nodes, rows.shapes, strict=True):
        try:
            dim = _dim(rows, node, shape.shape if shape is not None else None)
            if dim is not None and shape is not None and not (0 <= dim < len(shape.shape) and shape.shape[dim] == 1):
                raise MixesError
        except (MixesError, LookupError, TypeError, ValueError, ArithmeticError, AssertionError):
            raise MixesPromptsError(node) from None
        rows.dims.append(dim)
    return rows.dims


def _with_several(nodes: Sequence[Node], shapes: Sequence[ValueShape | None]) -> list[ValueShape | None]:
    """An op of several results stands with the shape of one that is used: their prompts are in one place."""
    told = list(shapes)
    for node, shape in zip(nodes, shapes, strict=True):
        if isinstance(node, Op) and node.name == "item" and isinstance(node.args[0], Ref):
            told[node.args[0].node] = shape
    return told


def _dim(rows: Rows, node: Node, result: Shape | None) -> Dim:
    if isinstance(node, (Read, Mask)):
        return 0
    if isinstance(node, (Constant, Parameter, Save)):
        return None
    if isinstance(node, Write):
        if rows.dims[node.value.node] not in (0, None):
            raise MixesError
        return None
    if all(rows.dims[part] is None for part in operands(node)):
        return None
    if isinstance(node, Call):  # a module works row by row, on what its last dimension is
        found = {tensor.dim for tensor in map(rows.tensor, node.args)} - {None}
        first = rows.tensor(node.args[0])
        if len(found) != 1 or result is None or len(result) != first.rank or first.rows == first.rank - 1:
            raise MixesError
        return first.rows
    if not isinstance(node, Op) or result is None:
        raise MixesError
    rule = _rule_of(node)
    if rule is None:
        raise MixesError
    if OPS[node.name].reach is not Reach.WHOLE:  # else its rule says all
        for part, dims in (*reduced_dims(node, rows.rank), *contracted(node, rows.rank)):
            if rows.dims[part] in dims:
                raise MixesError
    return rule(rows, node, result)


def _rule_of(op: Op) -> Rule | None:
    """None: nothing is known of the op."""
    return BY_NAME.get(op.name) or BY_REACH.get(OPS[op.name].reach)
