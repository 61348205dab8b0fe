"""Ritz pairs of a symmetric matrix by Lanczos with full reorthogonalization and thick restarts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nngeo.linalg.decompose import eigh
from nngeo.linalg.lanczos import negligible, orthogonal
from nngeo.linalg.length import length
from nngeo.linalg.operator import Operator


@dataclass(frozen=True)
class Goal:
    """Which eigenvalues are wanted, and how exactly."""

    order: Callable[[Tensor], Tensor]  # values -> how far in front they stand
    rtol: float  # residual, relative to the largest eigenvalue met


@dataclass(frozen=True)
class Ritz:
    """The leading pairs on a Krylov space."""

    values: Tensor  # (k,)
    vectors: Tensor  # (k, P)
    residuals: Tensor  # (k,)
    scale: float  # the largest eigenvalue met
    products: int


def krylov_schur(
    matrix: Operator,
    locked: Tensor,
    k: int,
    goal: Goal,
    limit: int,
    size: int,
    draw: Callable[[], Tensor],
    beyond: float | None = None,
) -> Ritz:
    """The k leading pairs of the matrix on the complement of the rows of locked (l, P), or fewer if it is smaller.

    A basis of `size` vectors is filled by Lanczos' recurrence and restarted from its leading Ritz vectors (Wu & Simon,
    2000), until all k residuals are small or, if `beyond` is given, belong to pairs that can't reach that far in front.

    Args:
        limit: products after which it stops.
        draw: gives random vectors (P,).
    """
    room = locked.shape[1] - len(locked)
    k, size = min(k, room), min(size, room)
    basis, t = locked.new_zeros(size, locked.shape[1]), locked.new_zeros(size, size, dtype=torch.float64)
    everything = torch.cat([locked, basis])
    basis = everything[len(locked) :]  # a view

    def fresh(j: int) -> Tensor:
        v = orthogonal(draw()[None], everything[None, : len(locked) + j])[0]
        return v / length(v)

    j, products, v = 0, 0, fresh(0)
    while True:
        basis[j] = v
        w = matrix.mv(v[None])[0]
        products += 1
        before = length(w)
        t[: j + 1, j] = t[j, : j + 1] = (basis[: j + 1] @ w).double()
        j += 1
        w = orthogonal(w[None], everything[None, : len(locked) + j])[0]
        beta = length(w)
        exhausted = bool(beta <= negligible(before)) or j == room
        values, s = eigh(t[:j, :j], "projected matrix")
        lead = goal.order(values).argsort(descending=True)
        scale = float(values.abs().max())
        residuals = float(0 if exhausted else beta) * s[-1, lead[:k]].abs()
        done = residuals <= goal.rtol * scale
        if beyond is not None:
            done |= goal.order(values[lead[:k]]) + residuals <= beyond
        if (j >= k and bool(done.all())) or products >= limit or j == room:
            coordinates = s[:, lead[:k]].mT.to(basis)
            return Ritz(values[lead[:k]].to(basis), coordinates @ basis[:j], residuals.to(basis), scale, products)
        if j == size:
            kept = min(k + (size - k) // 2, size - 1)
            basis[:kept] = s[:, lead[:kept]].mT.to(basis) @ basis
            t.zero_()[:kept, :kept] = values[lead[:kept]].diag()
            j = kept
        v = fresh(j) if exhausted else w / beta
