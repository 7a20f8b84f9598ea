"""What follows from the nodes of a recording alone, without asking the service: dtypes, whose rows, pairs of tokens.

What cannot be told so is None, and whoever needs it asks (`Session.shape_of`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from polytrace.derived import Derived
from polytrace.graph import Constant, Grad, Mask, Node, NodeId, Op, Parameter, Read, Ref, Site, refs
from polytrace.graph import operands as node_operands
from polytrace.timing import When, time_of

if TYPE_CHECKING:
    from polytrace.recording import Recording


class NodeFacts:
    """Of one recording."""

    def __init__(self, recording: Recording) -> None:
        self._recording = recording
        self.dtypes = Derived(self._dtype_parts, self._find_dtype)  # as far as the nodes tell
        self.invokes = Derived(self._row_parts, self._find_invoke)  # whose rows it has, if one's
        self.pairs = Derived(self._operation_parts, self._find_pairs)  # whether it is made of scores or patterns
        self.times = Derived(self._all_parts, self._find_time)  # the steps at which it acts

    def is_site_of_pairs(self, site: Site) -> bool:
        """Whether its tokens are in other dimensions than elsewhere."""
        return site.port.is_of_pairs or self._recording.session.row_dim(site) != 1

    def _all_parts(self, position: NodeId) -> Iterable[NodeId]:
        return node_operands(self._recording.nodes[position])

    def _find_time(self, position: NodeId) -> When:
        return time_of(self._recording.nodes[position], self.times.known.__getitem__)

    def _operation_parts(self, position: NodeId) -> Iterable[NodeId]:
        node = self._recording.nodes[position]
        return refs(node.args) if isinstance(node, Op) else _of(node)

    def _find_pairs(self, position: NodeId) -> bool:
        node = self._recording.nodes[position]
        if isinstance(node, Read):
            return self.is_site_of_pairs(node.site)
        return any(self.pairs.known[part] for part in self._operation_parts(position))

    def _dtype_parts(self, position: NodeId) -> Iterable[NodeId]:
        node = self._recording.nodes[position]
        if not isinstance(node, Op):
            return _of(node)
        if node.name in _KEEPS_DTYPE:
            return refs(node.args[0])
        return refs(node.args) if node.name in _AGREES_ON_DTYPE else ()

    def _find_dtype(self, position: NodeId) -> str | None:
        node = self._recording.nodes[position]
        if isinstance(node, Constant):
            return self._recording.constants.tensors[node.name].dtype
        if isinstance(node, Parameter):
            return self._recording.session.shape_of(position).dtype
        if isinstance(node, Grad):
            return self.dtypes.known[node.of.node]
        if not isinstance(node, Op) or not isinstance(node.args[0], Ref):
            return None
        if node.name in _MAKES:
            return _MAKES[node.name]
        kinds = {self.dtypes.known[part] for part in self._dtype_parts(position)}
        if node.name in _KEEPS_DTYPE:
            return kinds.pop()
        if node.name in _AGREES_ON_DTYPE:
            is_plain = all(isinstance(arg, (Ref, bool, int, float)) for arg in node.args)
            dtype = kinds.pop() if len(kinds) == 1 and is_plain else None
            return dtype if dtype is not None and "float" in dtype else None
        return None

    def _row_parts(self, position: NodeId) -> Iterable[NodeId]:
        node = self._recording.nodes[position]
        if isinstance(node, Op) and node.name in ("setitem", "set_view"):
            return refs(node.args[0])  # what changes a part has its rows from the whole
        return node_operands(node) if not isinstance(node, Grad) else _of(node)

    def _find_invoke(self, position: NodeId) -> int | None:
        node = self._recording.nodes[position]
        if isinstance(node, (Read, Mask)):
            return node.invoke
        found = {self.invokes.known[part] for part in self._row_parts(position)} - {None}
        return found.pop() if len(found) == 1 else None


def _of(node: Node) -> tuple[NodeId, ...]:
    """What a gradient is of: it is like that in all that follows from nodes."""
    return (node.of.node,) if isinstance(node, Grad) else ()


# ops whose result has one dtype, whatever they are given
_MAKES = dict.fromkeys(("argmax", "argmin", "argsort", "count_nonzero", "long", "one_hot"), "int64") | dict.fromkeys(
    ("eq", "ne", "lt", "le", "gt", "ge", "isnan", "isinf", "isfinite"), "bool"
)

# ops whose result has the dtype of their first argument
_KEEPS_DTYPE = frozenset(
    {
        *("setitem", "set_view", "getitem", "transpose", "permute", "squeeze", "unsqueeze", "select", "narrow"),
        *("movedim", "t", "unflatten", "reshape", "flatten", "expand", "repeat", "roll", "flip"),
        *("clone", "detach", "contiguous", "masked_fill", "tril", "triu"),
    }
)
# ops whose result has the dtype of their tensors where these agree on a float
_AGREES_ON_DTYPE = frozenset(
    {
        *("add", "sub", "rsub", "mul", "div", "rdiv", "pow", "matmul", "rmatmul", "maximum", "minimum", "clamp"),
        *("neg", "abs", "relu", "tanh", "sigmoid", "exp", "log", "sqrt", "rsqrt"),
    }
)
