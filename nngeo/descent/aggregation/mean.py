"""The mean of the gradients."""

from __future__ import annotations

from torch import Tensor

from nngeo.descent.aggregation.base import RowWeighting, WeightedAggregator


class MeanWeighting(RowWeighting):
    """Weights 1/m."""

    reads_values = False

    def weights(self, matrix: Tensor) -> Tensor:
        return matrix.new_full((len(matrix),), 1 / len(matrix))


class Mean(WeightedAggregator, of=MeanWeighting):
    """`1/m sum_i g_i`: the gradient of the mean of the losses.

    >>> import torch
    >>> Mean()(torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]))
    tensor([1., 1., 1.])
    """
