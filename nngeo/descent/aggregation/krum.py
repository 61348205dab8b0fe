"""Multi-Krum (Blanchard et al., 2017)."""

from __future__ import annotations

import torch
from torch import Tensor

from nngeo.descent.aggregation.base import GramianWeightedAggregator, GramianWeighting
from nngeo.descent.aggregation.options import number


class KrumWeighting(GramianWeighting):
    """Weights 1/n_selected for the gradients with the least sum of distances to m - n_byzantine - 2 neighbours.

    Args:
        n_byzantine: how many gradients may be arbitrary; m is at least `n_byzantine + 3`.
        n_selected: how many gradients are averaged.
    """

    differentiable = True
    needs_rows = True
    n_byzantine = number(0, whole=True)
    n_selected = number(1, whole=True)

    def __init__(self, n_byzantine: int, n_selected: int = 1) -> None:
        super().__init__()
        self.n_byzantine = n_byzantine
        self.n_selected = n_selected

    def weights(self, gramian: Tensor) -> Tensor:
        m = len(gramian)
        if m < max(self.n_byzantine + 3, self.n_selected):
            raise ValueError(
                f"Krum with n_byzantine={self.n_byzantine} and n_selected={self.n_selected} needs at least "
                f"{max(self.n_byzantine + 3, self.n_selected)} rows, found {m}."
            )
        squares = gramian.diagonal()
        distances = (squares + squares[:, None] - 2 * gramian).clamp(min=0).sqrt()
        nearest = distances.topk(m - self.n_byzantine - 1, largest=False).values[:, 1:]  # the nearest of all is itself
        selected = nearest.sum(1).topk(self.n_selected, largest=False).indices
        return torch.zeros_like(squares).index_fill(0, selected, 1 / self.n_selected)


class Krum(GramianWeightedAggregator, of=KrumWeighting):
    """The mean of the gradients that are nearest to the others, for robustness to some that are arbitrary.

    "Machine learning with adversaries: Byzantine tolerant gradient descent" (Blanchard et al., 2017), section 4 and
    multi-Krum.

    >>> Krum(n_byzantine=1)(torch.tensor([[1.0, 0.0], [1.0, 0.1], [1.0, 0.2], [-9.0, 5.0]]))
    tensor([1.0000, 0.1000])
    """

    def __str__(self) -> str:
        return f"Krum{self.n_byzantine}-{self.n_selected}"
