"""Eigenbases of Kronecker products of two factors, of which one may be diagonal. n counts groups side by side."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nngeo.linalg.decompose import eigh


def eigenbasis(moment: Tensor, what: str = "moment") -> tuple[Tensor, Tensor | None]:
    """Eigenvalues (n, d) and eigenvectors in columns (n, d, d); None, the identity, for a diagonal moment (n, d).

    Eigenvalues that rounding can't tell from zero are zero, so that damping alone decides about their directions.
    `what` names the moment in errors.
    """
    if moment.ndim == 2:
        return moment, None
    values, vectors = eigh(moment, what)
    noise = torch.finfo(values.dtype).eps * values.shape[-1] * values.abs().amax(-1, keepdim=True)
    return values.masked_fill(values.abs() <= noise, 0.0), vectors


def outer(g: Tensor, a: Tensor) -> Tensor:
    """(n, o, i), the products of g (n, o) and a (n, i)."""
    return g[:, :, None] * a[:, None, :]


def times(matrix: Tensor, a: Tensor) -> Tensor:
    """`matrix @ a` (..., n, o, i) for a factor a (n, i, i), or its diagonal (n, i)."""
    return matrix * a[:, None] if a.ndim == 2 else matrix @ a


def recomposed(values: Tensor, vectors: Tensor | None) -> Tensor:
    """The inverse of `eigenbasis`: (n, d, d), or the diagonal (n, d) where the vectors are None."""
    return values if vectors is None else (vectors * values[:, None]) @ vectors.mT


def kronecker_sum(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Factors (a, g) of the Kronecker product whose partial traces are those of the sum of two products.

    Exact where the products are multiples of each other, or share a factor up to a multiple; the trace is always.
    Associative. Where the trace is zero, as in a difference, so is the result.
    """
    a, g = [first[0], second[0]], [first[1], second[1]]
    if a[0].ndim != a[1].ndim:
        a = [x.diag_embed() if x.ndim == 2 else x for x in a]
    ta, tg = [_trace(x) for x in a], [_trace(x) for x in g]
    total = ta[0] * tg[0] + ta[1] * tg[1]
    size = tg[0].abs() + tg[1].abs()  # which keeps the scale of the factors: F + F has the factors of F, g twice
    safe = [x.masked_fill(x == 0, 1.0) for x in (size, total)]
    ratio = (size / safe[1]).masked_fill(total == 0, 0.0)
    by_a = [_by_group(x, t / safe[0]) for x, t in zip(a, tg, strict=True)]
    by_g = [_by_group(x, t * ratio) for x, t in zip(g, ta, strict=True)]
    return by_a[0] + by_a[1], by_g[0] + by_g[1]


def _trace(moment: Tensor) -> Tensor:
    """(n,)."""
    return moment.sum(-1) if moment.ndim == 2 else moment.diagonal(dim1=1, dim2=2).sum(-1)


def _by_group(moment: Tensor, factor: Tensor) -> Tensor:
    return moment * factor.reshape(-1, *[1] * (moment.ndim - 1))


@dataclass(frozen=True)
class KroneckerBasis:
    """The orthogonal map `M -> ug' M ua` of matrices (..., n, o, i). `ua` is None for the identity."""

    ua: Tensor | None
    ug: Tensor

    def into(self, matrix: Tensor) -> Tensor:
        """`ug' M ua`, (..., n, o, i): the coordinates of M in this basis."""
        rotated = self.ug.mT @ matrix
        return rotated if self.ua is None else rotated @ self.ua

    def back(self, matrix: Tensor) -> Tensor:
        """`ug M ua'`, (..., n, o, i): the inverse of `into`."""
        rotated = self.ug @ matrix
        return rotated if self.ua is None else rotated @ self.ua.mT

    def scale(self, matrix: Tensor, scalings: Tensor) -> Tensor:
        """(..., n, o, i), the matrix with its coordinates in this basis multiplied by scalings (n, o, i)."""
        return self.back(self.into(matrix) * scalings)

    def diagonal(self, scalings: Tensor) -> Tensor:
        """(n, o, i), the diagonal of the operator `scale`."""
        rows = self.ug.square() @ scalings
        return rows if self.ua is None else rows @ self.ua.square().mT
