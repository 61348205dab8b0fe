"""Projecting conflicting gradients (PCGrad: Yu et al., 2020)."""

from __future__ import annotations

import torch
from torch import Tensor

from nngeo.descent.aggregation.base import GramianWeightedAggregator, GramianWeighting


class PCGradWeighting(GramianWeighting):
    """Sum of the rows of C: `sum_j C_ij g_j` is g_i with its conflicts projected away one by one in random order.

    Draws `torch.randperm(m)` for each i. All rows of C take their steps together.
    """

    def weights(self, gramian: Tensor) -> Tensor:
        m = len(gramian)
        orders = torch.stack([torch.randperm(m) for _ in range(m)]).to(gramian.device)
        rows = torch.arange(m, device=gramian.device)
        c = torch.eye(m, dtype=gramian.dtype, device=gramian.device)
        products = gramian.clone()  # of the changed gradients with all gradients, C G
        for j in orders.T:
            conflict = products[rows, j]
            conflict = torch.where((conflict < 0) & (j != rows), conflict / gramian.diagonal()[j], 0)
            c[rows, j] -= conflict
            products -= conflict[:, None] * gramian[j]
        return c.sum(0)


class PCGrad(GramianWeightedAggregator, of=PCGradWeighting):
    """The sum of the gradients, each made orthogonal to those that it is in conflict with.

    "Gradient surgery for multi-task learning" (Yu et al., 2020), algorithm 1.

    >>> PCGrad()(torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]))
    tensor([0.5848, 3.8012, 3.8012])
    """
