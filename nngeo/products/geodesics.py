"""Shortest curves between points, under the metric that a model pulls back to its inputs."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from scipy import optimize
from torch import Tensor, nn

from nngeo.generators.batches import Function
from nngeo.linalg.arguments import choice, count, instance, number
from nngeo.linalg.cg import ConvergenceWarning
from nngeo.linalg.decompose import cholesky
from nngeo.linalg.precision import full_precision
from nngeo.products.curves import CubicSpline, Curve, DiscreteCurve, basis, check_ends
from nngeo.products.energy import METHODS, curve_energy, curve_length, derivative_jumps, quadrature
from nngeo.products.outputmetric import OutputMetric

KINDS: dict[str, type[Curve]] = {"spline": CubicSpline, "discrete": DiscreteCurve}
# Speeds that vary by more than this mean that a curve is too coarse for its metric.
UNEVEN = 0.02
# Evaluations after which an energy with kinks is taken to be at its minimum, if it went down by less than tol^2 each;
# after half of them the search begins again, elsewhere nearby.
PATIENCE = 40

TorchOptimizer = Callable[[list[Tensor]], torch.optim.Optimizer]


@dataclass(frozen=True)
class Geodesics:
    """Curves of least energy between b pairs of points, and how they were reached."""

    curve: Curve
    energy: Tensor  # (b,)
    length: Tensor  # (b,)
    straight_length: Tensor  # (b,), of the straight lines between the same ends
    converged: Tensor  # (b,), whether the slope is below the tolerance, or an energy with kinks goes down no further
    slope: Tensor  # (b,), norm of the energy's gradient, relative to the energy and the distance of the ends
    uneven: Tensor  # (b,), 1 - length^2 / energy: 0 at constant speed, as geodesics have it
    evaluations: int  # of all energies and their gradient


@full_precision
def geodesics(
    model: nn.Module,
    start: Tensor,
    end: Tensor,
    metric: OutputMetric = None,
    *,
    curve: str | Curve = "spline",
    segments: int = 10,
    optimizer: str | TorchOptimizer = "l-bfgs",
    method: str | None = None,
    points: int = 4,
    tol: float = 1e-3,
    max_evaluations: int = 500,
    function: Function | None = None,
) -> Geodesics:
    """Curves from start to end (b, n) that minimise `curve_energy`, all at once.

    They are geodesics in the sense of a local minimum, near the straight line or near the curve that is given.
    Coefficients are measured by the integral of |c'|^2, in which the energy under a constant metric is perfectly
    conditioned, so that the number of evaluations does not grow with the segments. The relative error of an energy is
    of the order of its slope squared. No curve is longer than the one that the search began with, by default the
    straight line.

    Args:
        metric: at the outputs; see `curve_energy`.
        curve: "spline" (cubic), "discrete" (polygons), or curves to begin with, which keep their ends.
        optimizer: "l-bfgs", scipy's L-BFGS-B; or a function that makes a torch optimizer of a list of tensors, as
            `lambda z: torch.optim.Adam(z, lr=0.05)`.
        method, points: of the energy. By default "metric"; "chords" where J jumps on the way, as that of a decoder of
            ReLUs does: there the energy by quadrature jumps, too, and has no slope that leads down. What comes back
            then is measured by 16 times as many chords.
        tol: the slope at which a curve has converged.
        max_evaluations: of all energies with their gradient.

    Warns:
        ConvergenceWarning: curves that did not converge, and those too coarse to have constant speed; by their numbers.

    >>> found = geodesics(nn.Linear(2, 3), torch.zeros(1, 2), torch.ones(1, 2))
    >>> bool(found.converged), torch.allclose(found.length, found.straight_length)
    (True, True)
    """
    count("points", points)
    number("tol", tol, least=0)
    count("max_evaluations", max_evaluations)
    first = _first(curve, start, end, segments)
    if method is not None:
        choice("method", method, METHODS)
    kinks = method is None and derivative_jumps(model, first, points, function)
    options: dict[str, Any] = {
        "metric": metric,
        "method": "chords" if kinks else method or "metric",
    }
    options |= {"points": points, "function": function}
    search = _Search(model, first, options, tol, max_evaluations, kinks)
    if optimizer == "l-bfgs":
        search.by_scipy()
    elif callable(optimizer):
        search.by_torch(optimizer)
    else:
        raise ValueError(f'`optimizer` is {optimizer!r}; it should be "l-bfgs", or a function of a list of tensors.')
    measured = options | {"points": 16 * points} if kinks else options
    best = _no_longer(model, search.found(), first, measured, kinks)
    straight = curve_length(model, type(first).straight(first.start, first.end, first.segments), **measured)
    energy, length = curve_energy(model, best, **measured), curve_length(model, best, **measured)
    uneven = torch.where(energy > 0, 1 - length**2 / energy, 0)
    _warn(search.slopes, search.converged, tol, uneven)
    return Geodesics(best, energy, length, straight, search.converged, search.slopes, uneven, search.evaluations)


class _Done(Exception):
    """All curves have converged, or no evaluations are left."""


class _Search:
    """Energies as a function of coefficients z (b, m, ...) whose square is the integral of |c'|^2.

    For each curve the coefficients with the smallest slope that were met are kept; with kinks, those of the least
    energy, as there the slope need not vanish at a minimum.
    """

    def __init__(
        self, model: nn.Module, first: Curve, options: dict[str, Any], tol: float, limit: int, kinks: bool = False
    ):
        self.model, self.first, self.options, self.tol, self.limit = model, first, options, tol, limit
        self.kinks = kinks
        self.evaluations = 0
        distance = (first.end - first.start).flatten(1).norm(dim=1)
        self._distance = torch.where(distance > 0, distance, 1)
        self._root = _stiffness_root(first).to(first.coefficients)
        self._inverse = torch.linalg.inv(self._root)
        self._best = first.coefficients.detach().clone()
        self.slopes = torch.full_like(self._distance, torch.inf)
        self._least = torch.full_like(self._distance, torch.inf)  # energies
        self._mark = self._least.clone()  # energies from which a descent is measured,
        self._stalled = torch.zeros_like(self._distance)  # and the evaluations since
        energy, _ = self.evaluate(self._whole(), self._z(self._best))
        self._scale = torch.where(energy > 0, energy, 1)

    @property
    def converged(self) -> Tensor:
        """(b,), which curves are at a minimum."""
        return (self.slopes <= self.tol) | (self.kinks & (self._stalled >= PATIENCE))

    def found(self) -> Curve:
        """The best curves."""
        return type(self.first)(self.first.start, self.first.end, self._best)

    def evaluate(self, rows: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Energies of some curves, and their gradient in z, zero for a curve that has no finite energy."""
        self.evaluations += 1
        leaf = z.detach().requires_grad_()
        w = self._w(leaf)
        c = type(self.first)(self.first.start[rows].detach(), self.first.end[rows].detach(), w)
        energy = curve_energy(self.model, c, **self.options, create_graph=True)
        grad = torch.zeros_like(leaf)
        if energy.requires_grad:
            (grad,) = torch.autograd.grad(energy.sum(), leaf, materialize_grads=True)
        energy = energy.detach()
        finite = torch.isfinite(energy) & torch.isfinite(grad.flatten(1)).all(1)
        norms = torch.where(finite, grad.flatten(1).norm(dim=1) * self._distance[rows], torch.inf)
        slopes = torch.where(finite & (norms == 0), 0, norms / energy.abs())
        down = finite & (energy < self._least[rows])
        self._least[rows[down]] = energy[down]
        self._stalled[rows] += 1
        further = self._least < self._mark * (1 - self._stalled * self.tol**2)
        self._mark[further], self._stalled[further] = self._least[further], 0
        better = down if self.kinks else slopes < self.slopes[rows]
        self.slopes[rows[better]] = slopes[better]
        self._best[rows[better]] = w.detach()[better]
        return energy, torch.where(self._column(finite), grad, 0)

    def by_scipy(self) -> None:
        """L-BFGS-B on the sum of all relative energies; then on those of the curves that have not converged."""
        while True:
            rows, before = self._open(), self.evaluations
            if not len(rows) or self.evaluations >= self.limit:
                return
            # The first step of L-BFGS-B has length 1, which should be less than the distance of the ends.
            unit = self._column(0.3 * self._distance[rows] / len(rows) ** 0.5)
            z = self._z(self._best[rows]) / unit
            if self.kinks and before > 1:  # away from a kink at which a line search ended
                nudge = torch.randn(
                    z.shape, generator=torch.Generator().manual_seed(before), dtype=torch.float64, device="cpu"
                ).to(z)
                z = z + 0.1 * nudge / nudge.norm()
            objective = self._objective(rows, unit, z)
            stop = {"maxfun": self.limit - before, "maxiter": self.limit, "ftol": 0.0, "gtol": 0.0, "maxcor": 20}
            try:
                optimize.minimize(
                    objective, z.double().flatten().cpu().numpy(), method="L-BFGS-B", jac=True, options=stop
                )
            except _Done:
                continue
            if len(self._open()) == len(rows) and not self.kinks:
                return  # a line search found nothing better

    def _objective(self, rows: Tensor, unit: Tensor, like: Tensor) -> Callable[[Any], tuple[float, Any]]:
        """The sum of relative energies and its gradient, for scipy."""
        ends = self._stalled[rows] + PATIENCE / 2

        def objective(flat: Any) -> tuple[float, Any]:
            self._stop_if_done(rows, ends)
            energy, grad = self.evaluate(rows, torch.from_numpy(flat).to(like).reshape(like.shape) * unit)
            energy = torch.where(torch.isfinite(energy), energy, 1e6 * self._scale[rows])
            relative = grad * unit / self._column(self._scale[rows])
            return float((energy / self._scale[rows]).double().sum()), relative.double().flatten().cpu().numpy()

        return objective

    def by_torch(self, make: TorchOptimizer) -> None:
        """Steps of a torch optimizer on the sum of all relative energies."""
        rows, unit = self._whole(), self._column(self._distance)
        z = (self._z(self._best) / unit).contiguous().requires_grad_()
        steps = make([z])

        def closure() -> Tensor:
            self._stop_if_done(rows)
            energy, grad = self.evaluate(rows, z.detach() * unit)
            z.grad = (grad * unit / self._column(self._scale)).contiguous()
            return (energy / self._scale).sum()

        try:
            while True:
                before = self.evaluations
                steps.step(closure)  # type: ignore[arg-type]
                if self.evaluations == before:
                    return  # an optimizer that does not evaluate is at an end
        except _Done:
            return

    def _stop_if_done(self, rows: Tensor, stalled: Tensor | float = torch.inf) -> None:
        """Stop when all curves of these rows have converged, or have stalled for as many evaluations."""
        done = self.converged[rows] | (self.kinks & (self._stalled[rows] >= stalled))
        if self.evaluations >= self.limit or bool(done.all()):
            raise _Done

    def _open(self) -> Tensor:
        return (~self.converged).nonzero().flatten()

    def _whole(self) -> Tensor:
        return torch.arange(len(self._distance), device=self._distance.device)

    def _column(self, x: Tensor) -> Tensor:
        return x.reshape(-1, *[1] * (self._best.ndim - 1))

    def _w(self, z: Tensor) -> Tensor:
        return torch.einsum("lm,bl...->bm...", self._inverse, z)

    def _z(self, w: Tensor) -> Tensor:
        return torch.einsum("ml,bm...->bl...", self._root, w)


