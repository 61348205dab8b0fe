"""Weighted sums of the losses, with weights that don't depend on them."""

from __future__ import annotations

import torch
from torch import Tensor

from nngeo.descent.aggregation.options import short
from nngeo.descent.scalarization.base import Scalarizer, losses_like, matching


class Mean(Scalarizer):
    """The mean of the losses.

    >>> Mean()(torch.tensor([1.0, 2.0, 6.0]))
    tensor(3.)
    """

    def forward(self, values: Tensor, /) -> Tensor:
        return values.mean()


class Sum(Scalarizer):
    """The sum of the losses.

    >>> Sum()(torch.tensor([1.0, 2.0, 6.0]))
    tensor(9.)
    """

    def forward(self, values: Tensor, /) -> Tensor:
        return values.sum()


class Constant(Scalarizer):
    """`sum_i w_i L_i` with given weights w, of the shape of the losses.

    >>> Constant(torch.tensor([1.0, 0.5]))(torch.tensor([1.0, 2.0]))
    tensor(2.)
    """

    weights = losses_like()

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.weights = weights

    def forward(self, values: Tensor, /) -> Tensor:
        return (matching("weights", self.weights, values) * values).sum()

    def __str__(self) -> str:
        return f"Constant({'' if self.weights.dim() == 1 else 'weights '}{short(self.weights)})"


class Random(Scalarizer):
    """`sum_i w_i L_i`, w the softmax of a normal draw, anew at each call from torch's generator of the device.

    "Reasonable effectiveness of random weighting" (Lin et al., 2021), algorithm 2.

    >>> Random()(torch.ones(4)).allclose(torch.tensor(1.0))
    True
    """

    def forward(self, values: Tensor, /) -> Tensor:
        draw = torch.randn(values.numel(), dtype=values.dtype, device=values.device)
        return (draw.softmax(0).view_as(values) * values).sum()
