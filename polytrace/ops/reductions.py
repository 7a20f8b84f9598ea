"""Rows of what runs over dimensions: sums, extremes, statistics, cumulative ops, sorting, norms and distances."""

from __future__ import annotations

from polytrace.ops.spec import VALUES_AND_INDICES, Cost, OpSpec, Reach, Results, along, element, op


def _pair(name: str, *kwargs: str, fields: tuple[str, str] = VALUES_AND_INDICES, **more: object) -> OpSpec:
    return along(name, *kwargs, results=Results.NAMED, fields=fields, **more)  # type: ignore[arg-type]


def _pair_with_dim(name: str) -> OpSpec:
    return along(name, "dim", "keepdim", results=Results.PAIR_WITH_DIM, fields=VALUES_AND_INDICES)


SUMS = (
    along("sum", "dim", "keepdim", "dtype"),
    along("nansum", "dim", "keepdim", "dtype"),
    along("mean", "dim", "keepdim", "dtype"),
    along("nanmean", "dim", "keepdim", "dtype"),
    along("prod", "dim", "keepdim", "dtype"),
    along("std", "dim", "keepdim", "correction", "unbiased"),
    along("var", "dim", "keepdim", "correction", "unbiased"),
    _pair("std_mean", "dim", "keepdim", "correction", "unbiased", torch="function", fields=("std", "mean")),
    _pair("var_mean", "dim", "keepdim", "correction", "unbiased", torch="function", fields=("var", "mean")),
    along("count_nonzero", "dim"),
    along("all", "dim", "keepdim"),
    along("any", "dim", "keepdim"),
    along("logsumexp", "dim", "keepdim", torch="both special"),
    op("trace"),
)

EXTREMES = (
    along("amax", "dim", "keepdim"),
    along("amin", "dim", "keepdim"),
    _pair("aminmax", "dim", "keepdim", fields=("min", "max"), at=99),
    _pair_with_dim("median"),
    _pair_with_dim("nanmedian"),
    _pair_with_dim("max"),
    _pair_with_dim("min"),
    along("argmax", "dim", "keepdim"),
    along("argmin", "dim", "keepdim"),
    _pair("mode", "dim", "keepdim", default=-1, cost=Cost.SORT),
    _pair("kthvalue", "k", "dim", "keepdim", at=2, default=-1, cost=Cost.SORT),
    along("quantile", "q", "dim", "keepdim", "interpolation", at=2, cost=Cost.SORT),
    along("nanquantile", "q", "dim", "keepdim", "interpolation", at=2, cost=Cost.SORT),
)

CUMULATIVE = (
    along("cumsum", "dim", "dtype"),
    along("cumprod", "dim", "dtype"),
    _pair("cummax", "dim"),
    _pair("cummin", "dim"),
    along("logcumsumexp", "dim"),
    along("diff", "n", "dim", "prepend", "append", at=2, default=-1),
    along("trapezoid", "x", "dx", "dim", torch="function torch.trapz", at=99, default=-1),
    along("cumulative_trapezoid", "x", "dx", "dim", torch="function", at=99, default=-1),
)

SORTED = (
    _pair("topk", "k", "dim", "largest", "sorted", at=2, default=-1, cost=Cost.SORT),
    _pair("sort", "dim", "descending", "stable", default=-1, cost=Cost.SORT),
    along("argsort", "dim", "descending", "stable", default=-1, cost=Cost.SORT),
    along("msort", at=99, default=0, cost=Cost.SORT),
    element("searchsorted", "right", "side", "sorter", "out_int32", torch="function", cost=Cost.SORT),
    element("bucketize", "boundaries", "right", "out_int32", torch="function", cost=Cost.SORT),
    op("histc", "bins", "min", "max"),
    op("bincount", "weights", "minlength", needs_values=True),
    op("unique", "sorted", "dim", needs_values=True, cost=Cost.SORT),
    op("unique_consecutive", "dim", needs_values=True),
    op("cov", "correction", "fweights", "aweights", cost=Cost.PRODUCT),
    op("corrcoef", cost=Cost.PRODUCT),
)

NORMS = (
    along("norm", "p", "dim", "keepdim", "dtype", at=2),
    along("linalg_norm", "ord", "dim", "keepdim", "dtype", torch="linalg.norm", at=2),  # of a matrix for two dims
    along("vector_norm", "ord", "dim", "keepdim", "dtype", torch="linalg", at=2),
    along(
        "matrix_norm",
        *("ord", "dim", "keepdim", "dtype"),
        torch="linalg",
        at=2,
        default=(-2, -1),
        cost=Cost.DECOMPOSITION,
    ),
    along("normalize", "p", "dim", "eps", torch="functional", at=2, default=1),
    op("renorm", "p", "dim", "maxnorm"),
    along("cosine_similarity", "dim", "eps", torch="function functional", at=2, default=1),
    along("pairwise_distance", "p", "eps", "keepdim", torch="torch.pairwise_distance functional", at=99, default=-1),
    op("dist", "other", "p"),
    op("cdist", "p", "compute_mode", torch="function", cost=Cost.PRODUCT, reach=Reach.LAST, num_last=1),
    op("pdist", "p", torch="functional", cost=Cost.PRODUCT),
)

ROWS = (*SUMS, *EXTREMES, *CUMULATIVE, *SORTED, *NORMS)
