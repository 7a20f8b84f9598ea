"""Calls of every row of the op table, as people write them: what the tests of the table run beside plain torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

torch.manual_seed(0)
X = torch.randn(2, 3, 4)
Y = torch.randn(2, 3, 4)
POSITIVE = X.abs() + 0.5
UNIT = X.sigmoid()
SQUARE = torch.randn(4, 4)
SYMMETRIC = SQUARE @ SQUARE.T + 4 * torch.eye(4)
LOWER = torch.linalg.cholesky(SYMMETRIC)
BATCH = torch.randn(2, 4, 4) + 4 * torch.eye(4)
TALL = torch.randn(2, 5, 3)
ROW = torch.randn(4)
IDS = torch.tensor([[0, 2, 1, 3], [1, 1, 0, 2]])
BITS = X > 0
INDEX = torch.tensor([[[0, 1, 2, 0]], [[2, 2, 1, 0]]])
PICKS = torch.tensor([2, 0])
COMPLEX = torch.complex(X, Y)
SIGNAL = torch.randn(2, 3, 8)
IMAGE = torch.randn(2, 4, 6, 6)
HEADS = torch.randn(2, 2, 5, 4)
EDGES = torch.tensor([-1.0, 0.0, 0.5, 2.0])
BASINS = torch.tensor([1, 3, 0])
LABELS = torch.tensor([1, 0, 3])
LOGITS = torch.randn(3, 4)

Call = tuple[tuple[Any, ...], dict[str, Any]]


def call(*args: Any, **kwargs: Any) -> Call:
    return args, kwargs


def names(text: str) -> list[str]:
    return text.split()


UNARY = names(
    "neg abs exp exp2 expm1 sign sgn sin cos tan atan sinh cosh tanh asinh sigmoid erf erfc floor ceil trunc frac "
    "relu relu6 silu mish softsign logsigmoid hardsigmoid hardswish tanhshrink selu square positive sinc deg2rad "
    "rad2deg erfcx ndtr log_ndtr i0 i0e i1 i1e bessel_j0 bessel_j1 entr angle conj conj_physical resolve_conj real "
    "isinf isfinite isnan isposinf isneginf isreal signbit logical_not "
    "float double half bfloat16 long int short char bool contiguous cfloat cdouble clone detach fliplr flipud ravel "
    "nonzero argwhere msort atleast_1d atleast_2d atleast_3d adjoint"
)
OF_POSITIVE = names("log log2 log10 log1p sqrt rsqrt reciprocal lgamma digamma acosh byte")
OF_UNIT = names("asin acos atanh erfinv ndtri")
COMPARISONS = names("eq ne lt le gt ge")
OF_TWO = names("maximum minimum fmax fmin fmod hypot atan2 copysign nextafter ldexp logaddexp logaddexp2 logical_xor")
OF_TWO_BITS = names("bitwise_and bitwise_or bitwise_xor logical_and logical_or")
REDUCED = names("sum nansum mean nanmean prod")
SPECTRA = names("fft ifft rfft hfft")
SPECTRA_OF_TWO = names("fft2 ifft2 fftn ifftn")

ELEMENTWISE: dict[str, list[Call]] = {
    **{name: [call(X)] for name in UNARY},
    **{name: [call(POSITIVE)] for name in OF_POSITIVE},
    **{name: [call(UNIT)] for name in OF_UNIT},
    **{name: [call(X, Y), call(X, 0.5), call(X, other=Y)] for name in COMPARISONS},
    **{name: [call(X, Y), call(X, other=Y)] for name in OF_TWO},
    **{name: [call(BITS, X > 1), call(BITS, other=X > 1)] for name in OF_TWO_BITS},
    "add": [call(X, Y), call(X, 2), call(X, Y, alpha=0.5), call(X, other=ROW), call(X, COMPLEX)],
    "sub": [call(X, Y), call(X, other=Y, alpha=2)],
    "rsub": [call(X, 1.5), call(X, Y), call(X, other=Y, alpha=2)],
    "mul": [call(X, Y), call(X, 3), call(X, other=Y)],
    "div": [call(X, POSITIVE), call(X, other=POSITIVE, rounding_mode="floor")],
    "rdiv": [call(POSITIVE, 2.0)],
    "floor_divide": [call(X, POSITIVE), call(IDS, 2)],
    "rfloor_divide": [call(IDS + 1, 7)],
    "remainder": [call(X, POSITIVE), call(IDS, 2)],
    "rremainder": [call(IDS + 1, 7)],
    "pow": [call(X, 2), call(POSITIVE, Y), call(POSITIVE, exponent=0.5)],
    "rpow": [call(X, 2.0)],
    "float_power": [call(POSITIVE, 2), call(POSITIVE, exponent=Y)],
    "clamp": [call(X, -0.5, 0.5), call(X, min=0), call(X, max=Y)],
    "clamp_min": [call(X, 0.0), call(X, min=0.5)],
    "clamp_max": [call(X, 0.0), call(X, max=0.5)],
    "lerp": [call(X, Y, 0.5), call(X, end=Y, weight=POSITIVE)],
    "addcmul": [call(X, Y, POSITIVE), call(X, tensor1=Y, tensor2=POSITIVE, value=0.5)],
    "addcdiv": [call(X, Y, POSITIVE), call(X, tensor1=Y, tensor2=POSITIVE, value=0.5)],
    "heaviside": [call(X, Y), call(X, values=Y)],
    "gcd": [call(IDS, IDS + 2), call(IDS, other=IDS)],
    "lcm": [call(IDS, IDS + 2), call(IDS, other=IDS)],
    "nan_to_num": [call(X / 0 * BITS), call(X / 0, nan=1.0, posinf=2.0, neginf=3.0)],
    "round": [call(X), call(X, decimals=2)],
    "logit": [call(UNIT), call(UNIT, eps=0.3)],
    "xlogy": [call(X, POSITIVE), call(X, other=POSITIVE)],
    "xlog1py": [call(X, POSITIVE), call(X, other=POSITIVE)],
    "zeta": [call(POSITIVE + 1, POSITIVE), call(POSITIVE + 1, other=POSITIVE)],
    "gammainc": [call(POSITIVE, POSITIVE + 1), call(POSITIVE, other=POSITIVE)],
    "gammaincc": [call(POSITIVE, POSITIVE + 1), call(POSITIVE, other=POSITIVE)],
    "isclose": [call(X, Y), call(X, other=Y, rtol=0.5, atol=0.5, equal_nan=True)],
    "isin": [
        call(IDS, PICKS),
        call(IDS, PICKS, assume_unique=False, invert=True),
        call(IDS, test_elements=PICKS),
    ],
    "bitwise_not": [call(BITS), call(IDS)],
    "bitwise_left_shift": [call(IDS, 2), call(IDS, other=IDS)],
    "bitwise_right_shift": [call(IDS, 1), call(IDS, other=IDS)],
    "where": [call(BITS, X, Y), call(BITS, X, 0.0), call(BITS, 1.0, X), call(BITS, input=X, other=Y)],
    "where_method": [call(X, BITS, Y), call(X, BITS, other=0.0), call(X, condition=BITS, other=Y)],
    "masked_fill": [call(X, BITS, 0.0), call(X, mask=BITS, value=-1e9)],
    "elu": [call(X), call(X, alpha=0.5)],
    "celu": [call(X), call(X, alpha=0.5)],
    "leaky_relu": [call(X), call(X, 0.2), call(X, negative_slope=0.1)],
    "prelu": [call(X, torch.tensor([0.25])), call(X, weight=torch.tensor([0.1, 0.2, 0.3]))],
    "threshold": [call(X, 0.1, 20.0), call(X, threshold=0.5, value=-1.0)],
    "gelu": [call(X), call(X, approximate="tanh")],
    "softplus": [call(X), call(X, beta=2, threshold=1)],
    "hardtanh": [call(X), call(X, min_val=-0.5, max_val=0.25)],
    "hardshrink": [call(X), call(X, lambd=0.2)],
    "softshrink": [call(X), call(X, lambd=0.2)],
    "glu": [call(X), call(X, dim=0)],
    "softmax": [call(X, -1), call(X, dim=1, dtype=torch.float64)],
    "log_softmax": [call(X, -1), call(X, dim=1, dtype=torch.float64)],
    "softmin": [call(X, -1), call(X, dim=1, dtype=torch.float64)],
    "imag": [call(COMPLEX)],
    "real": [call(X), call(COMPLEX)],
    "abs": [call(X), call(COMPLEX)],
    "angle": [call(X), call(COMPLEX)],
    "complex": [call(X, Y), call(X, imag=Y)],
    "polar": [call(POSITIVE, X), call(POSITIVE, angle=X)],
    "view_as_real": [call(COMPLEX)],
    "view_as_complex": [call(torch.randn(2, 3, 2))],
}

REDUCTIONS: dict[str, list[Call]] = {
    **{name: [call(X), call(X, 1), call(X, dim=-1, keepdim=True, dtype=torch.float64)] for name in REDUCED},
    "sum": [call(X), call(X, 1), call(X, dim=(0, 2), keepdim=True), call(IDS, dtype=torch.float64)],
    "std": [call(X), call(X, 1), call(X, dim=1, correction=0), call(X, dim=1, unbiased=False, keepdim=True)],
    "var": [call(X), call(X, 1), call(X, dim=1, correction=0), call(X, dim=1, unbiased=False, keepdim=True)],
    "std_mean": [call(X), call(X, 1), call(X, dim=1, correction=0), call(X, dim=1, unbiased=False, keepdim=True)],
    "var_mean": [call(X), call(X, 1), call(X, dim=1, correction=0), call(X, dim=1, unbiased=False, keepdim=True)],
    "count_nonzero": [call(X), call(X, dim=1)],
    "all": [call(BITS), call(BITS, dim=1, keepdim=True)],
    "any": [call(BITS), call(BITS, dim=1, keepdim=True)],
    "logsumexp": [call(X, 1), call(X, dim=(0, 1), keepdim=True)],
    "trace": [call(SQUARE)],
    "amax": [call(X), call(X, dim=(0, 1), keepdim=True)],
    "amin": [call(X), call(X, dim=(0, 1), keepdim=True)],
    "aminmax": [call(X), call(X, dim=1, keepdim=True)],
    "max": [call(X), call(X, 1), call(X, dim=1, keepdim=True), call(X, Y)],
    "min": [call(X), call(X, 1), call(X, dim=1, keepdim=True), call(X, Y)],
    "median": [call(X), call(X, 1), call(X, dim=1, keepdim=True)],
    "nanmedian": [call(X), call(X, 1), call(X, dim=1, keepdim=True)],
    "argmax": [call(X), call(X, -1), call(X, dim=1, keepdim=True)],
    "argmin": [call(X), call(X, -1), call(X, dim=1, keepdim=True)],
    "mode": [call(IDS), call(IDS, dim=0, keepdim=True)],
    "kthvalue": [call(X, 2), call(X, k=1, dim=1, keepdim=True)],
    "quantile": [
        call(X, 0.5),
        call(X, 0.25, 1),
        call(X, q=torch.tensor([0.1, 0.9]), dim=-1, keepdim=True, interpolation="nearest"),
    ],
    "nanquantile": [call(X, 0.5), call(X, 0.25, 1), call(X, q=0.9, dim=-1, keepdim=True, interpolation="lower")],
    "cumsum": [call(X, 1), call(IDS, dim=-1, dtype=torch.float32)],
    "cumprod": [call(X, 1), call(IDS, dim=-1, dtype=torch.float32)],
    "cummax": [call(X, 1), call(X, dim=-1)],
    "cummin": [call(X, 1), call(X, dim=-1)],
    "logcumsumexp": [call(X, 1), call(X, dim=-1)],
    "diff": [call(X), call(X, 2, 1), call(X, n=1, dim=0, prepend=X[:1], append=X[:1])],
    "trapezoid": [call(X), call(X, dx=0.5, dim=1), call(X, x=ROW)],
    "cumulative_trapezoid": [call(X), call(X, dx=0.5, dim=1), call(X, x=ROW)],
    "topk": [call(X, 2), call(X, k=2, dim=1, largest=False, sorted=True)],
    "sort": [call(X), call(X, dim=1, descending=True), call(X, stable=True)],
    "argsort": [call(X), call(X, dim=1, descending=True, stable=True)],
    "searchsorted": [
        call(EDGES, X),
        call(EDGES, X, right=True, out_int32=True),
        call(EDGES, X, side="left"),
        call(EDGES.flip(0), X, sorter=torch.tensor([3, 2, 1, 0])),
    ],
    "bucketize": [call(X, EDGES), call(X, boundaries=EDGES, right=True, out_int32=True)],
    "histc": [call(X), call(X, bins=4, min=-1, max=1)],
    "bincount": [call(BASINS), call(BASINS, weights=torch.ones(3), minlength=6)],
    "unique": [call(IDS), call(IDS, sorted=True, dim=1)],
    "unique_consecutive": [call(IDS), call(IDS, dim=1)],
    "cov": [
        call(SQUARE),
        call(SQUARE, correction=0, fweights=torch.tensor([1, 2, 1, 1]), aweights=torch.ones(4)),
    ],
    "corrcoef": [call(SQUARE)],
    "norm": [call(X), call(X, 1, -1), call(X, dim=-1, keepdim=True), call(X, p=3, dim=1, dtype=torch.float64)],
    "linalg_norm": [
        call(X),
        call(SQUARE, "nuc"),
        call(X, dim=-1, keepdim=True),
        call(SQUARE, ord=1, dtype=torch.float64),
    ],
    "vector_norm": [call(X), call(X, 1, -1), call(X, ord=3, dim=(0, 1), keepdim=True, dtype=torch.float64)],
    "matrix_norm": [call(BATCH), call(BATCH, "nuc"), call(X, ord=1, dim=(0, 1), keepdim=True, dtype=torch.float64)],
    "normalize": [call(X), call(X, 1, -1), call(X, p=3.0, dim=-1, eps=1e-3)],
    "renorm": [call(X, 2, 0, 1.0), call(X, p=1, dim=1, maxnorm=0.5)],
    "cosine_similarity": [call(X, Y), call(X, Y, dim=-1, eps=1e-3)],
    "pairwise_distance": [call(X, Y), call(X, Y, p=1.0, eps=1e-3, keepdim=True)],
    "dist": [call(X, Y), call(X, Y, 1), call(X, other=Y, p=3)],
    "cdist": [call(TALL, TALL[:, :2]), call(TALL, TALL, p=1.0, compute_mode="donot_use_mm_for_euclid_dist")],
    "pdist": [call(TALL[0]), call(TALL[0], p=1.0)],
}

PRODUCTS: dict[str, list[Call]] = {
    **{
        name: [call(SIGNAL), call(SIGNAL, 5, 1, "ortho"), call(SIGNAL, n=6, dim=-1, norm="forward")] for name in SPECTRA
    },
    **{name: [call(SIGNAL), call(SIGNAL, s=(4, 4), dim=(0, 1), norm="ortho")] for name in SPECTRA_OF_TWO},
    "irfft": [call(torch.fft.rfft(SIGNAL)), call(torch.fft.rfft(SIGNAL), n=8, dim=-1, norm="ortho")],
    "ihfft": [call(SIGNAL), call(SIGNAL, n=6, dim=1, norm="ortho")],
    "rfft2": [call(SIGNAL), call(SIGNAL, s=(4, 4), dim=(0, 1), norm="ortho")],
    "rfftn": [call(SIGNAL), call(SIGNAL, s=(4, 4), dim=(0, 1), norm="ortho")],
    "irfft2": [call(torch.fft.rfft2(SIGNAL)), call(torch.fft.rfft2(SIGNAL), s=(3, 8), dim=(-2, -1), norm="ortho")],
    "irfftn": [call(torch.fft.rfftn(SIGNAL)), call(torch.fft.rfftn(SIGNAL), s=(3, 8), dim=(-2, -1), norm="ortho")],
    "fftshift": [call(SIGNAL), call(SIGNAL, dim=-1)],
    "ifftshift": [call(SIGNAL), call(SIGNAL, dim=-1)],
    "matmul": [call(X, SQUARE), call(X, ROW), call(X, other=SQUARE)],
    "rmatmul": [call(SQUARE, X), call(SQUARE, ROW)],
    "bmm": [call(X, Y.transpose(1, 2)), call(X, mat2=Y.transpose(1, 2))],
    "mm": [call(SQUARE, SQUARE), call(SQUARE, mat2=SQUARE)],
    "mv": [call(SQUARE, ROW), call(SQUARE, vec=ROW)],
    "dot": [call(ROW, SQUARE[0]), call(ROW, tensor=SQUARE[0])],
    "vdot": [call(ROW, SQUARE[0]), call(ROW, other=SQUARE[0])],
    "inner": [call(X, Y[0]), call(X, other=ROW)],
    "vecdot": [call(X, Y), call(X, Y, dim=1)],
    "outer": [call(ROW, SQUARE[0]), call(ROW, vec2=SQUARE[0])],
    "einsum": [call("btd,de->bte", X, SQUARE), call("btd,btd->b", X, Y), call("bt d,de,e->b t", X, SQUARE, ROW)],
    "tensordot": [
        call(X, SQUARE, 1),
        call(X, Y, dims=([0, 2], [0, 2])),
    ],
    "linear": [call(X, SQUARE), call(X, weight=SQUARE, bias=ROW)],
    "bilinear": [
        call(LOGITS, LOGITS, torch.randn(5, 4, 4)),
        call(LOGITS, LOGITS, weight=torch.randn(5, 4, 4), bias=torch.randn(5)),
    ],
    "addmm": [call(SQUARE, SQUARE, SQUARE), call(ROW, mat1=SQUARE, mat2=SQUARE, beta=0.5, alpha=2)],
    "addmv": [call(ROW, SQUARE, ROW), call(ROW, mat=SQUARE, vec=ROW, beta=0.5, alpha=2)],
    "addr": [call(SQUARE, ROW, ROW), call(SQUARE, vec1=ROW, vec2=ROW, beta=0.5, alpha=2)],
    "addbmm": [call(SQUARE, BATCH, BATCH), call(SQUARE, batch1=BATCH, batch2=BATCH, beta=0.5, alpha=2)],
    "baddbmm": [call(BATCH, BATCH, BATCH), call(SQUARE, batch1=BATCH, batch2=BATCH, beta=0.5, alpha=2)],
    "multi_dot": [call([SQUARE, SYMMETRIC, SQUARE]), call([ROW, SQUARE, ROW])],
    "kron": [call(SQUARE, X[0]), call(SQUARE, other=ROW)],
    "cross": [call(torch.randn(2, 3), torch.randn(2, 3), 1), call(X, other=Y, dim=1)],
    "linalg_cross": [call(X.mT, Y.mT), call(X, Y, dim=1)],
    "svdvals": [call(BATCH), call(TALL)],
    "eigvalsh": [call(SYMMETRIC), call(SYMMETRIC, UPLO="U")],
    "cholesky": [call(SYMMETRIC), call(SYMMETRIC, upper=True)],
    "cholesky_solve": [call(SQUARE, LOWER), call(SQUARE, LOWER.T, upper=True), call(SQUARE, input2=LOWER)],
    "cholesky_inverse": [call(LOWER), call(LOWER.T, upper=True)],
    "lu": [call(BATCH), call(TALL, pivot=True)],
    "lu_factor": [call(BATCH), call(BATCH, pivot=True)],
    "lu_solve": [
        call(*torch.linalg.lu_factor(BATCH), BATCH),
        call(*torch.linalg.lu_factor(BATCH), BATCH, left=False, adjoint=True),
    ],
    "inv": [call(BATCH)],
    "pinv": [call(TALL), call(TALL, rcond=1e-4), call(SYMMETRIC, atol=1e-4, rtol=1e-4, hermitian=True)],
    "solve": [call(BATCH, BATCH), call(BATCH, torch.randn(2, 4)), call(BATCH, BATCH, left=False)],
    "solve_triangular": [
        call(LOWER, SQUARE, upper=False),
        call(LOWER.T, SQUARE, upper=True, left=False, unitriangular=True),
    ],
    "lstsq": [call(TALL, torch.randn(2, 5, 2)), call(TALL[0], torch.randn(5, 2), rcond=1e-5, driver="gelsd")],
    "det": [call(BATCH)],
    "slogdet": [call(BATCH)],
    "logdet": [call(SYMMETRIC)],
    "matrix_rank": [
        call(BATCH),
        call(BATCH, tol=1e-3),
        call(SYMMETRIC, atol=1e-3, rtol=1e-3, hermitian=True),
    ],
    "matrix_power": [call(BATCH, 3), call(BATCH, n=-1)],
    "matrix_exp": [call(BATCH)],
    "linalg_cond": [call(BATCH), call(BATCH, p=1)],
    "tensorinv": [call(BATCH[0].view(2, 2, 4)), call(BATCH[0].view(2, 2, 4), ind=2)],
    "tensorsolve": [
        call(SYMMETRIC.view(2, 2, 4), torch.randn(2, 2)),
        call(SYMMETRIC.view(2, 2, 2, 2), torch.randn(2, 2), dims=(2, 3)),
    ],
    "householder_product": [call(TALL, torch.randn(2, 3))],
    "vander": [call(ROW), call(ROW, N=3, increasing=True)],
}

# What is determined only up to sign, phase or order: (call, what is compared of the results)
UNDETERMINED: dict[str, list[Call]] = {
    "svd": [call(BATCH), call(TALL, full_matrices=False)],
    "svd_v": [call(BATCH), call(TALL, some=False), call(TALL, compute_uv=True)],
    "qr": [call(BATCH), call(TALL, mode="complete")],
    "eigh": [call(SYMMETRIC), call(SYMMETRIC, UPLO="U")],
    "eig": [call(SYMMETRIC)],
    "eigvals": [call(SYMMETRIC)],
}

SELECTION: dict[str, list[Call]] = {
    "getitem": [call(X, 0), call(X, (slice(None), -1)), call(X, (Ellipsis, None, slice(1, 3))), call(X, BITS)],
    "gather": [call(X, 1, INDEX), call(X, dim=1, index=INDEX)],
    "index_select": [call(X, 1, IDS[0, :3] % 3), call(X, dim=1, index=PICKS)],
    "take_along_dim": [call(X, INDEX, 1), call(X, indices=INDEX, dim=1), call(X, torch.tensor([5, 23]))],
    "take": [call(X, IDS), call(X, index=torch.tensor([-1, 5]))],
    "masked_select": [call(X, BITS), call(X, mask=BITS)],
    "tril": [call(SQUARE), call(SQUARE, diagonal=1)],
    "triu": [call(SQUARE), call(SQUARE, diagonal=-1)],
    "scatter": [
        call(X, 1, INDEX, Y),
        call(X, dim=1, index=INDEX, value=2.0),
        call(X, dim=1, index=INDEX, src=Y),
    ],
    "scatter_add": [call(X, 1, INDEX, Y), call(X, dim=1, index=INDEX, src=Y)],
    "scatter_reduce": [
        call(X, 1, INDEX, Y, "amax"),
        call(X, dim=1, index=INDEX, src=Y, reduce="mean", include_self=False),
    ],
    "index_add": [call(X, 1, PICKS, Y[:, :2]), call(X, dim=1, index=PICKS[:1], source=Y[:, :1], alpha=3)],
    "index_copy": [call(X, 1, PICKS, Y[:, :2]), call(X, dim=1, index=PICKS[:1], source=Y[:, :1])],
    "index_fill": [call(X, 1, PICKS, 0.5), call(X, dim=1, index=PICKS, value=2.0)],
    "index_put": [
        call(X, (PICKS % 2, PICKS), torch.tensor(0.5)),
        call(X, indices=(PICKS % 2,), values=Y[0], accumulate=True),
    ],
    "masked_scatter": [call(X, BITS, Y), call(X, mask=BITS, source=Y)],
    "put": [call(X, PICKS, ROW[:2]), call(X, index=PICKS, source=ROW[:2], accumulate=True)],
    "select_scatter": [call(X, Y[:, 0], 1, 2), call(X, src=Y[:, 0], dim=1, index=-1)],
    "slice_scatter": [call(X, Y[:, :2], 1, 1, 3), call(X, src=Y[:, :1], dim=1, start=0, end=2, step=2)],
    "diagonal_scatter": [call(SQUARE, ROW), call(SQUARE, src=ROW[:3], offset=1, dim1=0, dim2=1)],
    "one_hot": [call(IDS), call(IDS, num_classes=7)],
    "cond": [call(torch.tensor(True), X, Y), call(torch.tensor([0.0]), X, Y)],
}

LAYOUT: dict[str, list[Call]] = {
    "view": [call(X, 6, 4), call(X, (2, -1)), call(X, torch.int32)],
    "view_as": [call(X, torch.empty(6, 4)), call(X, other=torch.empty(6, 4))],
    "reshape": [call(X, 6, 4), call(X, (2, -1)), call(X.transpose(0, 1), shape=(6, 4))],
    "reshape_as": [call(X.mT, torch.empty(6, 4)), call(X, other=torch.empty(6, 4))],
    "flatten": [call(X), call(X, 1), call(X, start_dim=0, end_dim=1)],
    "unflatten": [call(X, 2, (2, 2)), call(X, dim=-1, sizes=(2, -1))],
    "transpose": [call(X, 1, 2), call(X, dim0=0, dim1=-1)],
    "permute": [call(X, 2, 0, 1), call(X, (2, 0, 1)), call(X, dims=(0, 2, 1))],
    "t": [call(SQUARE)],
    "movedim": [call(X, 0, 2), call(X, source=(0, 1), destination=(1, 2))],
    "squeeze": [call(X[:1]), call(X[:1], 0), call(X[:1], dim=0)],
    "unsqueeze": [call(X, 1), call(X, dim=-1)],
    "select": [call(X, 1, 2), call(X, dim=1, index=-1)],
    "narrow": [call(X, 1, 0, 2), call(X, dim=1, start=1, length=2)],
    "narrow_copy": [call(X, 1, 0, 2), call(X, dim=1, start=1, length=2)],
    "unfold": [call(X, 2, 2, 1), call(X, dimension=1, size=2, step=1)],
    "diagonal": [call(X), call(X, offset=1, dim1=1, dim2=2)],
    "linalg_diagonal": [call(X), call(X, offset=1, dim1=0, dim2=2)],
    "unbind": [call(X), call(X, dim=1)],
    "split": [
        call(X, 2, 1),
        call(X, [1, 2], dim=1),
        call(X, split_size=2, dim=1),
        call(X, split_size_or_sections=[1, 2], dim=1),
    ],
    "split_with_sizes": [call(X, [1, 2], 1), call(X, split_sizes=[3, 1], dim=-1)],
    "chunk": [call(X, 2), call(X, chunks=2, dim=-1)],
    "tensor_split": [call(X, 2), call(X, indices=(1, 2), dim=1), call(X, sections=3, dim=-1)],
    "hsplit": [call(X, 3), call(X, [1])],
    "vsplit": [call(X, 2), call(X, [1])],
    "dsplit": [call(X, 2), call(X, [1, 3])],
    "cat": [call([X, Y], 1), call((X, Y), dim=-1)],
    "stack": [call([X, Y], 1), call((X, Y), dim=-1)],
    **{name: [call([X, Y])] for name in ("hstack", "vstack", "dstack", "column_stack")},
    "block_diag": [call(SQUARE, X[0], ROW)],
    "cartesian_prod": [call(ROW, PICKS.float())],
    "meshgrid": [call(ROW, EDGES[:2], indexing="ij"), call([ROW, EDGES[:2]], indexing="xy")],
    "broadcast_tensors": [call(X, ROW), call(X[:1], Y)],
    "expand": [call(ROW, 2, 3, 4), call(X[:1], (5, -1, -1))],
    "expand_as": [call(ROW, X), call(X[:1], other=X)],
    "broadcast_to": [call(ROW, (2, 3, 4)), call(ROW, size=(3, 4))],
    "repeat": [call(X, 2, 1, 1), call(ROW, (3, 2))],
    "repeat_interleave": [call(X, 2), call(X, repeats=2, dim=1), call(X, torch.tensor([1, 0, 2]), dim=1)],
    "tile": [call(X, (2, 1, 1)), call(ROW, dims=(3,))],
    "flip": [call(X, 0), call(X, (0, 1)), call(X, dims=(-1,))],
    "rot90": [call(X, 1, [1, 2]), call(X, k=2, dims=(0, 1))],
    "roll": [call(X, 1), call(X, 1, 0), call(X, shifts=(1, 2), dims=(0, 1))],
    "diag": [call(ROW), call(SQUARE, 1), call(SQUARE, diagonal=-1)],
    "diagflat": [call(ROW), call(ROW, offset=1)],
    "diag_embed": [call(X), call(X, offset=1, dim1=0, dim2=2)],
    "pad": [
        call(X, (1, 2)),
        call(X, (0, 0, 1, 1), value=2.5),
        call(X, (1, 1), mode="reflect"),
        call(X, pad=(1, 0), mode="replicate"),
    ],
    "pixel_shuffle": [call(IMAGE, 2)],
    "pixel_unshuffle": [call(IMAGE, 2)],
    "to": [call(X, torch.float64), call(X, IDS), call(X, dtype=torch.bfloat16), call(X, torch.complex64)],
    "type_as": [call(X, IDS), call(X, other=IDS)],
    "zeros_like": [call(X), call(X, dtype=torch.int64)],
    "ones_like": [call(X), call(X, dtype=torch.bfloat16)],
    "full_like": [call(X, 3), call(X, fill_value=2.5, dtype=torch.float64)],
    "new_zeros": [call(X, (2, 3)), call(X, 5), call(X, size=(2,), dtype=torch.int64)],
    "new_ones": [call(X, (2, 3)), call(X, size=(2,), dtype=torch.int64)],
    "new_full": [call(X, (2, 3), 2.5), call(X, size=(2,), fill_value=3, dtype=torch.int64)],
}

NETWORKS: dict[str, list[Call]] = {
    "layer_norm": [call(X, (4,)), call(X, normalized_shape=[4], weight=ROW, bias=ROW, eps=1e-3)],
    "rms_norm": [call(X, (4,)), call(X, normalized_shape=[4], weight=ROW, eps=1e-3)],
    "group_norm": [
        call(IMAGE, 2),
        call(IMAGE, num_groups=2, weight=ROW, bias=ROW, eps=1e-3),
    ],
    "batch_norm": [
        call(LOGITS, ROW, ROW.abs() + 1),
        call(LOGITS, running_mean=ROW, running_var=ROW.abs() + 1, weight=ROW, bias=ROW, momentum=0.2, eps=1e-3),
        call(LOGITS, None, None, training=True),
    ],
    "instance_norm": [
        call(SIGNAL),
        call(SIGNAL, weight=ROW[:3], bias=ROW[:3], momentum=0.2, eps=1e-3),
        call(SIGNAL, running_mean=ROW[:3], running_var=ROW[:3].abs() + 1, use_input_stats=False),
    ],
    "local_response_norm": [call(SIGNAL, 2), call(SIGNAL, size=3, alpha=0.1, beta=0.5, k=2.0)],
    "conv1d": [
        call(SIGNAL, torch.randn(4, 3, 3)),
        call(SIGNAL, weight=torch.randn(6, 1, 3), bias=torch.randn(6), stride=2, padding=2, dilation=2, groups=3),
    ],
    "conv2d": [
        call(IMAGE, torch.randn(2, 4, 3, 3)),
        call(IMAGE, weight=torch.randn(4, 1, 3, 3), bias=ROW, stride=2, padding=2, dilation=2, groups=4),
    ],
    "conv3d": [
        call(IMAGE[None], torch.randn(3, 2, 2, 3, 3)),
        call(
            IMAGE[None],
            weight=torch.randn(2, 1, 2, 3, 3),
            bias=torch.randn(2),
            stride=1,
            padding=1,
            dilation=1,
            groups=2,
        ),
    ],
    "conv_transpose1d": [
        call(SIGNAL, torch.randn(3, 4, 3)),
        call(
            SIGNAL,
            weight=torch.randn(3, 2, 3),
            bias=torch.randn(6),
            stride=2,
            padding=1,
            output_padding=1,
            groups=3,
            dilation=2,
        ),
    ],
    "conv_transpose2d": [
        call(IMAGE, torch.randn(4, 2, 3, 3)),
        call(
            IMAGE,
            weight=torch.randn(4, 1, 3, 3),
            bias=torch.randn(2),
            stride=2,
            padding=1,
            output_padding=1,
            groups=2,
            dilation=1,
        ),
    ],
    "avg_pool1d": [
        call(SIGNAL, 2),
        call(SIGNAL, kernel_size=3, stride=2, padding=1, ceil_mode=True, count_include_pad=False),
    ],
    "avg_pool2d": [
        call(IMAGE, 2),
        call(IMAGE, kernel_size=3, stride=2, padding=1, ceil_mode=True, count_include_pad=False, divisor_override=2),
    ],
    "max_pool1d": [call(SIGNAL, 2), call(SIGNAL, kernel_size=3, stride=2, padding=1, dilation=2, ceil_mode=True)],
    "max_pool2d": [call(IMAGE, 2), call(IMAGE, kernel_size=3, stride=2, padding=1, dilation=2, ceil_mode=True)],
    "lp_pool1d": [call(SIGNAL.abs(), 2, 2), call(SIGNAL.abs(), norm_type=2, kernel_size=3, stride=2, ceil_mode=True)],
    "adaptive_avg_pool1d": [call(SIGNAL, 3), call(SIGNAL, output_size=5)],
    "adaptive_avg_pool2d": [call(IMAGE, 3), call(IMAGE, output_size=(2, 5))],
    "adaptive_max_pool1d": [call(SIGNAL, 3), call(SIGNAL, output_size=5)],
    "interpolate": [
        call(SIGNAL, 5),
        call(SIGNAL, size=16, mode="linear", align_corners=True),
        call(IMAGE, scale_factor=2.0, mode="bilinear", recompute_scale_factor=True, antialias=False),
    ],
    "im2col": [call(IMAGE, 2), call(IMAGE, kernel_size=2, dilation=2, padding=1, stride=2)],
    "fold": [
        call(torch.randn(2, 8, 25), (6, 6), 2),
        call(torch.randn(2, 8, 9), output_size=(6, 6), kernel_size=2, dilation=2, padding=1, stride=2),
    ],
    "embedding": [
        call(IDS, SQUARE),
        call(IDS, weight=SQUARE, padding_idx=0, norm_type=2.0),
    ],
    "scaled_dot_product_attention": [
        call(HEADS, HEADS, HEADS),
        call(HEADS, HEADS, HEADS, is_causal=True, scale=0.3),
        call(HEADS, key=HEADS, value=HEADS, attn_mask=torch.ones(5, 5) > 0, dropout_p=0.0, enable_gqa=False),
    ],
    "mse_loss": [call(X, Y), call(X, target=Y, reduction="none", weight=POSITIVE)],
    "l1_loss": [call(X, Y), call(X, target=Y, reduction="sum", weight=POSITIVE)],
    "smooth_l1_loss": [call(X, Y), call(X, target=Y, reduction="none", beta=0.5)],
    "huber_loss": [call(X, Y), call(X, target=Y, reduction="none", delta=0.5, weight=POSITIVE)],
    "cross_entropy": [
        call(LOGITS, LABELS),
        call(LOGITS, target=LABELS, weight=ROW.abs(), ignore_index=0, reduction="none", label_smoothing=0.1),
        call(LOGITS, LOGITS.softmax(-1)),
    ],
    "nll_loss": [
        call(LOGITS, LABELS),
        call(LOGITS, target=LABELS, weight=ROW.abs(), ignore_index=0, reduction="none"),
    ],
    "kl_div": [call(X, UNIT), call(X, target=Y, reduction="batchmean", log_target=True)],
    "binary_cross_entropy": [call(UNIT, UNIT.flip(0)), call(UNIT, target=UNIT, weight=POSITIVE, reduction="none")],
    "binary_cross_entropy_with_logits": [
        call(X, UNIT),
        call(X, target=UNIT, weight=POSITIVE, pos_weight=ROW.abs(), reduction="none"),
    ],
    "poisson_nll_loss": [
        call(X, POSITIVE),
        call(POSITIVE, target=POSITIVE, log_input=False, full=True, eps=1e-3, reduction="none"),
    ],
    "hinge_embedding_loss": [call(X, Y.sign()), call(X, target=Y.sign(), margin=0.5, reduction="none")],
    "soft_margin_loss": [call(X, Y.sign()), call(X, target=Y.sign(), reduction="none")],
    "cosine_embedding_loss": [
        call(LOGITS, LOGITS.flip(0), torch.tensor([1, -1, 1])),
        call(LOGITS, LOGITS.flip(0), torch.tensor([1, -1, 1]), margin=0.1, reduction="none"),
    ],
    "margin_ranking_loss": [
        call(ROW, ROW.flip(0), ROW.sign()),
        call(ROW, ROW, ROW.sign(), margin=0.1, reduction="none"),
    ],
    "triplet_margin_loss": [
        call(LOGITS, LOGITS.flip(0), LOGITS.roll(1)),
        call(LOGITS, LOGITS.flip(0), LOGITS.roll(1), margin=0.5, p=1.0, eps=1e-3, swap=True, reduction="none"),
    ],
}

# Tensors of sizes alone: what is compared is torch's function of the same name.
MADE: dict[str, list[Call]] = {
    "zeros": [call((2, 3)), call(2, 3), call((2,), dtype=torch.int64)],
    "ones": [call((2, 3)), call((2,), dtype=torch.int64)],
    "full": [call((2, 3), 2.5), call((2,), fill_value=3, dtype=torch.float64)],
    "arange": [call(5), call(1, 6, 2), call(0, end=1, step=0.25, dtype=torch.float64)],
    "linspace": [call(0, 1, 5), call(0, end=1, steps=3, dtype=torch.float64)],
    "logspace": [call(0, 1, 5), call(0, end=1, steps=3, base=2, dtype=torch.float64)],
    "eye": [call(3), call(3, m=2, dtype=torch.int64)],
}

# Draws: what is compared is shape and dtype, and that the seed decides.
DRAWN: dict[str, list[Call]] = {
    "randn_like": [call(X), call(X, dtype=torch.bfloat16)],
    "rand_like": [call(X), call(X, dtype=torch.float64)],
    "randint_like": [call(X, 100), call(X, 50, 100), call(X, low=50, high=100, dtype=torch.int64)],
    "normal_like": [call(X), call(X, mean=1.0, std=2.0)],
    "uniform_like": [call(X), call(X, -1, 1), call(X, **{"from": 2.0, "to": 3.0})],
    "exponential_like": [call(X), call(X, lambd=2.0)],
    "bernoulli_like": [call(torch.empty(40)), call(torch.empty(40), p=0.25)],
    "normal": [call(X, 2.0), call(X, POSITIVE), call(X, std=POSITIVE)],
    "bernoulli": [call(UNIT.repeat(2, 2, 2)), call(UNIT.repeat(2, 2, 2), p=0.5)],
    "poisson": [call(POSITIVE * 30)],
    "multinomial": [call(POSITIVE[0], 3), call(POSITIVE[0], num_samples=20, replacement=True)],
    "dropout": [call(POSITIVE), call(POSITIVE, p=0.5, training=True)],
    "alpha_dropout": [call(POSITIVE, 0.5, True), call(POSITIVE, p=0.5, training=True)],
    "randn": [call(2, 3), call((2, 3)), call((2, 3), dtype=torch.float64)],
    "rand": [call(2, 3), call((2, 3)), call((2, 3), dtype=torch.float64)],
    "randint": [call(100, (20,)), call(50, 100, (20,)), call(0, high=100, size=(20,), dtype=torch.int32)],
    "randperm": [call(20), call(20, dtype=torch.int32)],
}

# Memory that torch leaves as it was, and here is zeros: what is compared is shape and dtype.
EMPTY: dict[str, list[Call]] = {
    "empty_like": [call(X), call(X, dtype=torch.int64)],
    "new_empty": [call(X, (2, 3)), call(X, size=(2,), dtype=torch.int64)],
}

DETERMINED: dict[str, list[Call]] = {**ELEMENTWISE, **REDUCTIONS, **PRODUCTS, **SELECTION, **LAYOUT, **NETWORKS}
EXAMPLES: dict[str, list[Call]] = {**DETERMINED, **UNDETERMINED, **MADE, **DRAWN, **EMPTY}
RECORDED_BY_THE_CLIENT = {"left_pad", "item", "setitem", "set_view"}


def tensors(operand: Any) -> list[Tensor]:
    """All tensors in nested arguments."""
    if isinstance(operand, Tensor):
        return [operand]
    if isinstance(operand, dict):
        operand = list(operand.values())
    return [tensor for part in operand for tensor in tensors(part)] if isinstance(operand, (tuple, list)) else []
