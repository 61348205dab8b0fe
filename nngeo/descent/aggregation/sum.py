"""The sum of the gradients."""

from __future__ import annotations

from torch import Tensor

from nngeo.descent.aggregation.base import RowWeighting, WeightedAggregator


class SumWeighting(RowWeighting):
    """Weights 1."""

    reads_values = False

    def weights(self, matrix: Tensor) -> Tensor:
        return matrix.new_ones(len(matrix))


class Sum(WeightedAggregator, of=SumWeighting):
    """`sum_i g_i`: the gradient of the sum of the losses.

    >>> import torch
    >>> Sum()(torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]))
    tensor([2., 2., 2.])
    """