def _stiffness_root(curve: Curve) -> Tensor:
    """L (m, m) with L L' the integrals of B_i' B_j'."""
    t, weights = quadrature(curve.segments, curve.degree)
    slopes = basis(t, curve.coefficients.shape[1], curve.degree)[1]
    return cholesky((slopes * weights[:, None]).mT @ slopes)


def _no_longer(model: nn.Module, found: Curve, first: Curve, options: dict[str, Any], kinks: bool) -> Curve:
    """The curves found; the first ones where those are longer.

    Twice as many points tell how well a length is known. With kinks, where that is not well, a curve has to be shorter
    for sure, unless it is the same line at another speed, which is as long.
    """
    finer = options | {"points": 2 * options["points"]}
    new, fine = (curve_length(model, found, **each) for each in (options, finer))
    length = fine + torch.where(kinks & ~_on_the_line(found), 2, -2) * (fine - new).abs()
    longer = length > curve_length(model, first, **finer)
    kept = longer.reshape(-1, *[1] * (found.coefficients.ndim - 1))
    return type(found)(found.start, found.end, torch.where(kept, first.coefficients, found.coefficients))


def _on_the_line(curve: Curve) -> Tensor:
    """(b,), which curves do not leave the straight line between their ends."""
    c, line = (
        curve.coefficients.flatten(2),
        nn.functional.normalize((curve.end - curve.start).flatten(1), dim=1)[:, None],
    )
    aside = c - (c * line).sum(2, keepdim=True) * line
    return aside.flatten(1).norm(dim=1) <= torch.finfo(c.dtype).eps ** 0.5 * c.flatten(1).norm(dim=1)


