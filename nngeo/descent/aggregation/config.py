"""Conflict-free training (ConFIG: Liu et al., 2024)."""

from __future__ import annotations

import torch
from torch import Tensor

from nngeo.descent.aggregation.base import GramianWeightedAggregator, GramianWeighting
from nngeo.descent.aggregation.options import named, rows_or, vector
from nngeo.linalg.decompose import eigh
from nngeo.linalg.gramian import rounding


class ConFIGWeighting(GramianWeighting):
    """Weights of `(sum_i g_i.d) d`, where `d = U'(UU')^+ u` is normalised and U has the gradients as unit rows.

    Args:
        pref_vector: u (m,); ones if None.
    """

    pref_vector = vector()

    def __init__(self, pref_vector: Tensor | None = None) -> None:
        super().__init__()
        self.pref_vector = pref_vector

    def weights(self, gramian: Tensor) -> Tensor:
        u = rows_or("pref_vector", self.pref_vector, 1, gramian)
        lengths = gramian.diagonal().sqrt()
        inverse = torch.where(lengths > 0, 1 / lengths, 0)
        units = gramian * inverse * inverse[:, None]
        eigenvalues, vectors = eigh(units, "Gramian")
        coordinates = u @ vectors
        # A coordinate of u that is zero to rounding has no direction: opposite gradients would give one of noise.
        there = coordinates.abs() > 4 * len(u) * torch.finfo(u.dtype).eps * u.norm()
        kept = there & (eigenvalues > len(u) * rounding(u.dtype) * eigenvalues[-1])
        solution = torch.where(kept, coordinates / eigenvalues, 0)
        v, squared_norm = vectors @ solution, solution @ coordinates
        # The weights of d are v / |U'v|, and its length has another |U'v|.
        return torch.where(squared_norm > 0, (lengths @ units @ v) / squared_norm * v * inverse, 0)


class ConFIG(GramianWeightedAggregator, of=ConFIGWeighting):
    """The direction with equal cosines to all gradients, or in the ratio of u; as long as their projections on it.

    "ConFIG: towards conflict-free training of physics informed neural networks" (Liu et al., 2024), equation 2.

    >>> ConFIG()(torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]))
    tensor([0.1588, 2.0706, 2.0706])
    """

    def __str__(self) -> str:
        return named(self, self.pref_vector)
