"""Floating-point operations of a program's own ops, from the shapes that the plan knows: what they add to the model's.

One rule for each class of cost in the op table. The figures are of the usual algorithm (multiply and add count as two),
right to a small factor for decompositions, sorts and transforms.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from polytrace.graph import Call, NodeId, Op, OpGrad, operands
from polytrace.ops import OPS, Cost
from scheduling.checks import ModelTable
from scheduling.costs import nodes_of
from scheduling.plan import Program, ValueFacts

_CUBIC = 4  # of a decomposition's m * n * min(m, n)
_PER_WAVE = 5  # of a transform's n log2 n
_WAY_BACK = 2  # forwards, as of a layer


def program_flops(program: Program, table: ModelTable) -> int:
    """All ops, calls of modules and gradients of these that run, each once."""
    return sum(_node_flops(program, table, node) for node in {n for wave in program.waves for n in nodes_of(wave)})


def _node_flops(program: Program, table: ModelTable, node: NodeId) -> int:
    event = program.graph.nodes[node]
    if isinstance(event, Op):
        return op_flops(event, program.facts, node)
    if isinstance(event, Call):
        return call_flops(event, program.facts, table)
    if isinstance(event, OpGrad):  # it runs the op again, and then its way back
        return (1 + _WAY_BACK) * _node_flops(program, table, event.op)
    return 0


def call_flops(call: Call, facts: Sequence[ValueFacts | None], table: ModelTable) -> int:
    """Of a module that is called on values: each of its weights once for each row of its largest operand."""
    shapes = [known.shape for part in operands(call) if (known := facts[part]) is not None]
    rows = max([math.prod(shape[:-1]) for shape in shapes], default=0)
    own = [info for path, info in table.parameters.items() if path.startswith(f"{call.module}.") and info.of is None]
    return 2 * rows * sum(math.prod(info.shape) for info in own)


def op_flops(op: Op, facts: Sequence[ValueFacts | None], node: int) -> int:
    """Of one op; `facts` has the shapes of its operands, and of its result where that is one value."""
    cost = OPS[op.name].cost
    if cost is Cost.FREE:
        return 0
    shapes = [known.shape for part in operands(op) if (known := facts[part]) is not None]
    own = facts[node]
    result = math.prod(own.shape) if own is not None else 0
    largest = max([result, *map(math.prod, shapes)])
    if cost is Cost.ELEMENT:
        return largest
    if cost in (Cost.SORT, Cost.TRANSFORM):
        length = max([2, *[size for shape in shapes for size in shape]])
        return largest * math.ceil(math.log2(length)) * (_PER_WAVE if cost is Cost.TRANSFORM else 1)
    if cost is Cost.DECOMPOSITION:
        return _CUBIC * max([_cube(shape) for shape in shapes], default=0)
    return _product(op, shapes, result)


def _cube(shape: tuple[int, ...]) -> int:
    if len(shape) < 2:
        return math.prod(shape)
    return math.prod(shape) * min(shape[-2:])


def _product(op: Op, shapes: list[tuple[int, ...]], result: int) -> int:
    """Two for each pair of numbers that are multiplied and added."""
    if not shapes:
        return 0
    sizes = [math.prod(shape) for shape in shapes]
    match op.name:
        case "einsum" if isinstance(op.args[0], str):
            return 2 * _letters(op.args[0], shapes) * max(1, len(shapes) - 1)  # of three or more: at most
        case "scaled_dot_product_attention" if len(shapes) > 1:
            return 4 * sizes[0] * shapes[1][-2]
        case "conv1d" | "conv2d" | "conv3d" if len(shapes) > 1:
            return 2 * result * sizes[1] // max(1, shapes[1][0])
        case "conv_transpose1d" | "conv_transpose2d" if len(shapes) > 1:
            return 2 * sizes[0] * sizes[1] // max(1, shapes[1][0])
        case "bilinear" if len(shapes) > 2:
            return 2 * sizes[0] // max(1, shapes[0][-1]) * sizes[2]
        case "cov" | "corrcoef":
            return 2 * sizes[0] * shapes[0][0] if shapes[0] else 0
        case "multi_dot":
            return sum(2 * size * shape[-1] for size, shape in zip(sizes, shapes[1:], strict=False))
        case "kron" | "addr":
            return 2 * result
        case "cdist" | "pdist":
            return 3 * result * shapes[0][-1]
        case "tensordot" if len(shapes) > 1 and result:
            return 2 * result * math.isqrt(sizes[0] * sizes[1] // result)
    left = shapes[{"addmm": 1, "addmv": 1, "addbmm": 1, "baddbmm": 1, "rmatmul": -1}.get(op.name, 0)]
    batch = left[0] if op.name == "addbmm" and left else 1
    return 2 * result * batch * (left[-1] if left else 1)


def _letters(equation: str, shapes: list[tuple[int, ...]]) -> int:
    """Places of all letters together; those under an ellipsis count with the operand that has most of them."""
    found: dict[str, int] = {}
    rest = 1
    for term, shape in zip(equation.replace(" ", "").split("->")[0].split(","), shapes, strict=False):
        before, _, after = term.partition("...")
        found |= dict(zip(before, shape, strict=False))
        found |= dict(zip(reversed(after), reversed(shape), strict=False))
        rest = max(rest, math.prod(shape[len(before) : len(shape) - len(after)]))
    return math.prod(found.values()) * rest
