"""Gramians of the rows of a matrix: formed in double precision, and how far they can be trusted.

A Gramian has the square of its rows' condition number: formed in single precision it has lost every direction in which
the rows differ by less than 3e-4 of their length.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Numbers of a block in double precision, which should not leave the processor's cache.
CACHED = 2**17


def row_gramian(matrix: Tensor) -> Tensor:
    """`J J'` (m, m) of J (m, n), in float64; where J has fewer digits, by blocks of columns, so that no copy is made.

    >>> row_gramian(torch.tensor([[1e20, 0.0], [1e20, 1e-18]])).diagonal()
    tensor([1.0000e+40, 1.0000e+40], dtype=torch.float64)
    """
    m, n = matrix.shape
    step = max(CACHED // max(m, 1), 256) if matrix.device.type == "cpu" else max(2**8 * CACHED // max(m, 1), 256)
    if n <= step or matrix.dtype == torch.float64:
        rows = matrix.double()
        return rows @ rows.T
    total = torch.zeros(m, m, dtype=torch.float64, device=matrix.device)
    for block in matrix.split(step, 1):
        rows = block.double()
        total = total + rows @ rows.T
    return total


def rounding(dtype: torch.dtype) -> float:
    """What can't be told from zero in a Gramian of unit rows: its own rounding, and that of rows in single precision.

    Rows that are known to float32's eps have squares that are known to its square, about 2e-13 with a margin; in
    double precision nothing shows which rows a Gramian came from, and less than that is rarely meant.
    """
    return max(torch.finfo(dtype).eps, (4 * torch.finfo(torch.float32).eps) ** 2)
