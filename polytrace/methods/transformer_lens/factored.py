"""A matrix that is known as a product of two narrow ones: the OV and QK circuits of heads, which nobody multiplies out.

Elhage et al., "A Mathematical Framework for Transformer Circuits" (2021); TransformerLens's `FactoredMatrix`.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


class FactoredMatrix:
    """`A @ B`, `A: [..., left, middle]`, `B: [..., middle, right]`; leading dimensions are as torch broadcasts them."""

    def __init__(self, A: Tensor, B: Tensor) -> None:
        """Raises ValueError for factors that do not fit."""
        import torch

        if A.shape[-1] != B.shape[-2]:
            raise ValueError(f"the factors {list(A.shape)} and {list(B.shape)} have no product")
        leading = torch.broadcast_shapes(A.shape[:-2], B.shape[:-2])
        self.A = A.expand(*leading, *A.shape[-2:])
        self.B = B.expand(*leading, *B.shape[-2:])
        self.shape = torch.Size((*leading, A.shape[-2], B.shape[-1]))

    @property
    def AB(self) -> Tensor:
        """The whole matrix."""
        return self.A @ self.B

    @property
    def BA(self) -> Tensor:
        """The small product, which has the same eigenvalues but for zeros."""
        return self.B @ self.A

    @property
    def T(self) -> FactoredMatrix:
        """Transposed."""
        return FactoredMatrix(self.B.transpose(-2, -1), self.A.transpose(-2, -1))

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __matmul__(self, other: Any) -> Any:
        """A vector gives a vector, a matrix or another FactoredMatrix a FactoredMatrix."""
        if isinstance(other, FactoredMatrix):
            return (self @ other.A) @ other.B
        if other.ndim == 1:
            return (self.A @ (self.B @ other[..., None]))[..., 0]
        return FactoredMatrix(self.A, self.B @ other)

    def __rmatmul__(self, other: Any) -> Any:
        if other.ndim == 1:
            return ((other[None] @ self.A) @ self.B)[..., 0, :]
        return FactoredMatrix(other @ self.A, self.B)

    def __mul__(self, number: Any) -> FactoredMatrix:
        return FactoredMatrix(self.A * number, self.B)

    __rmul__ = __mul__

    def __getitem__(self, index: Any) -> FactoredMatrix:
        """By leading dimensions: `model.OV[3, 5]` is head 5 of layer 3. Raises IndexError beyond these."""
        given = index if isinstance(index, tuple) else (index,)
        if len(given) > self.ndim - 2 or Ellipsis in given:
            raise IndexError(f"a FactoredMatrix of shape {list(self.shape)} is indexed by its leading dimensions")
        return FactoredMatrix(self.A[given], self.B[given])

    @cached_property
    def _svd(self) -> tuple[Tensor, Tensor, Tensor]:
        import torch

        left, right = torch.linalg.qr(self.A), torch.linalg.qr(self.B.transpose(-2, -1))
        inner, values, other = torch.linalg.svd(left.R @ right.R.transpose(-2, -1), full_matrices=False)
        return left.Q @ inner, values, right.Q @ other.transpose(-2, -1)

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """`U [..., left, rank]`, `S [..., rank]`, `V [..., right, rank]`: the matrix is `U @ diag(S) @ V.T`."""
        return self._svd

    @property
    def U(self) -> Tensor:
        return self._svd[0]

    @property
    def S(self) -> Tensor:
        return self._svd[1]

    @property
    def V(self) -> Tensor:
        return self._svd[2]

    @property
    def eigenvalues(self) -> Tensor:
        """Those of the matrix that are not zero, complex, in no order."""
        import torch

        eigenvalues: Tensor = torch.linalg.eigvals(self.BA.float())
        return eigenvalues

    def norm(self) -> Tensor:
        """The Frobenius norm of each matrix."""
        norms: Tensor = self.S.pow(2).sum(-1).sqrt()
        return norms

    def __repr__(self) -> str:
        return f"FactoredMatrix(shape={list(self.shape)}, rank <= {self.A.shape[-1]})"
