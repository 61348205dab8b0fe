"""Unconflicting projection of gradients (UPGrad: Quinton & Rey, 2024)."""

from __future__ import annotations

import torch
from torch import Tensor

from nngeo.descent.aggregation.base import GramianWeightedAggregator
from nngeo.descent.aggregation.dualcone import DualConeWeighting
from nngeo.descent.aggregation.options import named, rows_or


class UPGradWeighting(DualConeWeighting):
    """Weights `sum_i pi(u_i e_i)`, pi the weights of the projection onto the dual cone.

    >>> UPGradWeighting()(torch.tensor([[18.0, -22.0], [-22.0, 38.0]]))
    tensor([1.1109, 0.7894])
    """

    def weights(self, gramian: Tensor) -> Tensor:
        u = rows_or("pref_vector", self.pref_vector, 1 / len(gramian), gramian)
        return self.projector.project(torch.diag(u), gramian).sum(0).to(gramian)


class UPGrad(GramianWeightedAggregator, of=UPGradWeighting):
    """`sum_i pi_J(u_i g_i)`: the sum of the projections of each gradient onto the dual cone of all of them.

    "Jacobian descent for multi-objective optimization" (Quinton & Rey, 2024), equation 3 and proposition 1.

    >>> J = torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
    >>> UPGrad()(J)
    tensor([0.2929, 1.9004, 1.9004])
    >>> J @ UPGrad(strict=True)(J) >= 0  # exact: no loss gets worse
    tensor([True, True])
    """

    def __str__(self) -> str:
        return named(self, self.pref_vector)
