"""Aligned multi-task learning (Aligned-MTL: Senushkin et al., 2023)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nngeo.descent.aggregation.base import GramianWeightedAggregator, GramianWeighting
from nngeo.descent.aggregation.options import named, one_of, rows_or, vector
from nngeo.linalg.decompose import eigh
from nngeo.linalg.gramian import rounding

SCALES: dict[str, Callable[[Tensor], Tensor]] = {"min": torch.min, "median": torch.median, "rmse": torch.mean}


class AlignedMTLWeighting(GramianWeighting):
    """Weights `s V L^-1/2 V' u` from the eigendecomposition `G = V L V'`, restricted to the rank of G. Differentiable.

    Args:
        pref_vector: u (m,); 1/m if None.
        scale_mode: s^2 is the least eigenvalue ("min"), their median, or their mean ("rmse").
    """

    differentiable = True
    pref_vector = vector()
    scale_mode = one_of(*SCALES)

    def __init__(self, pref_vector: Tensor | None = None, scale_mode: str = "min") -> None:
        super().__init__()
        self.pref_vector = pref_vector
        self.scale_mode = scale_mode

    def weights(self, gramian: Tensor) -> Tensor:
        u = rows_or("pref_vector", self.pref_vector, 1 / len(gramian), gramian)
        eigenvalues, v = eigh(gramian, "Gramian")
        kept = eigenvalues > eigenvalues[-1] * len(gramian) * rounding(gramian.dtype)
        if not kept.any():
            return u
        eigenvalues, v = eigenvalues[kept], v[:, kept]
        s = SCALES[self.scale_mode](eigenvalues).sqrt()
        return s * (v @ ((u @ v) / eigenvalues.sqrt()))


class AlignedMTL(GramianWeightedAggregator, of=AlignedMTLWeighting):
    """`B' u` with B the matrix nearest to J whose singular values all are s.

    "Independent component alignment for multi-task learning" (Senushkin et al., 2023), algorithm 1.

    >>> AlignedMTL()(torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]))
    tensor([0.2133, 0.9673, 0.9673])
    """

    def __str__(self) -> str:
        return named(self, self.pref_vector)
