"""Rows of what computes nothing: views, joins, repetitions, casts, and tensors made of sizes alone."""

from __future__ import annotations

from polytrace.ops.spec import Cost, OpSpec, Reach, Results, element, moved, op, view


def _views(name: str, *kwargs: str, torch: str = "both") -> OpSpec:
    return view(name, *kwargs, torch=torch, results=Results.LIST)


def _cast(name: str, *kwargs: str, torch: str = "method") -> OpSpec:
    return element(name, *kwargs, torch=torch, cost=Cost.FREE)


def _made(name: str, *kwargs: str, first: str) -> OpSpec:
    """Without an operand: `torch.zeros(3)` runs where it is written, `functions.zeros(3)` where values are."""
    usual = {"is_made": True, "cost": Cost.FREE, "reach": Reach.PLACE}
    return op(name, *kwargs, torch="polytrace", first=tuple(first.split()), **usual)


VIEWS = (
    view("view", torch="method"),
    view("view_as", "other", torch="method"),
    moved("reshape", "shape", reach=Reach.PLACE),
    moved("reshape_as", "other", torch="method", reach=Reach.PLACE),
    moved("flatten", "start_dim", "end_dim", reach=Reach.PLACE),
    moved("ravel", reach=Reach.PLACE),
    view("unflatten", "dim", "sizes"),
    view(
        "transpose",
        "dim0",
        "dim1",
        torch="both Tensor.swapaxes torch.swapaxes Tensor.swapdims torch.swapdims",
    ),
    view("adjoint"),
    view("permute", "dims"),
    view("t"),
    view("movedim", "source", "destination", torch="both Tensor.moveaxis torch.moveaxis"),
    view("squeeze", "dim"),
    view("unsqueeze", "dim"),
    view("select", "dim", "index"),
    view("narrow", "dim", "start", "length"),
    moved("narrow_copy", "dim", "start", "length"),
    moved("unfold", "dimension", "size", "step", torch="method"),
    moved("diagonal", "offset", "dim1", "dim2", torch="both"),
    moved("linalg_diagonal", "offset", "dim1", "dim2", torch="linalg.diagonal"),
    moved("atleast_1d", torch="function", reach=Reach.PLACE),
    moved("atleast_2d", torch="function", reach=Reach.PLACE),
    moved("atleast_3d", torch="function", reach=Reach.PLACE),
    _views("unbind", "dim"),
    _views("split", "split_size", "split_size_or_sections", "dim"),
    _views("split_with_sizes", "split_sizes", "dim"),
    _views("chunk", "chunks", "dim"),
    _views("tensor_split", "indices", "sections", "dim"),
    _views("hsplit"),
    _views("vsplit"),
    _views("dsplit"),
)

JOINED = (
    moved("cat", "dim", torch="torch.cat torch.concat torch.concatenate"),
    moved("stack", "dim", torch="function"),
    moved("hstack", torch="function"),
    moved("vstack", torch="function torch.row_stack"),
    moved("dstack", torch="function"),
    moved("column_stack", torch="function"),
    moved("block_diag", torch="function", reach=Reach.WHOLE),
    moved("cartesian_prod", torch="function", reach=Reach.WHOLE),
    moved("meshgrid", "indexing", torch="function", results=Results.LIST, reach=Reach.WHOLE),
    moved("broadcast_tensors", torch="function", results=Results.LIST, reach=Reach.WHOLE),
)

REPEATED = (
    moved("expand", torch="method", reach=Reach.PLACE),
    moved("expand_as", "other", torch="method", reach=Reach.PLACE),
    moved("broadcast_to", "size", reach=Reach.PLACE),
    moved("repeat", torch="method"),
    moved("repeat_interleave", "repeats", "dim"),
    moved("tile", "dims"),
    moved("flip", "dims"),
    moved("fliplr"),
    moved("flipud"),
    moved("rot90", "k", "dims"),
    moved("roll", "shifts", "dims"),
    moved("diag", "diagonal"),
    moved("diagflat", "offset"),
    moved("diag_embed", "offset", "dim1", "dim2"),
    moved("pad", "mode", "value", "pad", torch="functional"),
    moved("pixel_shuffle", torch="functional", reach=Reach.WHOLE),
    moved("pixel_unshuffle", torch="functional", reach=Reach.WHOLE),
)

CASTS = (
    _cast("to", "dtype"),
    _cast("float"),
    _cast("double"),
    _cast("half"),
    _cast("bfloat16"),
    _cast("long"),
    _cast("int"),
    _cast("short"),
    _cast("char"),
    _cast("byte"),
    _cast("bool"),
    _cast("cfloat"),
    _cast("cdouble"),
    _cast("type_as", "other"),
    _cast("clone", torch="both"),
    _cast("contiguous"),
    _cast("detach", torch="both"),
)

FILLED = (
    _cast("zeros_like", "dtype", torch="function"),
    _cast("ones_like", "dtype", torch="function"),
    _cast("empty_like", "dtype", torch="function"),  # of zeros: memory that was another's is nobody's to read
    _cast("full_like", "fill_value", "dtype", torch="function"),
    _cast("new_zeros", "size", "dtype"),
    _cast("new_ones", "size", "dtype"),
    _cast("new_empty", "size", "dtype"),
    _cast("new_full", "size", "fill_value", "dtype"),
    _made("zeros", "dtype", first="size"),
    _made("ones", "dtype", first="size"),
    _made("full", "fill_value", "dtype", first="size"),
    _made("arange", "end", "step", "dtype", first="start end"),
    _made("linspace", "end", "steps", "dtype", first="start"),
    _made("logspace", "end", "steps", "base", "dtype", first="start"),
    _made("eye", "m", "dtype", first="n"),
)

ROWS = (*VIEWS, *JOINED, *REPEATED, *CASTS, *FILLED)
