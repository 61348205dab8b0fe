"""Projection of the mean gradient (DualProj; gradient episodic memory: Lopez-Paz & Ranzato, 2017)."""

from __future__ import annotations

from torch import Tensor

from nngeo.descent.aggregation.base import GramianWeightedAggregator
from nngeo.descent.aggregation.dualcone import DualConeWeighting
from nngeo.descent.aggregation.options import named, rows_or


class DualProjWeighting(DualConeWeighting):
    """Weights pi(u) of the projection of `J'u` onto the dual cone."""

    def weights(self, gramian: Tensor) -> Tensor:
        u = rows_or("pref_vector", self.pref_vector, 1 / len(gramian), gramian)
        return self.projector.project(u[None], gramian)[0].to(gramian)


class DualProj(GramianWeightedAggregator, of=DualProjWeighting):
    """`pi_J(J'u)`: the mean gradient (or `J'u`) projected onto the dual cone of the gradients.

    "Gradient episodic memory for continual learning" (Lopez-Paz & Ranzato, 2017), equation 11.

    >>> import torch
    >>> DualProj()(torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]))
    tensor([0.5563, 1.1109, 1.1109])
    """

    def __str__(self) -> str:
        return named(self, self.pref_vector)
