"""Random loss weighting (RLW: Lin et al., 2021)."""

from __future__ import annotations

import torch
from torch import Tensor

from nngeo.descent.aggregation.base import RowWeighting, WeightedAggregator


class RandomWeighting(RowWeighting):
    """Weights softmax(x) with x normal, drawn anew at each call from torch's generator of the device."""

    reads_values = False

    def weights(self, matrix: Tensor) -> Tensor:
        return torch.randn(len(matrix), device=matrix.device, dtype=matrix.dtype).softmax(0)


class Random(WeightedAggregator, of=RandomWeighting):
    """`sum_i w_i g_i`, w the softmax of a normal draw.

    "Reasonable effectiveness of random weighting" (Lin et al., 2021), algorithm 2.

    >>> import torch
    >>> torch.allclose(Random()(torch.ones(4, 3)), torch.ones(3))
    True
    """
