"""Multiple gradient descent (MGDA: Désidéri, 2012)."""

from __future__ import annotations

import torch
from torch import Tensor

from nngeo.descent.aggregation.base import GramianWeightedAggregator, GramianWeighting
from nngeo.descent.aggregation.options import number


class MGDAWeighting(GramianWeighting):
    """Weights `argmin a'Ga over the simplex` by Frank-Wolfe steps from 1/m. Differentiable.

    "Multi-task learning as multi-objective optimization" (Sener & Koltun, 2018), algorithm 2.

    Args:
        epsilon: a step shorter than this is the last one.
        max_iters: the largest number of steps; the error is of the order of 1/max_iters.
    """

    differentiable = True
    epsilon = number(0, open_ends="lowest")
    max_iters = number(1, whole=True)

    def __init__(self, epsilon: float = 1e-3, max_iters: int = 100) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.max_iters = max_iters

    def weights(self, gramian: Tensor) -> Tensor:
        a = gramian.new_full((len(gramian),), 1 / len(gramian))
        vertices = torch.eye(len(gramian), dtype=gramian.dtype, device=gramian.device)
        for _ in range(self.max_iters):
            slopes = gramian @ a
            t = slopes.argmin()
            at, aa, tt = slopes[t], a @ slopes, gramian[t, t]
            inside = (aa - at) / (aa + tt - 2 * at)
            step = torch.where(tt <= at, 1.0, torch.where(aa <= at, 0.0, inside))
            a = a + step * (vertices[t] - a)
            if step < self.epsilon:
                break
        return a


class MGDA(GramianWeightedAggregator, of=MGDAWeighting):
    """The vector of least length in the convex hull of the gradients.

    "Multiple-gradient descent algorithm for multiobjective optimization" (Désidéri, 2012).

    >>> MGDA()(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
    tensor([0.8000, 0.4000])
    """
