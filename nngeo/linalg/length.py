"""The Euclidean length, at any scale."""

from __future__ import annotations

import torch
from torch import Tensor


def length(x: Tensor, dim: int | tuple[int, ...] | None = None) -> Tensor:
    """The Euclidean length along `dim`, or of all entries; differentiable.

    In float32 the squares of 1e-23 are zero, and those of 1e20 infinite: where a length is near there, they are taken
    in float64, which takes ten times as long.
    """
    found = torch.linalg.vector_norm(x, dim=dim)
    info = torch.finfo(found.dtype)
    if bool(((found > info.tiny**0.25) & (found < info.max)).all()):
        return found
    wide = torch.promote_types(x.dtype, torch.float64)
    return torch.linalg.vector_norm(x, dim=dim, dtype=wide).to(found.dtype)
