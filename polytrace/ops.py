"""The closed op table: every operation a graph may hold, by name. No torch here.

Owns names, which torch callables are recorded as which op, how many values an op returns and whether its result is a
true view of its first operand. `engine.ops` holds what runs, one callable a name; a test keeps the two in step.

An op's arguments travel as the user wrote them (positional and keyword), and torch's own shape rules decide whether
they fit.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Results(Enum):
    """How many values a call of an op returns."""

    ONE = "one"
    TWO = "two"  # a named pair (values, indices)
    TWO_WITH_DIM = "two-with-dim"  # a pair when `dim` is given, else one (max, min, median)
    LIST = "list"  # as many as the shapes say (split, chunk, unbind)


@dataclass(frozen=True, slots=True, kw_only=True)
class OpSpec:
    """One row of the table."""

    name: str
    torch: tuple[str, ...]  # recorded from these: "Tensor.add", "torch.add", "functional.softmax", "linalg.norm"
    kwargs: frozenset[str] = frozenset()  # keyword arguments allowed on the wire
    results: Results = Results.ONE
    is_view: bool = False  # the result aliases the first operand's memory, so in-place code on it reaches the base
    is_random: bool = False  # draws; what, depends on the request's seed and the node's place alone
    reduces: bool = False  # removes or collapses dimensions named by `dim` (argument 1), or all of them without it


def _op(name: str, *kwargs: str, torch: str = "both", **more: object) -> OpSpec:
    """A row; `torch` is "both" (method and function), "method", "function" or a comma-separated list of names."""
    places = {
        "both": (f"Tensor.{name}", f"torch.{name}"),
        "method": (f"Tensor.{name}",),
        "function": (f"torch.{name}",),
    }
    names = places.get(torch) or tuple(torch.split(","))
    return OpSpec(name=name, torch=names, kwargs=frozenset(kwargs), **more)  # type: ignore[arg-type]


def _dunder(name: str, *kwargs: str, dunders: str, aliases: str = "") -> OpSpec:
    """An operator: the method, the function and Python's double-underscore names for it."""
    names = [f"Tensor.{name}", f"torch.{name}", *(f"Tensor.__{d}__" for d in dunders.split())]
    return OpSpec(name=name, torch=(*names, *aliases.split()), kwargs=frozenset(kwargs))


