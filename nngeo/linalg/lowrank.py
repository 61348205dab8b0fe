"""A few weighted rows plus a diagonal: Woodbury's identity, and eigenvectors of the span of the rows alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from nngeo.linalg.cache import Cache, version
from nngeo.linalg.decompose import cholesky, eigh
from nngeo.linalg.spectrum import Spectrum, cleaned, logarithm, power

Thin = tuple[Tensor, Tensor]


def complement(rows: Tensor, count: int) -> Tensor:
    """(count, P), orthonormal rows that are orthogonal to orthonormal rows (r, P)."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(count, rows.shape[1], generator=generator, dtype=torch.float64).to(rows)
    return torch.linalg.qr(torch.cat([rows, draws]).mT).Q.mT[len(rows) :]


@dataclass(frozen=True, eq=False)
class LowRankPlusDiagonal:
    """`V' diag(c) V + diag(d)`: rows V (r, P), weights c (r,), and d 0-d (a multiple of the identity) or (P,).

    Args:
        thin: eigenvalues (m,), m <= r, and orthonormal eigenvectors (m, P) of `V' diag(c) V`, where they are known.
    """

    rows: Tensor
    weights: Tensor
    diagonal: Tensor
    thin: Callable[[], Thin] | None = field(default=None, repr=False)
    _cache: Cache = field(default_factory=Cache, init=False, repr=False)

    def __reduce__(self) -> tuple[type[LowRankPlusDiagonal], tuple[Tensor, Tensor, Tensor]]:
        return LowRankPlusDiagonal, (self.rows, self.weights, self.diagonal)  # what `thin` knows is computed again

    def eigen(self) -> Thin:
        """Eigenvalues (m,) and orthonormal eigenvectors (m, P) of `V' diag(c) V`: O(r^2 P), once."""
        if self.thin is not None:
            return self.thin()
        return self._cache.get("eigen", version(self.rows, self.weights), self._eigen)

    def _eigen(self) -> Thin:
        q, r = torch.linalg.qr(self.rows.mT)
        values, vectors = eigh((r * self.weights) @ r.mT, "low-rank matrix")
        return cleaned(values), (q @ vectors).mT

    # Products

    def mv(self, v: Tensor) -> Tensor:
        """The product with vectors (..., P): O(r P)."""
        return ((v @ self.rows.mT) * self.weights) @ self.rows + self.diagonal * v

    def diag(self) -> Tensor:
        """(P,)."""
        return self.weights @ self.rows.square() + self.diagonal

    def to_torch(self) -> Tensor:
        """(P, P)."""
        dense = (self.rows.mT * self.weights) @ self.rows
        dense.diagonal().add_(self.diagonal)
        return dense

    def scaled(self, factor: float | Tensor) -> LowRankPlusDiagonal:
        """A multiple, of any sign."""
        return LowRankPlusDiagonal(self.rows, factor * self.weights, factor * self.diagonal, self._times(factor))

    def _times(self, factor: float | Tensor) -> Callable[[], Thin]:
        def thin() -> Thin:
            values, vectors = self.eigen()
            return factor * values, vectors

        return thin

    def shifted(self, damping: Tensor) -> LowRankPlusDiagonal:
        """With damping, 0-d or (P,), added to the diagonal."""
        return LowRankPlusDiagonal(self.rows, self.weights, self.diagonal + damping, self.eigen)

    # Where the diagonal is a multiple of the identity

    @property
    def isotropic(self) -> bool:
        """Whether the diagonal is a multiple of the identity, so that the eigenvectors are those of the rows."""
        return self.diagonal.ndim == 0

    def eigenvalues(self) -> Tensor:
        """(P,), those of the rows first."""
        values, vectors = self.eigen()
        rest = self.diagonal.expand(vectors.shape[1] - len(values))
        return torch.cat([values + self.diagonal, rest])

    def spectrum(self) -> Spectrum:
        """All eigenvectors: O(P^3), and memory O(P^2)."""
        vectors = self.eigen()[1]
        basis = torch.cat([vectors, complement(vectors, vectors.shape[1] - len(vectors))])
        return Spectrum(self.eigenvalues(), lambda v: v @ basis.mT, lambda c: c @ basis)

    def top(self, k: int) -> Thin:
        """The k largest eigenvalues (k,), and eigenvectors (k, P): O((r + k)^2 P)."""
        values, vectors = self.eigen()
        missing = min(k, vectors.shape[1] - len(vectors))
        values = torch.cat([values + self.diagonal, self.diagonal.expand(missing)])
        found, where = values.topk(k)
        return found, torch.cat([vectors, complement(vectors, missing)])[where]

    def function(self, f: Callable[[Tensor], Tensor]) -> LowRankPlusDiagonal:
        """The matrix with f applied to its eigenvalues."""
        values, vectors = self.eigen()
        new = f(self.eigenvalues())
        rest = new.new_zeros(()) if len(values) == len(new) else new[-1]
        weights = new[: len(values)] - rest
        return LowRankPlusDiagonal(vectors, weights, rest, lambda: (weights, vectors))

    def solve(self, v: Tensor) -> Tensor:
        """The inverse times v (..., P): in float64, where the two terms of `inverse()` cancel."""
        if not self.isotropic:
            return self._double().inverse().mv(v.double()).to(v.dtype)
        values, vectors = self.eigen()
        new = power(self.eigenvalues(), -1.0)
        within = v @ vectors.mT
        solved = (within * new[: len(values)]) @ vectors
        if len(values) == v.shape[-1]:
            return solved
        outside = v - within @ vectors
        outside = outside - (outside @ vectors.mT) @ vectors  # again, against rounding: it is divided by the damping
        return solved + outside * new[-1]

    # Where it is any diagonal

    def inverse(self) -> LowRankPlusDiagonal:
        """By Woodbury's identity: O(r^2 P)."""
        if self.isotropic:
            return self.function(partial(power, exponent=-1.0))
        lower, rows, _ = self._capacitance()
        solved = torch.linalg.solve_triangular(lower, rows / self.diagonal, upper=False)
        return LowRankPlusDiagonal(solved, -solved.new_ones(len(solved)), 1 / self.diagonal)

    def logdet(self) -> Tensor:
        """0-d, by the determinant lemma: O(r^2 P)."""
        if self.isotropic:
            return logarithm(self.eigenvalues()).sum()
        lower, _, values = self._capacitance()
        return logarithm(self.diagonal).sum() + 2 * lower.diagonal().log().sum() + values.log().sum()

    def _double(self) -> LowRankPlusDiagonal:
        def thin() -> Thin:
            values, vectors = self.eigen()
            return values.double(), vectors.double()

        return LowRankPlusDiagonal(self.rows.double(), self.weights.double(), self.diagonal.double(), thin)

    def _capacitance(self) -> tuple[Tensor, Tensor, Tensor]:
        """The Cholesky factor (m, m) of `1/c + V 1/d V'`, with the rows V (m, P) and weights c of the eigenbasis."""
        values, vectors = self.eigen()
        values, vectors = values[values != 0], vectors[values != 0]
        inner = torch.diag_embed(1 / values) + (vectors / self.diagonal) @ vectors.mT
        return cholesky(inner), vectors, values

    @property
    def positive(self) -> bool:
        """Whether both terms are positive, so that Woodbury's identity needs nothing else."""
        return bool((self.diagonal > 0).all()) and bool((self.eigen()[0] >= 0).all())

    @property
    def invertible(self) -> bool:
        """Whether its form inverts it: by eigenvectors, or by Woodbury's identity.

        With as many rows as columns the latter has digits for the small diagonal, and few for the large sum.
        """
        return self.isotropic or (self.rows.shape[0] < self.rows.shape[1] and self.positive)
