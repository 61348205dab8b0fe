"""A dense symmetric matrix with the decompositions that its products need, each made once."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nngeo.linalg.cache import Cache, version
from nngeo.linalg.decompose import cholesky_attempts, eigh, eigvalsh
from nngeo.linalg.length import length
from nngeo.linalg.matrixfunction import matrix_function
from nngeo.linalg.memory import require_workspace
from nngeo.linalg.precision import FullPrecision
from nngeo.linalg.spectrum import Spectrum, cleaned, extremes, logarithm, not_positive, power

Eigen = tuple[Tensor, Tensor]

DAMPING = 1e-8  # of `solve`, unless rounding asks for more
CHUNK = 2**20  # entries that are compared at a time


def reciprocal(values: Tensor, regul: float, what: str = "matrix") -> Tensor:
    """`1 / (values + regul)` for eigenvalues; without damping they must all be away from zero.

    Raises:
        ValueError: `regul == 0` and an eigenvalue that is zero up to rounding.
    """
    if regul == 0 and values.numel() and values.abs().min() <= torch.finfo(values.dtype).eps * values.abs().max():
        raise ValueError(f"The {what} is singular ({extremes(values)}): solve with `regul` > 0.")
    return 1 / (values + regul)


def rounding_of(norm: Tensor) -> float:
    """What rounding may add to an eigenvalue of a matrix of this norm: damping up to that is drowned by it."""
    return 10 * torch.finfo(norm.dtype).eps * float(norm.detach())


def require_symmetric(matrices: Tensor, what: str) -> None:
    """Raise unless matrices (..., p, p) equal their transposes, up to half of the digits of the largest entry."""
    m = matrices.detach()
    if not m.numel():
        return
    step = max(1, CHUNK * m.shape[-1] // m.numel())  # some rows at a time: the difference is as large as they are
    starts = range(0, m.shape[-1], step)
    gap = max(float((m[..., i : i + step, :] - m[..., i : i + step].mT).amax()) for i in starts)
    low, high = (float(x) for x in m.aminmax())
    if gap > torch.finfo(m.dtype).eps ** 0.5 * max(-low, high):
        raise ValueError(
            f"{what} should be symmetric; it differs from its transpose by up to {gap:.3g}. Give `(M + M.mT) / 2` if "
            "its symmetric part is meant."
        )


def spectral_norm(values: Tensor, ord: str | int) -> Tensor:
    """The norm of a symmetric matrix with these eigenvalues: "fro", 2 (the largest) or -2 (the smallest)."""
    if ord == "fro":
        return length(values)
    return values.abs().max() if ord == 2 else values.abs().min()


class SymmetricMatrix(FullPrecision):
    """A symmetric matrix (p, p), not necessarily positive; decompositions are made again when it changes in place.

    Args:
        eigen: eigenvalues and eigenvectors in columns, where they follow from those of another matrix. Derivatives by
            the eigenvalues then need none of the eigenvectors.
        source: this other matrix, if its eigenvectors may still have to be computed.
        damped: whether it is positive by construction, however small its eigenvalues are.
    """

    def __init__(
        self,
        tensor: Tensor,
        eigen: Callable[[], Eigen] | None = None,
        source: SymmetricMatrix | None = None,
        damped: bool = False,
    ):
        self.tensor, self.damped = tensor, damped
        self._eigen, self._source, self._version = eigen, source, version(tensor)
        self._cache = Cache()

    @property
    def known(self) -> bool:
        """Whether eigenvalues and eigenvectors cost nothing more."""
        if self.diagonalised:
            return self._source is None or self._source.known
        return self._cache.holds("eigh", ((), version(self.tensor)))

    @property
    def diagonalised(self) -> bool:
        """Whether the eigenvectors are those of another matrix."""
        return self._eigen is not None and self._version == version(self.tensor)

    def eigh(self) -> Eigen:
        """Eigenvalues (p,), ascending, and eigenvectors (p, p) in columns. Cost O(p^3), once."""
        if self.diagonalised:
            values, vectors = self.spectrum()
            order = values.detach().argsort()
            return values[order], vectors[:, order]
        return self._kept("eigh", (), lambda: eigh(self.tensor))

    def spectrum(self) -> Eigen:
        """Eigenvalues (p,) in no order, zero where rounding can't tell them from it, and eigenvectors in columns."""
        if self._eigen is not None and self.diagonalised:
            return self._eigen()
        values, vectors = self.eigh()
        return cleaned(values), vectors

    def basis(self) -> Spectrum:
        """The eigenvalues of `spectrum()`, with the maps into the eigenbasis and back."""
        values, vectors = self.spectrum()
        return Spectrum(values, lambda v: v @ vectors, lambda c: c @ vectors.mT)

    def scaled(self, factor: float | Tensor) -> SymmetricMatrix:
        """A multiple; with the same eigenvectors, where the factor may have a gradient."""
        if not isinstance(factor, Tensor):
            return SymmetricMatrix(factor * self.tensor)

        def eigen() -> Eigen:
            values, vectors = self.spectrum()
            return factor * values, vectors

        return SymmetricMatrix(factor * self.tensor, eigen, self)

    def shifted(self, damping: Tensor) -> SymmetricMatrix:
        """`M + damping I`, or `M + diag(damping)`: 0-d keeps the eigenvectors, (p,) does not."""
        tensor = self.tensor.clone()
        tensor.diagonal().add_(damping)
        damped = bool((damping > 0).all())
        if damping.ndim:
            return SymmetricMatrix(tensor, damped=damped)

        def eigen() -> Eigen:
            values, vectors = self.spectrum()
            return values + damping, vectors

        return SymmetricMatrix(tensor, eigen, self, damped)

    def function(self, f: Callable[[Tensor], Tensor]) -> SymmetricMatrix:
        """The matrix with f applied to its eigenvalues (p,)."""
        if self.tensor.requires_grad and not self.diagonalised:
            return SymmetricMatrix(matrix_function(self.tensor, f))
        values, vectors = self.spectrum()
        require_workspace(f"A function of a matrix {tuple(vectors.shape)}", 2 * vectors.numel(), vectors)
        new = f(values)
        return SymmetricMatrix((vectors * new) @ vectors.mT, lambda: (new, vectors))

    def apply(self, f: Callable[[Tensor], Tensor], v: Tensor) -> Tensor:
        """`function(f)` times v (..., p), without the matrix where no derivative is asked for."""
        if self.tensor.requires_grad and not self.diagonalised:
            return v @ self.function(f).tensor
        values, vectors = self.spectrum()
        return ((v @ vectors) * f(values)) @ vectors.mT

    def inverse(self) -> SymmetricMatrix:
        """By eigenvalues where they are known, else as `solve`."""
        if self.known:
            return self.function(partial(power, exponent=-1.0))
        p = len(self.tensor)
        require_workspace(f"The inverse of a matrix ({p}, {p})", 4 * p**2, self.tensor)
        columns = self.solve(torch.eye(p, dtype=self.tensor.dtype, device=self.tensor.device), 0.0)
        return SymmetricMatrix((columns + columns.mT) / 2, damped=self.damped)

    def logdet(self) -> Tensor:
        """0-d, by eigenvalues where they are known, else by Cholesky, in float64 where rounding breaks it in float32.

        Raises:
            ValueError: the matrix is not positive definite; with its smallest eigenvalue.
        """
        if self.known:
            return logarithm(self.spectrum()[0]).sum()
        for lower in cholesky_attempts(self.tensor):
            if not _negligible(lower.diagonal().detach().square(), self.damped):
                return 2 * lower.diagonal().log().sum().to(self.tensor.dtype)
        raise not_positive(cleaned(eigvalsh(self.tensor.detach())))

    def norm(self, ord: str | int) -> Tensor:
        """The Frobenius norm ("fro"), or the largest (2) or smallest (-2) singular value."""
        return length(self.tensor) if ord == "fro" else spectral_norm(self.spectrum()[0], ord)

    def solve(self, v: Tensor, regul: float) -> Tensor:
        """`(M + regul I)^-1 v` for v (..., p): O(p^3) for a new `regul`, O(p^2) a vector after that.

        By Cholesky. Where rounding breaks it in float32, by Cholesky in float64; where the matrix is indefinite, by LU.
        By eigenvalues where `regul` is as small as their rounding errors, which then must not be taken for them.

        Raises:
            ValueError: `M + regul I` is singular.
        """
        if 0 < regul <= self.rounding():
            return self.apply(lambda values: 1 / (values + regul), v)
        solve = self._kept("solve", regul, lambda: self._factor(regul))
        columns = v.reshape(-1, v.shape[-1]).mT
        return solve(columns).mT.reshape(v.shape).to(v.dtype)

    def rounding(self) -> float:
        """See `rounding_of`."""
        return self._cache.get("rounding", version(self.tensor), lambda: rounding_of(length(self.tensor)))

    def _factor(self, regul: float) -> Callable[[Tensor], Tensor]:
        solve = self._factored(regul)
        if regul or not self._is_singular(solve):
            return solve
        if self.damped and self.diagonalised:  # by a damping that rounding has drowned in the entries
            return lambda columns: self.apply(lambda values: 1 / values, columns.mT).mT
        raise self._singular(regul)

    @torch.no_grad()
    def _is_singular(self, solve: Callable[[Tensor], Tensor]) -> bool:
        """Whether rounding can't tell the smallest eigenvalue from zero: by a few steps of inverse iteration."""
        matrix = self.tensor
        p, size = len(matrix), torch.stack(matrix.aminmax()).abs().max()
        v = y = (torch.arange(1, p + 1, dtype=matrix.dtype, device=matrix.device) ** 2).sin()[:, None]
        for _ in range(4):
            v, y = matrix @ (v / v.norm()) / size, (solve(y / y.norm()) * size).to(matrix)
        # Vector damping can't be told from the entries: then what these can hold is believed.
        noise = (p**0.5 if self.damped and not self.diagonalised else 8 + p**0.5) * torch.finfo(matrix.dtype).eps
        return not bool(y.norm() * v.norm() * noise < 1)

    def _factored(self, regul: float) -> Callable[[Tensor], Tensor]:
        for lower in cholesky_attempts(self.tensor, regul):
            return partial(_cholesky_solve, lower)
        matrix = self.tensor.to(torch.float64, copy=True)
        matrix.diagonal().add_(regul)
        lu, pivots, _ = torch.linalg.lu_factor_ex(matrix)
        if not bool(lu.diagonal().detach().abs().min() > 0):
            raise self._singular(regul)
        return lambda columns: torch.linalg.lu_solve(lu, pivots, columns.to(lu.dtype))

    def _singular(self, regul: float) -> ValueError:
        return ValueError(
            f"The matrix is singular ({extremes(eigvalsh(self.tensor.detach()))}), with regul={regul}: solve with a "
            "larger `regul`, or add damping (`F + damping`)."
        )

    def _kept(self, name: str, key: Hashable, make: Callable[[], Any]) -> Any:
        """What is derived, once for each version. A graph can be walked only once, so it is not kept."""
        if self.tensor.requires_grad and torch.is_grad_enabled():
            return make()
        return self._cache.get(name, (key, version(self.tensor)), make)


def _cholesky_solve(lower: Tensor, columns: Tensor) -> Tensor:
    return torch.cholesky_solve(columns.to(lower.dtype), lower)


def _negligible(pivots: Tensor, damped: bool) -> bool:
    """Whether a pivot is zero up to rounding; of a damped matrix, zero."""
    least = 0.0 if damped else len(pivots) * torch.finfo(pivots.dtype).eps * float(pivots.max())
    return not float(pivots.min()) > least
