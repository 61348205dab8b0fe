"""A dense symmetric matrix with the decompositions that its products need, each made once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from nngeo.linalg.cache import Cache, version


def reciprocal(values: Tensor, regul: float, what: str = "matrix") -> Tensor:
    """`1 / (values + regul)` for eigenvalues; without damping they must all be away from zero.

    Raises:
        ValueError: `regul == 0` and an eigenvalue that is zero up to rounding.
    """
    if regul == 0 and values.numel() and values.abs().min() <= torch.finfo(values.dtype).eps * values.abs().max():
        raise ValueError(
            f"The {what} is singular (eigenvalues from {values.min():.1e} to {values.max():.1e}): "
            "solve with `regul` > 0."
        )
    return 1 / (values + regul)


def spectral_norm(values: Tensor, ord: str | int) -> Tensor:
    """The norm of a symmetric matrix with these eigenvalues: "fro", 2 (the largest) or -2 (the smallest)."""
    if ord == "fro":
        return values.norm()
    return values.abs().max() if ord == 2 else values.abs().min()


class SymmetricMatrix:
    """A symmetric matrix (p, p), not necessarily positive; decompositions are made again when it changes in place."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor
        self._cache = Cache()

    def eigh(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues (p,), ascending, and eigenvectors (p, p) in columns. Cost O(p^3), once."""
        return self._cache.get("eigh", version(self.tensor), lambda: torch.linalg.eigh(self.tensor))

    def norm(self, ord: str | int) -> Tensor:
        """The Frobenius norm ("fro"), or the largest (2) or smallest (-2) singular value."""
        return self.tensor.norm() if ord == "fro" else spectral_norm(self.eigh()[0], ord)

    def solve(self, v: Tensor, regul: float) -> Tensor:
        """`(M + regul I)^-1 v` for v (..., p): O(p^3) for a new `regul`, O(p^2) a vector after that.

        By Cholesky. Where rounding breaks it in float32, by Cholesky in float64; where the matrix is indefinite, by LU.

        Raises:
            ValueError: `M + regul I` is singular.
        """
        solve = self._cache.get("solve", (regul, *version(self.tensor)), lambda: self._factor(regul))
        columns = v.reshape(-1, v.shape[-1]).mT
        return solve(columns).mT.reshape(v.shape).to(v.dtype)

    def _factor(self, regul: float) -> Callable[[Tensor], Tensor]:
        for dtype in dict.fromkeys((self.tensor.dtype, torch.float64)):
            damped = self.tensor.to(dtype, copy=True)
            damped.diagonal().add_(regul)
            lower, info = torch.linalg.cholesky_ex(damped)
            if not info:
                _refuse_singular(lower.diagonal().square(), regul)
                return partial(_cholesky_solve, lower)
        lu, pivots, _ = torch.linalg.lu_factor_ex(damped)
        _refuse_singular(lu.diagonal().abs(), regul)
        return lambda columns: torch.linalg.lu_solve(lu, pivots, columns.to(lu.dtype))


def _cholesky_solve(lower: Tensor, columns: Tensor) -> Tensor:
    return torch.cholesky_solve(columns.to(lower.dtype), lower)


def _refuse_singular(pivots: Tensor, regul: float) -> None:
    """Pivots of a damped positive matrix are at least `regul`; without damping they tell whether it is singular."""
    least = 0.0 if regul else len(pivots) * torch.finfo(pivots.dtype).eps * float(pivots.max())
    if not float(pivots.min()) > least:
        raise ValueError(
            f"The matrix is singular (pivots from {pivots.min():.1e} to {pivots.max():.1e}), "
            f"with regul={regul}: solve with a larger `regul`."
        )
