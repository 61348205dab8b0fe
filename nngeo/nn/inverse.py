"""Inverses of lists of blocks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nngeo.linalg.arguments import number
from nngeo.linalg.decompose import cholesky_factors
from nngeo.linalg.precision import full_precision
from nngeo.nn.blocks import Blocks


@full_precision
def invert_block_diagonal(matrix: Any, damping: float = 0.0) -> Blocks:
    """The inverse of each block plus `damping` times the identity, in lists nested as the given ones.

    Blocks are symmetric and positive definite, (..., p, p).

    Raises:
        ValueError: a block that is not positive definite, or not square.

    >>> invert_block_diagonal([4 * torch.eye(1), [2 * torch.eye(1)]])
    [tensor([[0.2500]]), [tensor([[0.5000]])]]
    """
    number("damping", damping)
    if isinstance(matrix, list | tuple):
        return [invert_block_diagonal(block, damping) for block in matrix]
    if not isinstance(matrix, Tensor):
        raise TypeError(f"`matrix` holds a {type(matrix).__name__}; give tensors (..., p, p) in nested lists.")
    if matrix.ndim < 2 or matrix.shape[-1] != matrix.shape[-2]:
        raise ValueError(f"A block has shape {tuple(matrix.shape)}; it should be (..., p, p).")
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    factor, positive = cholesky_factors(matrix + damping * identity)
    if not positive.all():
        raise ValueError(
            f"{int((~positive).sum())} of {positive.numel()} matrices of a block {tuple(matrix.shape)} are not "
            f"positive definite with damping={damping}; a larger damping helps where they are singular."
        )
    return torch.cholesky_inverse(factor)
