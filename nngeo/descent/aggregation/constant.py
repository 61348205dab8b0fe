"""A linear combination of the gradients that is given."""

from __future__ import annotations

from torch import Tensor

from nngeo.descent.aggregation.base import WeightedAggregator, Weighting, check_matrix
from nngeo.descent.aggregation.options import named, rows_or, vector


class ConstantWeighting(Weighting):
    """The given weights (m,)."""

    reads_values = False
    weights = vector(optional=False)

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.weights = weights

    def forward(self, matrix: Tensor, /) -> Tensor:
        check_matrix(matrix)
        return rows_or("weights", self.weights, 0, matrix)


class Constant(WeightedAggregator, of=ConstantWeighting):
    """`sum_i w_i g_i` with given weights w.

    >>> import torch
    >>> Constant(torch.tensor([1.0, 2.0]))(torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]))
    tensor([8., 3., 3.])
    """

    def __str__(self) -> str:
        return named(self, self.weights)
