"""Solvers that work for every matrix, by its products alone, and the registry in which more can be put."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nngeo.linalg.cg import ConvergenceWarning, conjugate_gradients
from nngeo.representations.coordinates import coordinates

if TYPE_CHECKING:
    from nngeo.representations.base import PMat

Solver = Callable[..., Tensor]

SOLVERS: dict[str, Solver] = {}


def register_solver(name: str) -> Callable[[Solver], Solver]:
    """A decorator: makes `solver(matrix, v (..., P), regul, **options) -> (..., P)` known as `solve=name`.

    The solver should use `matrix.mv` only; it then serves every representation.
    """

    def register(solver: Solver) -> Solver:
        SOLVERS[name] = solver
        return solver

    return register


Map = Callable[[Tensor], Tensor]


class _SymmetricMap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, v: Tensor, product: Tensor, again: Map) -> Tensor:
        ctx.again = again
        return product.view_as(product)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return symmetric_map(grads[0], ctx.again), None, None


def symmetric_map(v: Tensor, apply: Map, again: Map | None = None) -> Tensor:
    """`apply(v)`, differentiable in v any number of times: a symmetric linear map is its own transpose.

    `again` is the same map for the derivatives, where a first guess of its result would not fit them.
    """
    # Not inside of the Function's forward, where torch switches forward-mode derivatives off.
    product = apply(v.detach())
    return _SymmetricMap.apply(v, product, again or apply) if v.requires_grad else product


@register_solver("cg")
def cg(
    matrix: PMat,
    v: Tensor,
    regul: float,
    *,
    rtol: float = 1e-6,
    atol: float = 0.0,
    max_iter: int | None = None,
    x0: Any = None,
    preconditioner: PMat | None = None,
) -> Tensor:
    """`(M + regul I)^-1 v` (..., P) by conjugate gradients: one product for each iteration and vector.

    Args:
        rtol: residual at which it stops, relative to v.
        max_iter: 10 P, at most 1000, if None.
        x0: where it starts: PVector, PFMapDense or tensor (..., P).
        preconditioner: a PMat over the same layers, which is solved with the same `regul` once an iteration.

    Warns:
        ConvergenceWarning: the tolerance was not reached; with the residual and iterations.
    """
    if preconditioner is not None and preconditioner.layer_collection != matrix.layer_collection:
        raise ValueError(
            f"The preconditioner is over other layers ({', '.join(preconditioner.layer_collection)}) than the matrix "
            f"({', '.join(matrix.layer_collection)})."
        )
    start = None if x0 is None else coordinates(x0, matrix.layer_collection)[0].detach()

    def solve(rhs: Tensor, start: Tensor | None = None) -> Tensor:
        rows = rhs.reshape(-1, rhs.shape[-1])
        found = conjugate_gradients(
            lambda x: matrix.mv(x) + regul * x,
            rows,
            x0=None if start is None else start.expand_as(rhs).reshape(rows.shape),
            rtol=rtol,
            atol=atol,
            max_iter=max_iter,
            precondition=None if preconditioner is None else lambda r: preconditioner.solve(r, regul),
        )
        if not found.converged:
            cause = " (a direction of no positive curvature was met)" if found.indefinite else ""
            warnings.warn(
                f"CG stopped after {found.iterations} iterations at a relative residual of "
                f"{float(found.residuals.max()):.1e}, above rtol={rtol:.1e}{cause}: "
                "raise `max_iter` or `regul`, or give a `preconditioner`.",
                ConvergenceWarning,
                stacklevel=2,
            )
        return found.x.reshape(rhs.shape)

    return symmetric_map(v, partial(solve, start=start), solve)
