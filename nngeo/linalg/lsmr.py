"""Least squares for a symmetric matrix that may be singular, by SciPy's LSMR (Fong & Saunders, 2011)."""

from __future__ import annotations

from dataclasses import replace

import torch
from scipy.sparse.linalg import lsmr
from torch import Tensor

from nngeo.linalg.length import length
from nngeo.linalg.operator import Products, scipy_operator
from nngeo.linalg.refinement import Product, Solution, refined


def least_squares(
    product: Product,
    b: Tensor,
    *,
    x0: Tensor | None = None,
    rtol: float = 1e-6,
    atol: float = 0.0,
    max_iter: int | None = None,
) -> Solution:
    """The x (m, P) that bring `product(x)` nearest to b, row by row, in float64 on the CPU; two products an iteration.

    A run stops where its residual is at most `rtol (|A| |x| + |b|)` or `atol`, or its product with A at most `rtol`
    times the norms of both: where no x solves the system, that is the x of least squares, which has not converged, but
    is known to be the `nearest`.

    Args:
        max_iter: 10 P, at most 1000, if None.
    """
    operator = scipy_operator(Products(product, b.shape[-1], b.dtype, b.device))

    def run(r: Tensor, target: Tensor, limit: int) -> tuple[Tensor, int, bool]:
        x, iterations = torch.zeros_like(r), 0
        for j, row in enumerate(r.to("cpu", torch.float64).numpy()):
            found, _, count, *_ = lsmr(
                operator, row, atol=rtol, btol=max(rtol, float(target[j])), conlim=0, maxiter=limit
            )
            x[j] = torch.as_tensor(found).to(r)
            iterations = max(iterations, count)
        return x, iterations, False

    found = refined(run, product, b, x0=x0, rtol=rtol, atol=atol, max_iter=max_iter)
    return found if found.converged else replace(found, nearest=_is_nearest(product, b, found.x, rtol))


@torch.no_grad()
def _is_nearest(product: Product, b: Tensor, x: Tensor, rtol: float) -> bool:
    """Whether A times the residual is small beside A times b, each of length one, for every row."""
    r = b - product(x)
    along, solved = product(r / length(r, -1)[:, None]), product(b / length(b, -1)[:, None])
    small = 100 * max(rtol, 10 * torch.finfo(b.dtype).eps) * length(solved, -1)
    return bool(((length(along, -1) <= small) | (length(r, -1) == 0)).all())
