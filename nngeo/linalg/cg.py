"""Conjugate gradients, many right-hand sides side by side (Hestenes & Stiefel, 1952)."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from nngeo.linalg.refinement import Product, Solution, refined


class ConvergenceWarning(UserWarning):
    """An iterative method stopped before it reached the tolerance asked for."""


def conjugate_gradients(
    product: Product,
    b: Tensor,
    *,
    x0: Tensor | None = None,
    rtol: float = 1e-6,
    atol: float = 0.0,
    max_iter: int | None = None,
    precondition: Product | None = None,
) -> Solution:
    """Solutions x (m, P) of `product(x) = b` for a symmetric positive definite product of rows (m, P).

    A row is done when its residual, computed from x, is at most `max(rtol |b|, atol)`, or rounding keeps it from
    falling (`refined`); only rows that are not done are multiplied.

    Args:
        max_iter: 10 P, at most 1000, if None.
        precondition: an approximation of the inverse of `product`, symmetric positive definite.
    """
    run = partial(_run, product, precondition or torch.clone)
    return refined(run, product, b, x0=x0, rtol=rtol, atol=atol, max_iter=max_iter, energy=True)


def _run(product: Product, precondition: Product, b: Tensor, target: Tensor, limit: int) -> tuple[Tensor, int, bool]:
    x, r, p = torch.zeros_like(b), b.clone(), torch.zeros_like(b)
    rz = b.new_ones(len(b))
    active = torch.arange(len(b), device=b.device)
    iterations, indefinite = 0, False
    while len(active) and iterations < limit:
        z = precondition(r[active])
        rz_new = (r[active] * z).sum(-1)
        p[active] = z + (rz_new / rz[active])[:, None] * p[active]
        rz[active] = rz_new
        q = product(p[active])
        curvature = (p[active] * q).sum(-1)
        positive = curvature > 0
        indefinite = indefinite or not bool(positive.all())
        active, q, curvature = active[positive], q[positive], curvature[positive]
        step = (rz[active] / curvature)[:, None]
        x[active] += step * p[active]
        r[active] -= step * q
        active = active[r[active].norm(dim=-1) > target[active]]
        iterations += 1
    return x, iterations, indefinite
