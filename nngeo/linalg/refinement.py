"""Iterative solutions whose residual is known: computed from what is returned, and made the next right-hand side."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nngeo.linalg.length import length

Product = Callable[[Tensor], Tensor]

# Rows of length one (m, P), the residuals that are small enough for them (m,), and the most iterations -> solutions
# (m, P), iterations, and whether a direction of curvature <= 0 was met. What they believe of their residual is ignored.
Pass = Callable[[Tensor, Tensor, int], tuple[Tensor, int, bool]]


@dataclass(frozen=True)
class Solution:
    """Where an iterative method stopped."""

    x: Tensor  # (m, P)
    residuals: Tensor  # (m,), |b - A x| / |b|, computed from x
    iterations: int
    converged: bool  # all residuals are as small as asked for
    indefinite: bool  # a direction of curvature <= 0 was met, which ended its row
    stalled: bool  # rounding, or that no x solves the system, kept a residual from falling further
    nearest: bool = False  # x is known to be a solution of least squares, whatever its residual


@torch.no_grad()
def refined(
    run: Pass,
    product: Product,
    b: Tensor,
    *,
    x0: Tensor | None = None,
    rtol: float = 1e-6,
    atol: float = 0.0,
    max_iter: int | None = None,
    energy: bool = False,
) -> Solution:
    """Solutions x (m, P) of `product(x) = b` by one run, and by further runs for what is left of b after it.

    The residual that a recurrence carries along goes on falling where rounding keeps the true one up. So it is computed
    after each run, at one product. A row is done when it is at most `max(rtol |b|, atol)`, or has not become smaller by
    half. A run that ends farther away than it began is not taken.

    Args:
        max_iter: of all runs together: 10 P, at most 1000, if None.
        energy: whether `x'Ax/2 - b'x` measures what is nearer, for a positive definite matrix: conjugate gradients
            lower it in each step, in which the residual may grow.
    """
    limit = min(10 * b.shape[-1], 1000) if max_iter is None else max_iter
    # A right-hand side of zero has a tolerance of zero, too: only the start at zero reaches it.
    x = torch.zeros_like(b) if x0 is None else torch.where(b.any(-1, keepdim=True), x0, 0)
    r = b.clone() if x0 is None else b - product(x)
    sizes, lengths = length(b, -1), length(r, -1)
    target = (rtol * sizes).clamp(min=atol)
    left = (lengths > target).nonzero()[:, 0]
    iterations, indefinite = 0, False
    while len(left) and iterations < limit:
        before = lengths[left]
        step, count, curved = run(r[left] / before[:, None], target[left] / before, limit - iterations)
        new = x[left] + before[:, None] * step
        residual = b[left] - product(new)
        after = length(residual, -1)
        iterations, indefinite = iterations + max(count, 1), indefinite or curved
        # The energy falls by step'(r + residual) / 2, as A step = r - residual.
        fallen = (step * (r[left] + residual)).sum(-1) if energy else before - after
        taken = fallen > 0
        rows = left[taken]
        x[rows], r[rows], lengths[rows] = new[taken], residual[taken], after[taken]
        left = left[(after > target[left]) & (after <= before / 2)]
    relative = lengths / sizes.clamp(min=torch.finfo(b.dtype).tiny)
    converged = bool((lengths <= target).all())
    return Solution(x, relative, iterations, converged, indefinite, not converged and iterations < limit)
