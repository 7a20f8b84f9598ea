"""Rows of products, decompositions of matrices and Fourier transforms."""

from __future__ import annotations

from polytrace.ops.spec import Cost, OpSpec, Reach, Results, along, matrix, moved, op


def _product(name: str, *kwargs: str, torch: str = "both", reach: Reach = Reach.CONTRACTED, **more: object) -> OpSpec:
    return op(name, *kwargs, torch=torch, cost=Cost.PRODUCT, reach=reach, **more)


def _named(name: str, *kwargs: str, fields: str, torch: str = "linalg") -> OpSpec:
    return matrix(name, *kwargs, torch=torch, results=Results.NAMED, fields=tuple(fields.split()))


def _transform(name: str, *kwargs: str) -> OpSpec:
    return along(name, "n", "dim", "norm", *kwargs, torch="fft", at=2, default=-1, cost=Cost.TRANSFORM)


def _transforms(name: str) -> OpSpec:
    last_two = (-2, -1) if name.endswith("2") else None
    return along(name, "s", "dim", "norm", torch="fft", at=2, default=last_two, cost=Cost.TRANSFORM)


PRODUCTS = (
    _product("matmul", "other", torch="both Tensor.__matmul__ linalg"),
    _product("rmatmul", torch="Tensor.__rmatmul__"),
    _product("bmm", "mat2"),
    _product("mm", "mat2"),
    _product("mv", "vec"),
    _product("dot", "tensor"),
    _product("vdot", "other", reach=Reach.WHOLE),
    _product("inner", "other"),
    along("vecdot", "dim", torch="linalg", at=99, default=-1, cost=Cost.PRODUCT),
    moved("outer", "vec2", torch="both Tensor.ger torch.ger"),
    _product("einsum", torch="function"),
    _product("tensordot", "dims", torch="function"),
    _product("linear", "weight", "bias", torch="functional"),
    _product("bilinear", "weight", "bias", torch="functional torch.bilinear", reach=Reach.LAST, num_last=1),
    _product("addmm", "mat1", "mat2", "beta", "alpha"),
    _product("addmv", "mat", "vec", "beta", "alpha"),
    _product("addr", "vec1", "vec2", "beta", "alpha", reach=Reach.WHOLE),
    _product("addbmm", "batch1", "batch2", "beta", "alpha", reach=Reach.WHOLE),
    _product("baddbmm", "batch1", "batch2", "beta", "alpha"),
    _product("multi_dot", torch="linalg", reach=Reach.WHOLE),
    _product("kron", "other", reach=Reach.WHOLE),
    along("cross", "other", "dim", at=2),
    along("linalg_cross", "dim", torch="linalg.cross", at=99, default=-1),
)

DECOMPOSITIONS = (
    _named("svd", "full_matrices", fields="U S Vh"),
    _named("svd_v", "some", "compute_uv", fields="U S V", torch="torch.svd Tensor.svd"),
    matrix("svdvals"),
    _named("qr", "mode", fields="Q R"),
    _named("eigh", "UPLO", fields="eigenvalues eigenvectors"),
    matrix("eigvalsh", "UPLO"),
    _named("eig", fields="eigenvalues eigenvectors"),
    matrix("eigvals"),
    matrix("cholesky", "upper", torch="linalg both"),
    matrix("cholesky_solve", "input2", "upper", torch="both"),
    matrix("cholesky_inverse", "upper", torch="both"),
    _named("lu", "pivot", fields="P L U"),
    _named("lu_factor", "pivot", fields="LU pivots"),
    matrix("lu_solve", "left", "adjoint"),
    matrix("inv", torch="linalg torch.inverse Tensor.inverse"),
    matrix("pinv", "rcond", "atol", "rtol", "hermitian", torch="linalg torch.pinverse Tensor.pinverse"),
    matrix("solve", "left"),
    matrix("solve_triangular", "upper", "left", "unitriangular"),
    _named("lstsq", "rcond", "driver", fields="solution"),
    matrix("det", torch="linalg both"),
    _named("slogdet", fields="sign logabsdet", torch="linalg both"),
    matrix("logdet", torch="both"),
    matrix("matrix_rank", "tol", "atol", "rtol", "hermitian"),
    matrix("matrix_power", "n", torch="linalg both"),
    matrix("matrix_exp", torch="linalg both"),
    matrix("linalg_cond", "p", torch="linalg.cond"),
    matrix("tensorinv", "ind", reach=Reach.WHOLE),
    matrix("tensorsolve", "dims", reach=Reach.WHOLE),
    matrix("householder_product", torch="linalg torch.orgqr Tensor.orgqr"),
    op("vander", "N", "increasing", torch="function", first=("x",)),
)

TRANSFORMS = (
    *[_transform(name) for name in ("fft", "ifft", "rfft", "irfft", "hfft", "ihfft")],
    *[_transforms(name) for name in ("fft2", "ifft2", "rfft2", "irfft2", "fftn", "ifftn", "rfftn", "irfftn")],
    along("fftshift", "dim", torch="fft", cost=Cost.FREE),
    along("ifftshift", "dim", torch="fft", cost=Cost.FREE),
)

ROWS = (*PRODUCTS, *DECOMPOSITIONS, *TRANSFORMS)
