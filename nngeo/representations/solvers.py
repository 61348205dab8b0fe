"""Solvers that work for every matrix, by its products alone, and the registry in which more can be put."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nngeo.linalg.arguments import callback, count, instance, number, shown
from nngeo.linalg.cg import ConvergenceWarning, conjugate_gradients
from nngeo.linalg.lsmr import least_squares
from nngeo.linalg.minres import minimal_residuals
from nngeo.linalg.refinement import Solution
from nngeo.representations.coordinates import coordinates
from nngeo.representations.estimate import check_kind

if TYPE_CHECKING:
    from nngeo.representations.base import PMat

Solver = Callable[..., Tensor]

SOLVERS: dict[str, Solver] = {}


def register_solver(name: str) -> Callable[[Solver], Solver]:
    """A decorator: makes `solver(matrix, v (..., P), regul, **options) -> (..., P)` known as `solve=name`.

    The solver should use `matrix.mv` only; it then serves every representation.
    """

    instance("name", name, str)

    def register(solver: Solver) -> Solver:
        SOLVERS[name] = solver
        return solver

    return register


@dataclass(frozen=True)
class SolveReport:
    """Where an iterative solver stopped."""

    solver: str
    iterations: int
    residual: float  # |v - (M + regul I) x| / |v|, computed from the x returned; the largest of all vectors
    converged: bool  # whether it is at most `rtol`, for all vectors


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
    rtol: float | None = None,
    atol: float = 0.0,
    max_iter: int | None = None,
    x0: Any = None,
    preconditioner: PMat | None = None,
    report: Callable[[SolveReport], Any] | None = None,
) -> Tensor:
    """`(M + regul I)^-1 v` (..., P) by conjugate gradients: one product for each iteration and vector.

    For positive definite matrices. All vectors advance together; a product serves those that are not done.
    The residual is computed from the solution, at one product more; where the recurrence was too sure of it, another
    run solves for what is left. In float32 it does not fall much below 1e-7 times the condition number.

    Args:
        rtol: residual at which it stops, relative to v; if None 1e-6, or 1e-5 in float32.
        atol: or residual at which it stops, if that is larger.
        max_iter: 10 P, at most 1000, if None.
        x0: where it starts: PVector, PFMapDense or tensor (..., P).
        preconditioner: a PMat over the same layers, which is solved with the same `regul` once an iteration.
        report: called with a SolveReport: `F.solve(v, solve="cg", report=reports.append)`.

    Warns:
        ConvergenceWarning: the residual is above the tolerance; with the residual and iterations.
    """
    run = partial(conjugate_gradients, precondition=_precondition(matrix, preconditioner, regul))
    return _solved("CG", run, matrix, v, regul, x0, report, rtol=rtol, atol=atol, max_iter=max_iter)


@register_solver("minres")
def minres(
    matrix: PMat,
    v: Tensor,
    regul: float,
    *,
    rtol: float | None = None,
    atol: float = 0.0,
    max_iter: int | None = None,
    x0: Any = None,
    preconditioner: PMat | None = None,
    report: Callable[[SolveReport], Any] | None = None,
) -> Tensor:
    """`(M + regul I)^-1 v` (..., P) by minimal residuals: as `cg`, and for indefinite matrices, too (a Hessian).

    The arguments are those of `cg`; the preconditioner has to be positive definite all the same.
    """
    run = partial(minimal_residuals, precondition=_precondition(matrix, preconditioner, regul))
    return _solved("MINRES", run, matrix, v, regul, x0, report, rtol=rtol, atol=atol, max_iter=max_iter)


@register_solver("lsmr")
def lsmr(
    matrix: PMat,
    v: Tensor,
    regul: float,
    *,
    rtol: float | None = None,
    atol: float = 0.0,
    max_iter: int | None = None,
    x0: Any = None,
    report: Callable[[SolveReport], Any] | None = None,
) -> Tensor:
    """The x (..., P) that brings `(M + regul I) x` nearest to v, by SciPy's LSMR (Fong & Saunders, 2011).

    For matrices that may be singular, with `regul=0`: without a solution it is the one of least squares, and of all of
    these the nearest to `x0`, if it is none the smallest; reported as not converged, as its residual is not small, but
    without a warning. Two products an iteration, in float64 and one vector after the other.

    The arguments are those of `cg`, without a preconditioner. `max_iter` is 10 P, at most 1000, if None.
    """
    return _solved("LSMR", least_squares, matrix, v, regul, x0, report, rtol=rtol, atol=atol, max_iter=max_iter)


def _precondition(matrix: PMat, preconditioner: PMat | None, regul: float) -> Map | None:
    if preconditioner is None:
        return None
    if not hasattr(preconditioner, "layer_collection") or not hasattr(preconditioner, "solve"):
        raise TypeError(f"`preconditioner` should be a PMat; got {shown(preconditioner)}.")
    if preconditioner.layer_collection != matrix.layer_collection:
        raise ValueError(
            f"The preconditioner is over other layers ({', '.join(preconditioner.layer_collection)}) than the matrix "
            f"({', '.join(matrix.layer_collection)})."
        )
    return lambda r: preconditioner.solve(r, regul)


def _solved(
    name: str,
    run: Callable[..., Solution],
    matrix: PMat,
    v: Tensor,
    regul: float,
    x0: Any,
    report: Callable[[SolveReport], Any] | None,
    **tolerances: Any,
) -> Tensor:
    """The solutions of rows (..., P), differentiable in v."""
    if tolerances["rtol"] is None:
        tolerances["rtol"] = 1e-6 if torch.finfo(v.dtype).eps < 1e-10 else 1e-5
    for option in ("rtol", "atol"):
        number(option, tolerances[option], least=0)
    if tolerances["max_iter"] is not None:
        count("max_iter", tolerances["max_iter"], least=0)
    callback("report", report, "of a SolveReport", optional=True)
    start = None if x0 is None else coordinates(x0, matrix.layer_collection)[0].detach()
    if start is not None:
        if start.ndim > v.ndim or any(a not in (1, b) for a, b in zip(start.shape[::-1], v.shape[::-1], strict=False)):
            raise ValueError(f"`x0` has the shape {tuple(start.shape)}, which does not fit {tuple(v.shape)}.")
        check_kind(start, "The matrix", v.dtype, v.device)

    def solve(rhs: Tensor, start: Tensor | None = None, report: Callable[[SolveReport], Any] | None = None) -> Tensor:
        rows = rhs.reshape(-1, rhs.shape[-1])
        x0 = None if start is None else start.expand_as(rhs).reshape(rows.shape)
        found = run(lambda x: matrix.mv(x) + regul * x, rows, x0=x0, **tolerances)
        residual = float(found.residuals.max()) if len(rows) else 0.0
        if report is not None:
            report(SolveReport(name.lower(), found.iterations, residual, found.converged))
        if not found.converged and not (found.nearest and regul == 0):
            cause, help = "", "raise `max_iter` or `regul`, or give a `preconditioner`"
            if found.stalled:
                cause = f" (it falls no further: rounding in {v.dtype}, or a singular matrix)"
                help = "raise `regul` or `rtol`, or use float64"
            if found.indefinite:
                cause = " (a direction of no positive curvature was met)"
            warnings.warn(
                f"{name} stopped after {found.iterations} iterations at a relative residual of {residual:.1e}, above "
                f"rtol={tolerances['rtol']:.1e}{cause}: {help}.",
                ConvergenceWarning,
                stacklevel=2,
            )
        return found.x.reshape(rhs.shape)

    # Derivatives are other right-hand sides: neither the start nor the report is for them.
    return symmetric_map(v, partial(solve, start=start, report=report), solve)
