"""Positive solutions of `G w = w^-s`: the weights of a fair compromise between the rows of J, with G = J J'."""

from __future__ import annotations

import torch
from torch import Tensor

from nngeo.linalg.gramian import rounding

# Of w^s Gw = 1. Without a solution the ridge gives weights that are off by more, whose sum of rows nearly cancels.
ACCURACY, NEARLY_ZERO = 1e-3, 1e-3


@torch.no_grad()
def balanced_weights(g: Tensor, s: float, *, max_iter: int = 100) -> Tensor:
    """The w > 0 (m,) with `G w = w^-s` for a Gramian g (m, m), in double precision, by a primal-dual Newton method.

    It is the minimum of `w'Gw/2 - sum psi(w_i)` with `psi' = w^-s`, strictly convex for s > 0. None is attained where
    some `v >= 0` has `J'v = 0`: the weights are zero there, also where that holds up to rounding. Rows that are zero
    get 1.

    Raises:
        ArithmeticError: `max_iter` steps were too few.
    """
    relative_zero = (10 * rounding(g.dtype)) ** 0.5
    ridge = 4 * torch.finfo(g.dtype).eps * len(g)
    g = (g + g.T).double() / 2
    squares = g.diagonal()
    nonzero = squares > 0
    d = torch.where(nonzero, squares, 1).rsqrt()
    identity = torch.eye(len(g), dtype=g.dtype, device=g.device)
    # In x = w / (d scale) the matrix has a unit diagonal, and the right-hand side c x^-s the geometric mean 1.
    h = torch.where(nonzero & nonzero[:, None], g * d * d[:, None], identity) + ridge * identity
    log_c = torch.where(nonzero, (1 - s) * d.log(), 0)
    shift = log_c.mean()
    log_c = log_c - shift
    x = y = (log_c / (1 + s)).exp()  # the solution for orthogonal rows
    for _ in range(max_iter):
        primal, complementarity = y - h @ x, log_c - y.log() - s * x.log()
        dx = torch.linalg.solve(h + torch.diag(s * y / x), primal + y * complementarity)
        dy = y * (complementarity - s * dx / x)
        step = 1 / (torch.maximum((-dx / x).amax(), (-dy / y).amax()) / 0.95).clamp(min=1)
        x, y = x + step * dx, y + step * dy
        if (dx / x).abs().amax() < 1e4 * torch.finfo(g.dtype).eps:
            break
    w = torch.where(nonzero, x * d * (shift / (1 + s)).exp(), 1)
    error = torch.where(nonzero, w**s * (g @ w) - 1, 0).abs().amax()
    left = (w @ g @ w).clamp(min=0).sqrt() / (w @ squares.sqrt())  # of the lengths of the terms of J'w
    if left <= relative_zero or (error > ACCURACY and left < NEARLY_ZERO):
        return torch.zeros_like(w)
    if not error <= ACCURACY and squares.any():
        raise ArithmeticError(
            f"Balanced weights were not found in {max_iter} steps: the relative error is {error:.1e}. Allow more steps."
        )
    return w
