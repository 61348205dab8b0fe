"""Energies and lengths of curves under the metric that a model pulls back to its inputs."""

from __future__ import annotations

from typing import Any

import numpy
import torch
from torch import Tensor, nn

from nngeo.generators.batches import Function
from nngeo.linalg.arguments import choice, count, flag, instance
from nngeo.linalg.precision import full_precision
from nngeo.products.curves import Curve, DiscreteCurve
from nngeo.products.metrics import Metric
from nngeo.products.opening import differential
from nngeo.products.outputmetric import OutputMetric, metric_at, outputs_of
from nngeo.products.space import Space, outputs_space
from nngeo.products.structured import as_metric

METHODS = ("metric", "chords")


@full_precision
def curve_energy(
    model: nn.Module,
    curve: Curve | Tensor,
    metric: OutputMetric = None,
    *,
    method: str = "metric",
    points: int = 4,
    function: Function | None = None,
    create_graph: bool = False,
) -> Tensor:
    """`int_0^1 c' J' M J c' dt` (b,), without a factor 1/2; at least the length squared, and equal at constant speed.

    Args:
        curve: over the model's inputs; or points (b, p, n), which mean the polygon through them.
        metric: M, of the kinds that all products take, for b p outputs, or a function of the outputs that returns one.
        method: "metric" integrates J c', exactly but for the quadrature; "chords" sums squared differences of the
            outputs at successive points, which needs no derivative of the model; its error is of order 1 / points^2.
            Where J jumps (ReLU), quadrature is off by what the jumps are between two points: take "chords".
        points: for each segment, of Gauss's quadrature or at equal distances.
        create_graph: whether the result is differentiable in the curve, the model, and the metric.

    >>> flat = nn.Identity()
    >>> curve_energy(flat, torch.tensor([[[0.0, 0.0], [1.0, 2.0]]]))
    tensor([5.])
    """
    with torch.set_grad_enabled(flag("create_graph", create_graph)):
        squares, weights = _squares(model, curve, metric, method, points, function, create_graph)
        return squares @ weights


@full_precision
def curve_length(
    model: nn.Module,
    curve: Curve | Tensor,
    metric: OutputMetric = None,
    *,
    method: str = "metric",
    points: int = 4,
    function: Function | None = None,
    create_graph: bool = False,
) -> Tensor:
    """`int_0^1 sqrt(c' J' M J c') dt` (b,), with the arguments of `curve_energy`.

    >>> corner = torch.tensor([[[0.0, 0.0], [1.0, 0.0], [1.0, 2.0]]])
    >>> curve_length(nn.Identity(), corner)
    tensor([3.])
    """
    with torch.set_grad_enabled(flag("create_graph", create_graph)):
        squares, weights = _squares(model, curve, metric, method, points, function, create_graph)
        # The root has no derivative where a curve stands still; there the length has 0.
        still = squares <= 0
        return torch.where(still, 0, torch.where(still, 1, squares).sqrt()) @ weights


def _squares(
    model: nn.Module,
    curve: Curve | Tensor,
    metric: OutputMetric,
    method: str,
    points: int,
    function: Function | None,
    create_graph: bool,
) -> tuple[Tensor, Tensor]:
    """Squared speeds (b, times), and what each counts in an integral over [0, 1]."""
    choice("method", method, METHODS)
    count("points", points)
    c = (
        DiscreteCurve.through(curve)
        if isinstance(curve, Tensor)
        else instance("curve", curve, Curve, "or points (b, p, n)")
    )
    t, weights = quadrature(c.segments, points) if method == "metric" else _equidistant(c.segments * points)
    at_t, t = c(t.to(c.start.device)), t.to(c.start.device)
    x = at_t.flatten(0, 1)
    if method == "chords":
        outputs = outputs_of(model, x, function, create_graph)
        space = outputs_space(outputs)
        m = as_metric(metric(outputs) if callable(metric) else metric)
        m.check(space)
        path = outputs.reshape(*at_t.shape[:2], -1)
        steps = (path[:, 1:] - path[:, :-1]) * c.segments * points
        # Each chord under the mean of the metrics at its ends.
        return (_norms(m, steps, space, end=False) + _norms(m, steps, space, end=True)) / 2, weights.to(path)
    options: Any = {"function": function, "create_graph": create_graph}
    with differential(model, x, "input", **options) as at:
        m = metric_at(metric, at.codomain, model, x, function, create_graph)
        speeds = at.push(c.derivative(t).reshape(1, at.domain.b, at.domain.d))
        squares = (speeds * m.apply(speeds, at.codomain)).sum(-1)[0].reshape(at_t.shape[:2])
    return squares, weights.to(squares)


def derivative_jumps(model: nn.Module, curve: Curve, points: int, function: Function | None) -> bool:
    """Whether J jumps along curves, as that of a network of ReLUs, which is piecewise constant.

    Chords are compared with the mean of the derivatives at their ends. Where J is smooth, they differ by far less than
    these two derivatives do; where it jumps between them, by 0.3 of that on average.
    """
    t, _ = _equidistant(4 * curve.segments * points)
    t = t.to(curve.start.device)
    x = curve(t).flatten(0, 1)
    with differential(model, x, "input", function=function) as at:
        speeds = at.push(curve.derivative(t).reshape(1, at.domain.b, at.domain.d))[0]
    speeds = speeds.reshape(len(curve.start), len(t), -1) / (len(t) - 1)
    path = outputs_of(model, x, function, create_graph=False).reshape(speeds.shape)
    least = torch.finfo(speeds.dtype).eps ** 0.5 * float(speeds.norm(dim=-1).sum())
    for step in (1, 2):  # a jump in the middle between two points is seen from every second point
        v, chords = step * speeds[:, ::step], path[:, ::step].diff(dim=1)
        error = float((chords - (v[:, 1:] + v[:, :-1]) / 2).norm(dim=-1).sum())
        change = float(v.diff(dim=1).norm(dim=-1).sum())
        if change > least and error > 0.15 * change:
            return True
    return False


def _norms(m: Metric, steps: Tensor, space: Space, end: bool) -> Tensor:
    """(b, times) squares of steps (b, times, o) by the metrics at the points where they start, or end."""
    b, times, o = steps.shape
    nothing = steps.new_zeros(b, 1, o)
    padded = torch.cat([nothing, steps] if end else [steps, nothing], 1)
    flat = padded.reshape(1, b * (times + 1), o)
    found = (flat * m.apply(flat, space)).sum(-1).reshape(b, times + 1)
    return found[:, 1:] if end else found[:, :-1]


def quadrature(segments: int, points: int) -> tuple[Tensor, Tensor]:
    """Gauss's times and weights, on every segment."""
    nodes, weights = (torch.from_numpy(each) for each in numpy.polynomial.legendre.leggauss(points))
    begins = torch.arange(segments, dtype=torch.float64, device="cpu")[:, None]
    return ((begins + (nodes + 1) / 2) / segments).flatten(), weights.repeat(segments) / (2 * segments)


def _equidistant(steps: int) -> tuple[Tensor, Tensor]:
    t = torch.linspace(0, 1, steps + 1, dtype=torch.float64, device="cpu")
    return t, torch.full((steps,), 1 / steps, dtype=torch.float64, device="cpu")
