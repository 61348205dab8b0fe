"""Gradient vaccine (GradVac: Wang et al., 2021)."""

from __future__ import annotations

import torch
from torch import Tensor

from nngeo.descent.aggregation.base import GramianWeightedAggregator, GramianWeighting
from nngeo.descent.aggregation.options import number
from nngeo.descent.aggregation.stateful import Memory
from nngeo.linalg.gramian import rounding


class GradVacWeighting(Memory, GramianWeighting):
    """Sum of the rows of C: `sum_j C_ij g_j` is g_i with its cosines to others raised to their moving averages.

    Draws `torch.randperm(m - 1)` for each i. All rows of C take their steps together. Remembers the averages phi (m,
    m).

    Args:
        beta: share of the newest cosine in an average.
        eps: added to denominators; with 0 the result is linear in the scale of the gradients.
    """

    beta = number(0, 1)
    eps = number(0)

    def __init__(self, beta: float = 0.5, eps: float = 1e-8) -> None:
        super().__init__()
        self.beta = beta
        self.eps = eps

    def weights(self, gramian: Tensor) -> Tensor:
        m = len(gramian)
        (phi,) = self.recall(gramian, (m,), phi=torch.zeros_like(gramian))
        phi = phi.clone()
        rows = torch.arange(m, device=gramian.device)
        orders = torch.stack([torch.randperm(m - 1) for _ in range(m)]).to(gramian.device)
        orders = orders + (orders >= rows[:, None])  # all but i
        lengths = gramian.diagonal().clamp(min=0).sqrt()
        least = rounding(gramian.dtype) ** 0.5
        c = torch.eye(m, dtype=gramian.dtype, device=gramian.device)
        products = gramian.clone()  # of the changed gradients with all gradients, C G
        for j in orders.T:
            length = (products * c).sum(1).clamp(min=0).sqrt()
            both = length * lengths[j] + self.eps
            cosine = torch.where(both > 0, products[rows, j] / both, 0).clamp(-1, 1)
            goal = phi[rows, j]
            sine, goal_sine = (1 - cosine**2).clamp(min=0).sqrt(), (1 - goal**2).clamp(min=0).sqrt()
            w = length * (goal * sine - cosine * goal_sine) / (lengths[j] * goal_sine + self.eps)
            # No turn reaches a cosine of 1; what is left of a gradient in rounding would grow without bound.
            w = torch.where((cosine < goal) & (goal_sine > least), w, 0)
            c[rows, j] += w
            products += w[:, None] * gramian[j]
            phi[rows, j] = (1 - self.beta) * goal + self.beta * cosine
        self.remember(phi=phi)
        return c.sum(0)


class GradVac(GramianWeightedAggregator, of=GradVacWeighting):
    """The sum of the gradients, each turned towards those with which its cosine is below its average so far.

    "Gradient vaccine: investigating and improving multi-task optimization in massively multilingual models" (Wang et
    al., 2021), algorithm 1. Stateful.

    >>> GradVac()(torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]))
    tensor([0.5848, 3.8012, 3.8012])
    """
