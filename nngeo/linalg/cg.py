"""Conjugate gradients, many right-hand sides side by side (Hestenes & Stiefel, 1952)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Product = Callable[[Tensor], Tensor]


class ConvergenceWarning(UserWarning):
    """An iterative method stopped before it reached the tolerance asked for."""


@dataclass(frozen=True)
class CGResult:
    """Where conjugate gradients stopped."""

    x: Tensor  # (m, P)
    residuals: Tensor  # (m,), relative to the right-hand side
    iterations: int
    converged: bool
    indefinite: bool  # a direction of curvature <= 0 was met, which ended its row


@torch.no_grad()
def conjugate_gradients(
    product: Product,
    b: Tensor,
    *,
    x0: Tensor | None = None,
    rtol: float = 1e-6,
    atol: float = 0.0,
    max_iter: int | None = None,
    precondition: Product | None = None,
) -> CGResult:
    """Solutions x (m, P) of `product(x) = b` for a symmetric positive definite product of rows (m, P).

    A row is done when its residual is at most `max(rtol |b|, atol)`; only rows that are not done are multiplied.

    Args:
        max_iter: 10 P, at most 1000, if None.
        precondition: an approximation of the inverse of `product`, symmetric positive definite.
    """
    limit = min(10 * b.shape[-1], 1000) if max_iter is None else max_iter
    precondition = precondition or torch.clone
    # A right-hand side of zero has a tolerance of zero, too: only the start at zero reaches it.
    x = torch.zeros_like(b) if x0 is None else torch.where(b.any(-1, keepdim=True), x0, 0)
    r = b.clone() if x0 is None else b - product(x)
    target = (rtol * b.norm(dim=-1)).clamp(min=atol)
    active = _indices(r.norm(dim=-1) > target)
    p = torch.zeros_like(b)
    rz = b.new_ones(len(b))
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
    norms = r.norm(dim=-1)
    tiny = torch.finfo(b.dtype).tiny
    return CGResult(x, norms / b.norm(dim=-1).clamp(min=tiny), iterations, bool((norms <= target).all()), indefinite)


def _indices(mask: Tensor) -> Tensor:
    return mask.nonzero()[:, 0]
