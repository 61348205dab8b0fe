"""A few eigenpairs of a symmetric matrix from its products."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from scipy.sparse.linalg import LinearOperator, lobpcg
from torch import Tensor

from nngeo.linalg.arguments import choice, count, number, shown
from nngeo.linalg.cg import ConvergenceWarning
from nngeo.linalg.krylov import Goal, Ritz, krylov_schur
from nngeo.linalg.length import length
from nngeo.linalg.operator import Operator, Products, normal, scipy_operator
from nngeo.linalg.precision import full_precision

# How far in front an eigenvalue stands, by what is wanted.
ORDERS: dict[str, Callable[[Tensor], Tensor]] = {
    "largest": lambda values: values,
    "smallest": torch.neg,
    "magnitude": torch.abs,
}


class Eigenpairs(NamedTuple):
    """Eigenvalues (k,), the wanted end first, and eigenvectors (k, P) in rows."""

    values: Tensor
    vectors: Tensor


@full_precision
@torch.no_grad()
def top_eigenpairs(
    matrix: Operator,
    k: int = 1,
    *,
    method: str = "lanczos",
    which: str = "largest",
    rtol: float | None = None,
    max_products: int = 1000,
    basis: int | None = None,
    generator: torch.Generator | None = None,
    preconditioner: Callable[[Tensor], Tensor] | None = None,
) -> Eigenpairs:
    """The k eigenpairs at one end of the spectrum; k = P gives all.

    "lanczos" (Krylov-Schur: Wu & Simon, 2000) takes one vector at a time and is the cheaper one: a few tens of products
    for the large eigenvalues of a network. Eigenvalues that occur several times are found, too: it goes on in the
    complement of what it has found until nothing there belongs before it. "lobpcg" (Knyazev, 2001; SciPy's) takes k
    vectors at a time, and a preconditioner, for the smallest eigenvalues of a positive definite matrix.

    The error of an eigenvalue is at most its residual |A v - value v|, and about its square over the gap.

    Args:
        which: "largest", "smallest", or "magnitude" (of largest absolute value; "lanczos" only).
        rtol: residual to reach, relative to the largest eigenvalue met; by default eps^(2/3) of the dtype ("lanczos"),
            or eps^(1/2) ("lobpcg").
        max_products: products with vectors after which it stops.
        basis: vectors that "lanczos" holds, at most; by default max(2 k + 20, 40).
        generator: of the random start; torch's global one if None.
        preconditioner: an approximation of the inverse, positive definite, as a product with rows ("lobpcg").

    Warns:
        ConvergenceWarning: a residual is larger than asked for.
    """
    p = int(matrix.size(0))
    count("k", k, most=p, of=f"as the matrix is of size {p}")
    choice("which", which, ORDERS)
    choice("method", method, ("lanczos", "lobpcg"))
    count("max_products", max_products)
    if basis is not None:
        count("basis", basis)
    if rtol is not None:
        number("rtol", rtol, least=0)
    if preconditioner is not None and not callable(preconditioner):
        raise TypeError(
            f"`preconditioner` should be a product with the inverse, a function; got {shown(preconditioner)}."
        )
    if method == "lanczos":
        if preconditioner is not None:
            raise ValueError('method="lanczos" takes no preconditioner: use method="lobpcg".')
        goal = Goal(ORDERS[which], rtol or torch.finfo(matrix.dtype).eps ** (2 / 3))
        size = min(p, max(basis or max(2 * k + 20, 40), k + 3))
        values, vectors = _lanczos(matrix, k, goal, max_products, size, generator)
    else:
        if which == "magnitude":
            raise ValueError('method="lobpcg" finds the largest or the smallest eigenvalues: use method="lanczos".')
        rtol = rtol or torch.finfo(matrix.dtype).eps ** 0.5
        values, vectors = _lobpcg(matrix, k, which, rtol, max_products, generator, preconditioner)
    order = ORDERS[which](values).argsort(descending=True)[:k]
    return Eigenpairs(values[order], vectors[order])


def _lanczos(
    matrix: Operator, k: int, goal: Goal, limit: int, basis: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Values (k,) and vectors (k, P)."""

    def draw() -> Tensor:
        return normal(1, matrix, generator)[0]

    p = int(matrix.size(0))
    nothing = normal(0, matrix, generator)
    found = krylov_schur(matrix, nothing, k, goal, limit, basis, draw)
    used, residual, scale = found.products, float(found.residuals.max()), found.scale
    values, vectors = found.values, found.vectors
    while residual <= goal.rtol * scale and used < limit and len(vectors) < p:
        last = float(goal.order(values).min())
        beyond = last + goal.rtol * scale
        more: Ritz = krylov_schur(matrix, vectors, k, goal, limit - used, basis, draw, beyond)
        used, scale = used + more.products, max(scale, more.scale)
        better = goal.order(more.values) > beyond
        if not better.any():
            break
        residual = float(more.residuals[better].max())
        values, vectors = torch.cat([values, more.values[better]]), torch.cat([vectors, more.vectors[better]])
        best = goal.order(values).argsort(descending=True)[:k]
        values, vectors = values[best], vectors[best]
    _check(residual, goal.rtol * scale, used, "Lanczos")
    return values, vectors


def _lobpcg(
    matrix: Operator,
    k: int,
    which: str,
    rtol: float,
    limit: int,
    generator: torch.Generator | None,
    preconditioner: Callable[[Tensor], Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """Values (k,) and vectors (k, P)."""
    start = normal(k, matrix, generator)
    scale = float(length(matrix.mv(start), -1).max() / start.norm(dim=-1).min())
    inverse: LinearOperator | None = None
    if preconditioner is not None:
        inverse = scipy_operator(Products(preconditioner, matrix.size(0), matrix.dtype, matrix.device))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # says that it has not converged, or that P is small
        values, columns = lobpcg(
            scipy_operator(matrix),
            start.mT.to("cpu", torch.float64).numpy(),
            M=inverse,
            tol=rtol * scale,
            maxiter=max(1, limit // k),
            largest=which == "largest",
        )
    found, vectors = (torch.as_tensor(x.copy()).to(start) for x in (values, columns.T))
    residual = float(length(matrix.mv(vectors) - found[:, None] * vectors, -1).max())
    _check(residual, 10 * rtol * max(scale, float(found.abs().max())), limit, "LOBPCG")
    return found, vectors


def _check(residual: float, target: float, products: int, method: str) -> None:
    if residual > target:
        warnings.warn(
            f"{method} stopped after about {products} products at a residual of {residual:.1e}, above the {target:.1e} "
            "asked for: raise `max_products` or `rtol`.",
            ConvergenceWarning,
            stacklevel=4,
        )
