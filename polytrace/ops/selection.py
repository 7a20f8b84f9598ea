"""Rows of what picks elements and puts them elsewhere: indices, scatters, masks."""

from __future__ import annotations

from polytrace.ops.spec import Cost, Reach, along, element, moved, op

PICKED = (
    op("getitem", torch="Tensor.__getitem__", is_view=True, cost=Cost.FREE, reach=Reach.MOVED),
    moved("gather", "dim", "index"),
    moved("index_select", "dim", "index"),
    moved("take_along_dim", "indices", "dim"),
    moved("take", "index"),
    moved("masked_select", "mask", needs_values=True),
    moved("nonzero", needs_values=True),
    moved("argwhere", needs_values=True),
    element("tril", "diagonal", cost=Cost.FREE),
    element("triu", "diagonal", cost=Cost.FREE),
)

PUT = (
    along("scatter", "dim", "index", "src", "value"),
    along("scatter_add", "dim", "index", "src"),
    along("scatter_reduce", "dim", "index", "src", "reduce", "include_self"),
    along("index_add", "dim", "index", "source", "alpha"),
    along("index_copy", "dim", "index", "source"),
    along("index_fill", "dim", "index", "value"),
    op("index_put", "indices", "values", "accumulate"),
    op("masked_scatter", "mask", "source"),
    op("put", "index", "source", "accumulate", torch="both"),
    moved("select_scatter", "src", "dim", "index"),
    moved("slice_scatter", "src", "dim", "start", "end", "step"),
    moved("diagonal_scatter", "src", "offset", "dim1", "dim2"),
    moved("one_hot", "num_classes", torch="functional"),
)

# recorded by the client, not torch callables
RECORDED = (
    # (pair or list, position): one value of a call that returns several
    op("item", torch="polytrace.item", cost=Cost.FREE, reach=Reach.PLACE),
    # (values, dims): one value below the other, each padded with zeros in front along `dims` to the longest; of
    # scores, `unseen` says how many pads each sequence has: to its queries they are -inf
    op("left_pad", "unseen", torch="polytrace.left_pad", cost=Cost.FREE),
    # (base, index, value): base with the indexed part replaced, as a new value
    op("setitem", torch="polytrace.setitem", cost=Cost.FREE, reach=Reach.PLACE),
    # (base, steps, value): base with the part reached by view steps replaced;
    # steps = ((op name, args, ((key, operand), ...)), ...)
    op("set_view", torch="polytrace.set_view", cost=Cost.FREE, reach=Reach.PLACE),
    # (predicate, a, b): a where the one number of the predicate is not 0, else b; of equal shape and dtype
    op("cond", torch="polytrace.cond", cost=Cost.FREE, reach=Reach.PLACE),
)

ROWS = (*PICKED, *PUT, *RECORDED)
