"""Conflict-averse gradient descent (CAGrad: Liu et al., 2021)."""

from __future__ import annotations

import torch
from torch import Tensor

from nngeo.descent.aggregation.base import GramianWeightedAggregator, GramianWeighting
from nngeo.descent.aggregation.options import number
from nngeo.linalg.dualcone import symmetric
from nngeo.linalg.gramian import rounding
from nngeo.linalg.maximin import maximin_weights

ACCURACY = 1e-6  # that a solution has to have; most have 1e-12


class CAGradWeighting(GramianWeighting):
    """Weights `1/m + p`: `d = g_0 + J'p` maximises the least `g_i.d` in `|d - g_0| <= c |g_0|`, g_0 the mean.

    Exact, by Newton's method in double precision (`linalg.maximin`), but for a ridge of the size of rounding.

    Args:
        c: relative radius of the ball. With c >= 1 no loss gets worse, and the weights are zero where none can gain.
        norm_eps: the weights are zero where some mean of the gradients is shorter than this, with J scaled to
            Frobenius norm 1 (Pareto stationary).

    Raises:
        ArithmeticError: no solution to six digits was found.
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
        if trace == 0:
            return torch.zeros_like(gramian[0])
        ridge = 4 * rounding(gramian.dtype)
        g = g / trace + ridge * torch.eye(m, dtype=g.dtype, device=g.device)
        b = g.mean(0)
        radius = self.c * b.mean().clamp(min=0).sqrt()
        if radius == 0:
            return torch.full_like(gramian[0], 1 / m)
        p, error = maximin_weights(g, b, radius)
        # p = radius w / |J'w| with w on the simplex.
        stationary = p.sum() * self.norm_eps > radius
        if stationary or (self.c >= 1 and (g @ p + b).amin() <= ridge):
            return torch.zeros_like(gramian[0])
        if not error <= ACCURACY:
            raise ArithmeticError(
                f"CAGrad found no solution for these {m} gradients: the relative error is {error:.1e}. "
                "Nearly every mean of them is zero: a larger norm_eps gives zero there."
            )
        return (1 / m + p).to(gramian)


class CAGrad(GramianWeightedAggregator, of=CAGradWeighting):
    """The direction near the mean gradient along which the loss that falls least falls most.

    "Conflict-averse gradient descent for multi-task learning" (Liu et al., 2021), algorithm 1.

    >>> CAGrad(c=0.5)(torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]))
    tensor([0.1835, 1.2041, 1.2041])
    """

    def __str__(self) -> str:
        return f"CAGrad{self.c:g}"
