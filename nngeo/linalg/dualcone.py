"""Projections onto the dual cone of the rows of a matrix, in the coordinates of their Gramian.

The dual cone of the rows g_i of J holds the directions that go against no row: `J d >= 0`. The projection of `J'u`
onto it is `J'v` with

    v = argmin v'Gv  over  v >= u,    G = J J'

(Quinton & Rey, 2024, proposition 1), that is v = u + z with z >= 0, Gv >= 0 and z.Gv = 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nngeo.linalg.complementarity import active_set_solutions, complementary_solutions
from nngeo.linalg.gramian import rounding

ROUNDS = 3  # of proximal steps on a singular Gramian


@torch.no_grad()
def dual_cone_weights(u: Tensor, g: Tensor) -> Tensor:
    """The v (r, m) of each row of u (r, m), for a positive definite Gramian g (m, m). In double precision.

    Raises:
        ArithmeticError: a row could not be solved to rounding, by pivoting nor by the active sets of scipy.
    """
    u, g = u.double(), symmetric(g.double())
    q = u @ g
    z, _ = complementary_solutions(g, q)
    return u + _verified(z, g, q, u, torch.finfo(torch.float64).eps)


@torch.no_grad()
def semidefinite_dual_cone_weights(u: Tensor, g: Tensor, *, strict: bool = False) -> Tensor:
    """The same for any Gramian, singular or with rows of any scale, without the bias of a ridge.

    "Rounding" is that of a Gramian of this dtype (`linalg.gramian.rounding`). Weights of rows that are zero stay as
    they are in u.

    Args:
        strict: a projection that is zero to rounding, so that its direction means nothing (a Pareto-stationary
            point), gets weights zero. Then no cosine of a projection with a row of J is below `-2 sqrt(eps)`.

    Raises:
        ArithmeticError: as `dual_cone_weights`.
    """
    eps = rounding(g.dtype)
    u, g = u.double(), symmetric(g.double())
    squares = g.diagonal()
    nonzero = squares > 0
    d = torch.where(nonzero, squares, 1).rsqrt()
    # The cone does not change with the length of a row: unit rows. A row of zeros is one that no other row meets.
    h = torch.where(nonzero & nonzero[:, None], g * d * d[:, None], torch.eye(len(g), dtype=g.dtype, device=g.device))
    scaled = torch.where(nonzero, u / d, 0)
    q = scaled @ h
    v = scaled + _verified(_proximal(h, q, 4 * eps * len(g)), h, q, scaled, 4 * eps)
    if strict:
        y = v @ h
        squared_norm = (v * y).sum(1)
        lost = (squared_norm <= 16 * eps * v.square().sum(1)) | (y.amin(1) < -2 * (eps * squared_norm.abs()).sqrt())
        v = torch.where(lost[:, None], 0, v)
    return torch.where(nonzero, v * d, u)


def symmetric(g: Tensor) -> Tensor:
    """`(G + G') / 2`: the two halves of a product of matrices differ in the last digits."""
    return (g + g.T) / 2


def _proximal(h: Tensor, q: Tensor, ridge: float) -> Tensor:
    """Solutions z (r, m) of `z >= 0, y = h z + q >= 0, z y = 0` for a semidefinite h with unit diagonal.

    Each round solves with a ridge around the last solution, which refines it. The ridge stands above the rounding of
    h: multipliers that could only be had from its noise stay out of reach.
    """
    passive = None
    z = torch.zeros_like(q)
    damped = h + ridge * torch.eye(len(h), dtype=h.dtype, device=h.device)
    for _ in range(ROUNDS):
        z, _ = complementary_solutions(damped, q - ridge * z, passive)
        passive = z > 0
    return z


def _verified(z: Tensor, g: Tensor, q: Tensor, u: Tensor, eps: float) -> Tensor:
    """z, where it satisfies the conditions of optimality, and another solver's elsewhere; raises where neither does."""
    wrong = ~(_residual(z, g, q, u) <= 1e3 * eps)  # NaN is, too
    if not wrong.any():
        return z
    z[wrong], _ = active_set_solutions(g, q[wrong])
    left = _residual(z, g, q, u).amax()
    if left <= 1e3 * eps:
        return z
    raise ArithmeticError(
        f"The projection onto the dual cone did not converge: relative residual {left:.1e} for a Gramian with diagonal "
        f"entries from {g.diagonal().min():.1e} to {g.diagonal().max():.1e}. A larger reg_eps makes the problem easier."
    )


def _residual(z: Tensor, g: Tensor, q: Tensor, u: Tensor) -> Tensor:
    """How far each row is from `min(z, y) = 0` (r,), relative to the sums of absolute values that y comes from."""
    norms = g.diagonal().sqrt()
    scaled = z * norms
    size = (u.abs() @ norms).add_(scaled.sum(1)).clamp_(min=torch.finfo(g.dtype).tiny)
    y = torch.addmm(q, z, g).div_(norms)
    return torch.minimum(scaled, y).abs_().amax(1).div_(size)
