"""Impartial multi-task learning by gradients (IMTL-G: Liu et al., 2021)."""

from __future__ import annotations

import torch
from torch import Tensor

from nngeo.descent.aggregation.base import GramianWeightedAggregator, GramianWeighting
from nngeo.linalg.decompose import eigh
from nngeo.linalg.gramian import rounding


class IMTLGWeighting(GramianWeighting):
    """Weights `v / sum v` with `v = G^+ d`, d the lengths of the gradients; zero where the sum is."""

    def weights(self, gramian: Tensor) -> Tensor:
        squares, eps = gramian.diagonal(), rounding(gramian.dtype)
        eigenvalues, vectors = eigh(gramian, "Gramian")
        kept = eigenvalues > len(gramian) * eps * eigenvalues[-1]
        # The weights do not depend on the scale, which is that of the longest gradient here.
        v = vectors @ torch.where(kept, squares.max() / eigenvalues * ((squares / squares.max()).sqrt() @ vectors), 0)
        total = v.sum()
        return torch.where(total.abs() > eps**0.5 * v.abs().sum(), v / total, 0)


class IMTLG(GramianWeightedAggregator, of=IMTLGWeighting):
    """The affine combination of the gradients with equal projections on all of them.

    "Towards impartial multi-task learning" (Liu et al., 2021), for linearly dependent gradients as in Quinton & Rey
    (2024).

    >>> IMTLG()(torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]))
    tensor([0.0767, 1.0000, 1.0000])
    """