_ROWS: tuple[OpSpec, ...] = (
    # arithmetic; reflected forms (rsub, rdiv, ...) are their own ops where order matters
    _dunder("add", "other", "alpha", dunders="add radd"),
    _dunder("sub", "other", "alpha", dunders="sub", aliases="Tensor.subtract torch.subtract"),
    _op("rsub", torch="Tensor.__rsub__"),
    _dunder("mul", "other", dunders="mul rmul", aliases="Tensor.multiply torch.multiply"),
    _dunder("div", "other", "rounding_mode", dunders="truediv div", aliases="Tensor.true_divide torch.true_divide"),
    _op("rdiv", torch="Tensor.__rtruediv__,Tensor.__rdiv__"),
    _dunder("floor_divide", dunders="floordiv"),
    _op("rfloor_divide", torch="Tensor.__rfloordiv__"),
    _dunder("remainder", dunders="mod"),
    _op("rremainder", torch="Tensor.__rmod__"),
    _dunder("pow", "exponent", dunders="pow"),
    _op("rpow", torch="Tensor.__rpow__"),
    _dunder("neg", dunders="neg", aliases="Tensor.negative torch.negative"),
    _dunder("abs", dunders="abs", aliases="Tensor.absolute torch.absolute"),
    _op("exp"),
    _op("expm1"),
    _op("log"),
    _op("log2"),
    _op("log10"),
    _op("log1p"),
    _op("sqrt"),
    _op("rsqrt"),
    _op("square"),
    _op("reciprocal"),
    _op("sign"),
    _op("sin"),
    _op("cos"),
    _op("tanh"),
    _op("sigmoid"),
    _op("erf"),
    _op("clamp", "min", "max"),
    _op("round", "decimals"),
    _op("floor"),
    _op("ceil"),
    _op("maximum", "other"),
    _op("minimum", "other"),
    _op("relu", torch="Tensor.relu,torch.relu,functional.relu"),
    _op("gelu", "approximate", torch="functional.gelu"),
    _op("silu", torch="functional.silu"),
    _op("softplus", "beta", "threshold", torch="functional.softplus"),
    _op("nan_to_num", "nan", "posinf", "neginf"),
    _op("lerp", "end", "weight"),
    # comparison and logic
    _dunder("eq", "other", dunders="eq"),
    _dunder("ne", "other", dunders="ne"),
    _dunder("lt", "other", dunders="lt"),
    _dunder("le", "other", dunders="le"),
    _dunder("gt", "other", dunders="gt"),
    _dunder("ge", "other", dunders="ge"),
    _op("isfinite"),
    _op("isinf"),
    _op("isnan"),
    _dunder("bitwise_and", dunders="and rand"),
    _dunder("bitwise_or", dunders="or ror"),
    _dunder("bitwise_xor", dunders="xor rxor"),
    _dunder("bitwise_not", dunders="invert"),
    _op("logical_and"),
    _op("logical_or"),
    _op("logical_not"),
    _op("where", "condition", "input", "other", torch="torch.where"),
    # (input, condition, other), in the order in which the method takes them
    _op("where_method", "condition", "other", torch="Tensor.where"),
    _op("masked_fill", "mask", "value"),
    # reductions
    _op("sum", "dim", "keepdim", "dtype", reduces=True),
    _op("mean", "dim", "keepdim", "dtype", reduces=True),
    _op("prod", "dim", "keepdim", "dtype", reduces=True),
    _op("std", "dim", "keepdim", "correction", "unbiased", reduces=True),
    _op("var", "dim", "keepdim", "correction", "unbiased", reduces=True),
    _op("amax", "dim", "keepdim", reduces=True),
    _op("amin", "dim", "keepdim", reduces=True),
    _op("median", "dim", "keepdim", results=Results.TWO_WITH_DIM, reduces=True),
    _op("max", "dim", "keepdim", results=Results.TWO_WITH_DIM, reduces=True),
    _op("min", "dim", "keepdim", results=Results.TWO_WITH_DIM, reduces=True),
    _op("argmax", "dim", "keepdim", reduces=True),
    _op("argmin", "dim", "keepdim", reduces=True),
    _op("count_nonzero", "dim", reduces=True),
    _op("all", "dim", "keepdim", reduces=True),
    _op("any", "dim", "keepdim", reduces=True),
    _op("logsumexp", "dim", "keepdim", reduces=True),
    _op("norm", "p", "dim", "keepdim", "dtype", torch="Tensor.norm,torch.norm", reduces=True),
    _op("linalg_norm", "ord", "dim", "keepdim", "dtype", torch="linalg.norm", reduces=True),  # of a matrix for two dims
    _op("vector_norm", "ord", "dim", "keepdim", "dtype", torch="linalg.vector_norm", reduces=True),
    _op("cumsum", "dim", "dtype", reduces=True),
    _op("cumprod", "dim", "dtype", reduces=True),
    # products
    _dunder("matmul", "other", dunders="matmul"),
    _op("rmatmul", torch="Tensor.__rmatmul__"),
    _op("bmm"),
    _op("mm"),
    _op("dot"),
    _op("outer"),
    _op("einsum", torch="function"),
    _op("linear", "weight", "bias", torch="functional.linear"),
    _op("cosine_similarity", "dim", "eps", torch="torch.cosine_similarity,functional.cosine_similarity"),
    # softmax and normalisation
    _op("softmax", "dim", "dtype", torch="Tensor.softmax,torch.softmax,functional.softmax", reduces=True),
    _op(
        "log_softmax", "dim", "dtype", torch="Tensor.log_softmax,torch.log_softmax,functional.log_softmax", reduces=True
    ),
    _op("layer_norm", "normalized_shape", "weight", "bias", "eps", torch="functional.layer_norm"),
    _op("normalize", "p", "dim", "eps", torch="functional.normalize"),
    # selection
    _op("topk", "k", "dim", "largest", "sorted", results=Results.TWO, reduces=True),
    _op("sort", "dim", "descending", "stable", results=Results.TWO, reduces=True),
    _op("argsort", "dim", "descending", "stable", reduces=True),
    _op("gather", "dim", "index"),
    _op("index_select", "dim", "index"),
    _op("take_along_dim", "indices", "dim"),
    _op("scatter", "dim", "index", "src", "value"),
    _op("scatter_add", "dim", "index", "src"),
    _op("index_add", "dim", "index", "source", "alpha"),
    _op("one_hot", "num_classes", torch="functional.one_hot"),
    _op("tril", "diagonal"),
    _op("triu", "diagonal"),
    # joining
    _op("cat", "dim", torch="torch.cat,torch.concat,torch.concatenate"),
    _op("stack", "dim", torch="function"),
    # views and layout
    _op("getitem", torch="Tensor.__getitem__", is_view=True),  # a view when the index is basic: the client decides
    _op("view", torch="method", is_view=True),
    _op("reshape", "shape"),
    _op("flatten", "start_dim", "end_dim"),
    _op("unflatten", "dim", "sizes", is_view=True),
    _op(
        "transpose",
        "dim0",
        "dim1",
        torch="Tensor.transpose,torch.transpose,Tensor.swapaxes,torch.swapaxes,Tensor.swapdims,torch.swapdims",
        is_view=True,
    ),
    _op("permute", "dims", is_view=True),
    _op("t", is_view=True),
    _op(
        "movedim",
        "source",
        "destination",
        torch="Tensor.movedim,torch.movedim,Tensor.moveaxis,torch.moveaxis",
        is_view=True,
    ),
    _op("squeeze", "dim", is_view=True),
    _op("unsqueeze", "dim", is_view=True),
    _op("expand", torch="method"),
    _op("expand_as", "other", torch="method"),
    _op("select", "dim", "index", is_view=True),
    _op("narrow", "dim", "start", "length", is_view=True),
    _op("diagonal", "offset", "dim1", "dim2"),
    _op("unbind", "dim", results=Results.LIST, is_view=True),
    _op("split", "split_size", "split_size_or_sections", "dim", results=Results.LIST, is_view=True),
    _op("chunk", "chunks", "dim", results=Results.LIST, is_view=True),
    _op("repeat", torch="method"),
    _op("repeat_interleave", "repeats", "dim"),
    _op("flip", "dims"),
    _op("roll", "shifts", "dims"),
    # dtype and copies
    _op("to", "dtype", torch="method"),
    _op("float", torch="method"),
    _op("double", torch="method"),
    _op("half", torch="method"),
    _op("bfloat16", torch="method"),
    _op("long", torch="method"),
    _op("int", torch="method"),
    _op("bool", torch="method"),
    _op("type_as", torch="method"),
    _op("clone"),
    _op("contiguous", torch="method"),
    _op("detach"),
    _op("zeros_like", "dtype", torch="function"),
    _op("ones_like", "dtype", torch="function"),
    _op("full_like", "fill_value", "dtype", torch="function"),
    _op("randn_like", "dtype", torch="function", is_random=True),
    _op("rand_like", "dtype", torch="function", is_random=True),
    # recorded by the client, not torch callables
    # (values, dims): one value below the other, each padded with zeros in front along `dims` to the longest
    _op("left_pad", torch="polytrace.left_pad"),
    _op("item", torch="polytrace.item"),  # (pair or list, position): one value of a call that returns several
    # (base, index, value): base with the indexed part replaced, as a new value
    _op("setitem", torch="polytrace.setitem"),
    # (base, steps, value): base with the part reached by view steps replaced;
    # steps = ((op name, args, ((key, operand), ...)), ...)
    _op("set_view", torch="polytrace.set_view"),
)

OPS: dict[str, OpSpec] = {row.name: row for row in _ROWS}

# "Tensor.__add__" -> the row it is recorded as
BY_TORCH_NAME: dict[str, OpSpec] = {name: row for row in _ROWS for name in row.torch}
