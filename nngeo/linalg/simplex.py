"""The probability simplex."""

from __future__ import annotations

import torch
from torch import Tensor


def project_onto_simplex(x: Tensor) -> Tensor:
    """The nearest points with entries >= 0 that sum to 1, for x (..., m) (Held, Wolfe & Crowder, 1974).

    >>> project_onto_simplex(torch.tensor([1.0, 0.5, -3.0]))
    tensor([0.7500, 0.2500, 0.0000])
    """
    # With a maximum of 0 the 1 below is not lost in the rounding of large x.
    x = x - x.amax(-1, keepdim=True)
    descending = x.sort(dim=-1, descending=True).values
    counts = torch.arange(1, x.shape[-1] + 1, dtype=x.dtype, device=x.device)
    shifts = (descending.cumsum(-1) - 1) / counts
    last = (descending > shifts).sum(-1, keepdim=True) - 1
    return (x - shifts.gather(-1, last)).clamp(min=0)
