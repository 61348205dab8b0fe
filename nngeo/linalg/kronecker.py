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
