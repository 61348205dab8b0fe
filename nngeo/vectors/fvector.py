"""Vectors over the outputs of a network on some examples."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nngeo.linalg.arguments import tensor
from nngeo.vectors.arithmetic import Arithmetic


class FVector(Arithmetic):
    """A vector with one coordinate for each of k outputs (or cotangents) at each of n examples.

    Args:
        vector_repr: (k, n).

    >>> f = FVector(torch.ones(2, 3))
    >>> (2 * f - 1) @ f
    tensor(6.)
    """

    def __init__(self, vector_repr: Tensor):
        tensor("vector_repr", vector_repr, "(k, n)", real=False)
        if vector_repr.ndim != 2:
            raise ValueError(
                f"`vector_repr` must have shape (k, n), outputs by examples; found {tuple(vector_repr.shape)}."
            )
        self.vector_repr = vector_repr

    def to_torch(self) -> Tensor:
        """(k, n)."""
        return self.vector_repr

    def size(self) -> torch.Size:
        """(k, n), as a tensor's."""
        return self.vector_repr.shape

    def __repr__(self) -> str:
        k, n = self.vector_repr.shape
        return f"FVector({k} outputs of {n} examples, {self.dtype}, {self.device})"

    def _tensors(self) -> list[Tensor]:
        return [self.vector_repr]

    def _with(self, tensors: Sequence[Tensor]) -> FVector:
        return FVector(tensors[0])

    def _like(self, other: FVector) -> list[Tensor]:
        if self.size() != other.size():
            raise ValueError(
                f"FVectors of different shapes (k, n) do not combine: the left one has {tuple(self.size())}, "
                f"the right one {tuple(other.size())}."
            )
        return [other.vector_repr]
