"""Conflict-averse gradient descent (CAGrad: Liu et al., 2021)."""

from __future__ import annotations

import torch
from torch import Tensor

from nngeo.descent.aggregation.base import GramianWeightedAggregator, GramianWeighting
from nngeo.descent.aggregation.options import number
from nngeo.linalg.complementarity import complementary_solutions
from nngeo.linalg.dualcone import symmetric

RIDGE = 1e-12  # of a Gramian with trace 1


class CAGradWeighting(GramianWeighting):
    """Weights `1/m + p`: `d = g_0 + J'p` maximises the least `g_i.d` in `|d - g_0| <= c |g_0|`, g_0 the mean.

    The d with all `g_i.d >= t` that is nearest to g_0 is a linear complementarity problem in p; its distance grows
    with t and is convex, and Newton's method finds the t where it is `c |g_0|`. Exact, in double precision.

    Args:
        c: relative radius of the ball. With c >= 1 no loss gets worse.
        norm_eps: a Gramian with trace below is zero, and so are the weights where some mean of the gradients is
            shorter than this, with J scaled to Frobenius norm 1 (Pareto stationary).
    """

    c = number(0)
    norm_eps = number(0)

    def __init__(self, c: float, norm_eps: float = 1e-4) -> None:
        super().__init__()
        self.c = c
        self.norm_eps = norm_eps

    def weights(self, gramian: Tensor) -> Tensor:
        m = len(gramian)
        g = symmetric(gramian.double())
        trace = g.trace()
        if trace < self.norm_eps or trace == 0:
            return torch.zeros_like(gramian[0])
        g = g / trace + RIDGE * torch.eye(m, dtype=g.dtype, device=g.device)
        b = g.mean(0)
        radius = self.c * b.mean().sqrt()
        p = _reach(g, b, radius) if radius > 0 else torch.zeros_like(b)
        # p = radius w / |J'w| with w on the simplex.
        stationary = p.sum() * self.norm_eps > radius
        return torch.where(stationary, 0, 1 / m + p).to(gramian)


def _reach(g: Tensor, b: Tensor, radius: Tensor) -> Tensor:
    """The p >= 0 (m,) of length `|J'p| = radius` for the largest t with `g p + b >= t`, complementary to p."""
    low = b.amin()  # p is zero
    high = t = (b + radius * g.diagonal().sqrt()).amin()  # farther than the radius, for the row of the minimum
    far = torch.zeros_like(b)
    for _ in range(100):
        solutions, solved = complementary_solutions(g, (b - t)[None])
        p = solutions[0]
        length = (p @ g @ p).clamp(min=0).sqrt()  # a Gramian in single precision can be indefinite
        if solved and (length - radius).abs() <= 1e-13 * radius:
            return p
        if solved and length < radius:
            low = t
        else:
            high, far = t, p
        # The length is convex in t: from above, Newton's steps come down to the root and never beyond, but for
        # rounding. Near Pareto-stationary points p is large and rounding is all there is: then halves.
        t = t - (length - radius) * length / p.sum()
        if not solved or not low < t < high:
            t = (low + high) / 2
        if high - low <= 1e-14 * radius:
            break
    shortest = (RIDGE * far.sum()).clamp(min=torch.finfo(g.dtype).tiny)
    return far * (radius / (far @ g @ far).clamp(min=0).sqrt().maximum(shortest))


class CAGrad(GramianWeightedAggregator, of=CAGradWeighting):
    """The direction near the mean gradient along which the loss that falls least falls most.

    "Conflict-averse gradient descent for multi-task learning" (Liu et al., 2021), algorithm 1.

    >>> CAGrad(c=0.5)(torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]))
    tensor([0.1835, 1.2041, 1.2041])
    """
