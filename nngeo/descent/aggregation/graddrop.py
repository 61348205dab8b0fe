"""Gradient sign dropout (GradDrop: Chen et al., 2020)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nngeo.descent.aggregation.base import Aggregator
from nngeo.descent.aggregation.options import Option, named, rows_or, vector


def identity(purity: Tensor) -> Tensor:
    return purity


def _function(name: str, value: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    if not callable(value):
        raise TypeError(f"{name} should be a function, found {type(value).__name__}.")
    return value


class GradDrop(Aggregator):
    """The sum of the coordinates of one sign, drawn for each coordinate: positive where `f(P) > U`, U uniform.

    P is the share of the positive in the sum of absolute values. "Just pick a sign" (Chen et al., 2020), algorithm 1,
    lines 10 to 15.

    Args:
        f: increasing, from P to a probability.
        leak: (m,); this share of a gradient passes undropped. None if None.

    >>> GradDrop()(torch.tensor([[4.0, -1.0], [6.0, -1.0]]))
    tensor([10., -2.])
    """

    differentiable = False
    f = Option(_function)
    leak = vector()

    def __init__(self, f: Callable[[Tensor], Tensor] = identity, leak: Tensor | None = None) -> None:
        super().__init__()
        self.f = f
        self.leak = leak

    def forward(self, matrix: Tensor, /) -> Tensor:
        leak = rows_or("leak", self.leak, 0, matrix)[:, None]
        purity = (1 + matrix.sum(0) / matrix.abs().sum(0)) / 2
        threshold = self.f(purity)
        u = torch.rand(purity.shape, dtype=matrix.dtype, device=matrix.device)
        kept = ((threshold > u) & (matrix > 0)) | ((threshold < u) & (matrix < 0))
        return ((leak + (1 - leak) * kept) * matrix).sum(0)

    def __str__(self) -> str:
        return named(self, self.leak)