def _first(curve: str | Curve, start: Tensor, end: Tensor, segments: int) -> Curve:
    check_ends(start, end)
    if isinstance(curve, str):
        if curve not in KINDS:
            raise ValueError(f"Unknown curve {curve!r}; known are {', '.join(KINDS)}, or give curves to begin with.")
        return KINDS[curve].straight(start.detach(), end.detach(), segments)
    if instance("curve", curve, Curve, f"or one of {', '.join(KINDS)}").start.shape != start.shape or not (
        torch.equal(curve.start, start) and torch.equal(curve.end, end)
    ):
        raise ValueError("`curve` does not go from `start` to `end`; geodesics keep the ends of the curves given.")
    return type(curve)(start.detach(), end.detach(), curve.coefficients.detach())


def _warn(slopes: Tensor, converged: Tensor, tol: float, uneven: Tensor) -> None:
    missed = (~converged).nonzero().flatten().tolist()
    if missed:
        warnings.warn(
            f"Curves {missed} have not converged: slopes {[f'{s:.1e}' for s in slopes[missed].tolist()]}, tol={tol:g}. "
            "Raise max_evaluations or tol, or begin with better curves.",
            ConvergenceWarning,
            stacklevel=3,
        )
    coarse = ((uneven > UNEVEN) & converged).nonzero().flatten().tolist()
    if coarse:
        warnings.warn(
            f"Curves {coarse} have no constant speed (1 - length^2 / energy is "
            f"{[f'{u:.2f}' for u in uneven[coarse].tolist()]}): take more segments.",
            ConvergenceWarning,
            stacklevel=3,
        )
