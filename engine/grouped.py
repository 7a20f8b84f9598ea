"""Products of groups of rows, each with a matrix of its own, on a GPU: one kernel for all experts of a layer.

Rows come in tiles of `TILE_ROWS`, and which matrix a tile wants is a number on the device: the host never learns how
many rows an expert has. A row's bits depend on the row and its matrix alone: tiles have one size, sums one order. The
gradient of rows is the same kernel on the turned matrices; matrices and biases have none.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from engine.differentiable import is_differentiated

# P = rows of all tiles, J = tiles, E = matrices, I = features in, O = features out. In the kernel M, K and N are parts
# of P, I and O

TILE_ROWS = 64


def grouped_product(x_PI: Tensor, weights_EIO: Tensor, biases_EO: Tensor | None, matrix_J: Tensor) -> Tensor:
    """`[P, O]`: each tile times its matrix, its bias added; zeros for tiles whose number is `E` or more."""
    if not is_differentiated(x_PI):
        return _product(x_PI, weights_EIO, biases_EO, matrix_J)
    out_PO: Tensor = _GroupedProduct.apply(x_PI, weights_EIO, biases_EO, matrix_J)  # type: ignore[no-untyped-call]
    return out_PO


class _GroupedProduct(Function):
    @staticmethod
    def forward(ctx: Any, x_PI: Tensor, weights_EIO: Tensor, biases_EO: Tensor | None, matrix_J: Tensor) -> Tensor:
        ctx.save_for_backward(weights_EIO, matrix_J)
        return _product(x_PI, weights_EIO, biases_EO, matrix_J)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_PO: Tensor) -> tuple[Tensor, None, None, None]:
        weights_EIO, matrix_J = ctx.saved_tensors
        return _product(gradient_PO, weights_EIO.transpose(1, 2), None, matrix_J), None, None, None


def _product(x_PI: Tensor, weights_EIO: Tensor, biases_EO: Tensor | None, matrix_J: Tensor) -> Tensor:
    num_rows, num_in = x_PI.shape
    num_matrices, _, num_out = weights_EIO.shape
    assert num_rows == len(matrix_J) * TILE_ROWS, "rows are whole tiles"
    is_wide = x_PI.dtype == torch.float32  # and goes through the ordinary cores
    sizes = (32, 32, 4, 1) if is_wide else (128, 64, 4, 3)  # N, K, warps, stages: fits into 99 KiB of shared memory
    out_PO = x_PI.new_empty(num_rows, num_out)
    _multiply[len(matrix_J), triton.cdiv(num_out, sizes[0])](
        x_PI.contiguous(),
        weights_EIO,
        biases_EO,
        out_PO,
        matrix_J,
        weights_EIO.stride(0),
        weights_EIO.stride(1),
        weights_EIO.stride(2),
        HAS_BIAS=biases_EO is not None,
        E=num_matrices,
        IN=num_in,
        OUT=num_out,
        M=TILE_ROWS,
        N=sizes[0],
        K=sizes[1],
        num_warps=sizes[2],
        num_stages=sizes[3],
    )
    return out_PO


@triton.jit
def _multiply(
    x: tl.tensor,
    weights: tl.tensor,
    biases: tl.tensor,
    out: tl.tensor,
    matrices: tl.tensor,
    of_matrix: tl.tensor,  # strides of the weights
    of_in: tl.tensor,
    of_out: tl.tensor,
    HAS_BIAS: tl.constexpr,
    E: tl.constexpr,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
) -> None:
    matrix = tl.load(matrices + tl.program_id(0)).to(tl.int64)
    row_M = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    column_N = tl.program_id(1) * N + tl.arange(0, N)
    is_there_N = column_N < OUT
    total_MN = tl.zeros([M, N], tl.float32)
    weights += matrix * of_matrix + column_N[None, :].to(tl.int64) * of_out
    stop = tl.where(matrix < E, IN, 0)  # nothing to add for tiles of no matrix
    for start in range(0, stop, K):
        k = start + tl.arange(0, K)
        x_MK = tl.load(x + row_M[:, None] * IN + k[None, :], mask=(k < IN)[None, :], other=0.0)
        w_KN = tl.load(weights + k[:, None] * of_in, mask=(k < IN)[:, None] & is_there_N[None, :], other=0.0)
        total_MN = tl.dot(x_MK, w_KN, total_MN, input_precision="ieee")
    result_MN = total_MN.to(out.dtype.element_ty)
    if HAS_BIAS:
        bias_N = tl.load(biases + matrix * OUT + column_N, mask=is_there_N & (matrix < E), other=0.0)
        result_MN = (result_MN.to(tl.float32) + bias_N.to(tl.float32)[None, :]).to(out.dtype.element_ty)
    tl.store(out + row_M[:, None] * OUT + column_N[None, :], result_MN, mask=is_there_N[None, :])
