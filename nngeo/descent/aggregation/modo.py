"""Multi-objective gradients with double sampling (MoDo: Chen et al., 2023)."""

from __future__ import annotations

from torch import Tensor

from nngeo.descent.aggregation.base import GramianWeightedAggregator, GramianWeighting
from nngeo.descent.aggregation.options import number
from nngeo.descent.aggregation.stateful import Memory
from nngeo.linalg.simplex import project_onto_simplex


class MoDoWeighting(Memory, GramianWeighting):
    """Weights after one projected step from the last ones (1/m at first) on `l'Ml/2 + rho |l|^2/2` over the simplex.

    Takes the cross Gramian `M = J1 J2'` of two independent batches, which makes the step unbiased.

    Args:
        gamma: the step.
        rho: the ridge.
    """

    gamma = number(0, open_ends="lowest")
    rho = number(0)

    def __init__(self, gamma: float = 0.1, rho: float = 0.1) -> None:
        super().__init__()
        self.gamma = gamma
        self.rho = rho

    def weights(self, gramian: Tensor) -> Tensor:
        m = len(gramian)
        (last,) = self.recall(gramian, (m,), last=gramian.new_full((m,), 1 / m))
        w = project_onto_simplex(last - self.gamma * (gramian @ last + self.rho * last))
        self.remember(last=w)
        return w


class MoDo(GramianWeightedAggregator, of=MoDoWeighting):
    """MoDo where one Jacobian is all there is (full batches): `J1 = J2 = J`. For two batches use the weighting.

    "Three-way trade-off in multi-objective learning" (Chen et al., 2023), equation 2.9. Stateful.

    >>> import torch
    >>> MoDo()(torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]))
    tensor([-4.,  1.,  1.])
    """
