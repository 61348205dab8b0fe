"""Coordinate-wise trimmed mean (Yin et al., 2018)."""

from __future__ import annotations

from torch import Tensor

from nngeo.descent.aggregation.base import Aggregator
from nngeo.descent.aggregation.options import number


class TrimmedMean(Aggregator):
    """The mean of each coordinate without its `trim_number` largest and smallest values.

    "Byzantine-robust distributed learning: towards optimal statistical rates" (Yin et al., 2018), definition 2.

    >>> import torch
    >>> TrimmedMean(trim_number=1)(torch.tensor([[1.0, 9.0], [2.0, 2.0], [7.0, 3.0]]))
    tensor([2., 3.])
    """

    trim_number = number(0, whole=True)

    def __init__(self, trim_number: int) -> None:
        super().__init__()
        self.trim_number = trim_number

    def forward(self, matrix: Tensor, /) -> Tensor:
        m, b = len(matrix), self.trim_number
        if m <= 2 * b:
            raise ValueError(f"TrimmedMean with trim_number={b} needs at least {2 * b + 1} rows, found {m}.")
        return matrix.sort(dim=0).values[b : m - b].mean(0)

    def __str__(self) -> str:
        return f"TM{self.trim_number}"
