"""A layer's flat parameters seen as matrices."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class MatrixView:
    """A layer's flat parameters (..., p) seen as matrices (..., n, o, i), the bias as last column.

    A layer may own only the weight, or only the bias, of its map: the rest is frozen or belongs to another layer.
    """

    groups: int
    rows: int  # o
    columns: int  # of the weight alone: 0 if only the bias is owned
    bias: bool
    transposed: bool = False  # the weight is stored (i / kernel, o, kernel)
    kernel: int = 1

    @property
    def shape(self) -> tuple[int, int, int]:
        """(n, o, i)."""
        return self.groups, self.rows, self.columns + self.bias

    def to_matrix(self, flat: Tensor) -> Tensor:
        """(..., p) -> (..., n, o, i)."""
        numel = self.groups * self.rows * self.columns
        weight, bias = flat[..., :numel], flat[..., numel:]
        lead = flat.shape[:-1]
        if self.transposed:
            stored = weight.reshape(*lead, self.groups, self.columns // self.kernel, self.rows, self.kernel)
            matrix = stored.transpose(-3, -2).flatten(-2)
        else:
            matrix = weight.reshape(*lead, self.groups, self.rows, self.columns)
        return torch.cat([matrix, bias.reshape(*lead, self.groups, self.rows, 1)], -1) if self.bias else matrix

    def parts(self, flat: Tensor) -> tuple[Tensor, Tensor | None] | None:
        """Views (..., n, o, i) and (..., n, o) of weight and bias in flat (..., p); None where it takes a copy."""
        if self.transposed:
            return None
        numel, (n, o, _) = self.groups * self.rows * self.columns, self.shape
        weight, bias = flat[..., :numel].unflatten(-1, (n, o, self.columns)), flat[..., numel:]
        return weight, bias.unflatten(-1, (n, o)) if self.bias else None

    def to_flat(self, matrix: Tensor) -> Tensor:
        """(..., n, o, i) -> (..., p)."""
        weight = matrix[..., : self.columns]
        if self.transposed:
            weight = weight.unflatten(-1, (self.columns // self.kernel, self.kernel)).transpose(-3, -2).flatten(-2)
        if not self.bias:
            return weight.flatten(-3)
        flat = matrix.new_empty(*matrix.shape[:-3], weight.shape[-3:].numel() + matrix.shape[-3:-1].numel())
        n = weight.shape[-3:].numel()
        flat[..., :n].view(weight.shape).copy_(weight)
        flat[..., n:].view(matrix.shape[:-1]).copy_(matrix[..., -1])
        return flat
