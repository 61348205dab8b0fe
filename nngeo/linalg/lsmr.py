"""Least squares for a symmetric matrix that may be singular, by SciPy's LSMR (Fong & Saunders, 2011)."""

from __future__ import annotations

import torch
from scipy.sparse.linalg import lsmr
from torch import Tensor

from nngeo.linalg.cg import CGResult, Product
from nngeo.linalg.operator import Products, scipy_operator


@torch.no_grad()
def least_squares(
    product: Product,
    b: Tensor,
    *,
    x0: Tensor | None = None,
    rtol: float = 1e-6,
    atol: float = 0.0,
    max_iter: int | None = None,
) -> CGResult:
    """The x (m, P) that bring `product(x)` nearest to b, row by row, in float64 on the CPU; two products an iteration.

    It stops where the residual is at most `rtol (|A| |x| + |b|)` or `atol`, or its product with A at most `rtol` times
    the norms of both: then x solves the least squares problem, and is converged whatever its residual.

    Args:
        max_iter: 10 P, at most 1000, if None.
    """
    limit = min(10 * b.shape[-1], 1000) if max_iter is None else max_iter
    operator = scipy_operator(Products(product, b.shape[-1], b.dtype, b.device))
    x = torch.zeros_like(b) if x0 is None else x0.expand_as(b).clone()
    lengths, iterations, converged = b.norm(dim=-1), 0, True
    residuals = lengths.clone()
    for j, row in enumerate(b):
        if not lengths[j]:
            x[j] = residuals[j] = 0
            continue
        start = None if x0 is None else x[j].to("cpu", torch.float64).numpy()
        found, stop, count, residual, *_ = lsmr(
            operator,
            row.to("cpu", torch.float64).numpy(),
            atol=rtol,
            btol=max(rtol, atol / float(lengths[j])),
            conlim=0,
            maxiter=limit,
            x0=start,
        )
        x[j], residuals[j] = torch.as_tensor(found).to(b), residual
        iterations, converged = max(iterations, count), converged and stop != 7  # 7: maxiter
    tiny = torch.finfo(b.dtype).tiny
    return CGResult(x, residuals / lengths.clamp(min=tiny), iterations, converged, False)
