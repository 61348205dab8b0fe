"""Lanczos' recurrence for a symmetric matrix, many start vectors side by side (Lanczos, 1950)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nngeo.linalg.length import length
from nngeo.linalg.operator import Operator
from nngeo.linalg.precision import full_precision


@dataclass(frozen=True)
class Tridiagonal:
    """Tridiagonal matrices T = Q' A Q in float64, one for each start vector."""

    alpha: Tensor  # (m, s), the diagonals
    beta: Tensor  # (m, s - 1), beside them

    def to_torch(self) -> Tensor:
        """(m, s, s)."""
        sides = torch.diag_embed(self.beta, 1)
        return torch.diag_embed(self.alpha) + sides + sides.mT


@full_precision
@torch.no_grad()
def tridiagonal(matrix: Operator, starts: Tensor, steps: int) -> Tridiagonal:
    """T (m, s, s) on the Krylov spaces of the rows of starts (m, P): m products for each of s steps.

    With full reorthogonalization, twice, so that no eigenvalue comes as ghosts; memory m s vectors, O(m s^2 P) beside
    the products. Where a space is exhausted, its T goes on with entries that have no coupling to the start.
    """
    v = starts / starts.norm(dim=-1, keepdim=True)
    basis = v.new_zeros(len(v), steps, v.shape[-1])
    alpha = v.new_zeros(len(v), steps, dtype=torch.float64)
    beta = v.new_zeros(len(v), max(steps - 1, 0), dtype=torch.float64)
    scale = v.new_zeros(len(v))
    for j in range(steps):
        basis[:, j] = v
        w = matrix.mv(v)
        alpha[:, j] = (w * v).sum(-1)
        scale = torch.maximum(scale, length(w, -1))
        if j + 1 == steps:
            break
        w = orthogonal(w, basis[:, : j + 1])
        left = length(w, -1)
        alive = left > negligible(scale)
        beta[:, j] = torch.where(alive, left, 0)
        v = torch.where(alive[:, None], w / left.masked_fill(~alive, 1)[:, None], 0)
        if not alive.any():
            break
    # A decoupled part should have eigenvalues inside of the spectrum, for functions that are defined only there.
    dead = (beta == 0).cummax(1).values if steps > 1 else beta.bool()
    alpha[:, 1:] = torch.where(dead, alpha[:, :1], alpha[:, 1:])
    beta[:, 1:] = torch.where(dead[:, :-1], 0, beta[:, 1:])
    return Tridiagonal(alpha, beta)


def orthogonal(w: Tensor, basis: Tensor) -> Tensor:
    """w (m, P) without its part in the rows of basis (m, j, P); removed twice, which is enough (Parlett, 1998)."""
    for _ in range(2):
        w = w - torch.einsum("mj,mjp->mp", torch.einsum("mjp,mp->mj", basis, w), basis)
    return w


def negligible(scale: Tensor) -> Tensor:
    """The length below which a remainder of vectors of this length is rounding."""
    return 100 * torch.finfo(scale.dtype).eps * scale
