"""The geometric mean of the losses (GLS: Chennupati et al., 2019)."""

from __future__ import annotations

from torch import Tensor

from nngeo.descent.scalarization.base import Scalarizer


class GeometricMean(Scalarizer):
    """`(prod_i L_i)^(1/m)`, computed by logarithms: each loss acts by its relative changes.

    "MultiNet++: multi-stream feature aggregation and geometric loss strategy for multi-task learning" (Chennupati et
    al., 2019), equation 1. Its gradient is not finite where a loss is zero.

    >>> import torch
    >>> GeometricMean()(torch.tensor([1.0, 4.0, 16.0]))
    tensor(4.)
    """

    def forward(self, values: Tensor, /) -> Tensor:
        if (values < 0).any():
            raise ValueError(
                f"A geometric mean is of losses that are not negative, and the least is {float(values.min()):.3g}."
            )
        return values.log().mean().exp()
