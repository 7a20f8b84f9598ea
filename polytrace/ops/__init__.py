"""The closed op table: every operation a graph may hold, by name. No torch here.

Owns names, which torch callables are recorded as which op, how many values an op returns, whether its result is a true
view of its first operand, what it costs and how far it reaches. A file holds the rows of a kind. `engine.ops` holds
what runs, one callable a name; a test keeps the two in step.

An op's arguments travel as the user wrote them (positional and keyword), and torch's own shape rules decide whether
they fit.
"""

from __future__ import annotations

from polytrace.ops import drawing, elementwise, layout, networks, products, reductions, selection
from polytrace.ops.spec import Cost, OpSpec, Reach, Results

__all__ = ["BY_TORCH_NAME", "OPS", "Cost", "OpSpec", "Reach", "Results"]

_KINDS = (elementwise, reductions, products, selection, layout, networks, drawing)

OPS: dict[str, OpSpec] = {row.name: row for kind in _KINDS for row in kind.ROWS}

# "Tensor.__add__" -> the row it is recorded as
BY_TORCH_NAME: dict[str, OpSpec] = {name: row for row in OPS.values() for name in row.torch}
