"""Curves, their energies and lengths, and volumes, against closed forms and derivatives built row by row."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from scipy.interpolate import BSpline
from torch import Tensor, nn
from torch.testing import assert_close

from nngeo.products import (
    CubicSpline,
    Dense,
    Diagonal,
    DiscreteCurve,
    Factor,
    Softmax,
    curve_energy,
    curve_length,
    log_volume,
    volume,
)
from tests.networks import Net

KINDS = {"discrete": DiscreteCurve, "spline": CubicSpline}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def times(count: int) -> Tensor:
    return torch.linspace(0, 1, count, dtype=torch.float64)


def model_of(f: Callable[[Tensor], Tensor]) -> Net:
    return Net(lambda net, x: f(x))


def sphere(x: Tensor) -> Tensor:
    """Latitude and longitude (b, 2) to the unit sphere (b, 3)."""
    return torch.stack([x[:, 0].cos() * x[:, 1].cos(), x[:, 0].cos() * x[:, 1].sin(), x[:, 0].sin()], 1)


def jacobians(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """(b, o, n), row by row."""
    x = x.detach().requires_grad_()
    y = f(x)
    y = y.reshape(len(y), -1)
    return torch.stack([torch.autograd.grad(c.sum(), x, retain_graph=True)[0].flatten(1) for c in y.T], 1)


def decoder() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(2, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 5)]
    return nn.Sequential(*layers).double()


def curved(kind: str, b: int = 2, n: int = 2, segments: int = 4) -> DiscreteCurve | CubicSpline:
    line = KINDS[kind].straight(draw(b, n), draw(b, n, seed=1), segments)
    return KINDS[kind](line.start, line.end, 0.3 * draw(*line.coefficients.shape, seed=2))


def slope(value: Callable[[float], Tensor], h: float = 1e-4) -> Tensor:
    """The derivative at 0, by central differences of the fourth order."""
    return (8 * (value(h) - value(-h)) - (value(2 * h) - value(-2 * h))) / (12 * h)


# ------------------------------------------------------------------------------------------ curves


@pytest.mark.parametrize("segments", [1, 2, 7])
@pytest.mark.parametrize("kind", KINDS)
def test_a_curve_is_the_line_and_scipys_splines(kind, segments):
    curve = curved(kind, segments=segments)
    d, t = curve.degree, times(24)[:-1]
    knots = torch.cat([torch.zeros(d), times(segments + 1), torch.ones(d)]).double()
    inner = torch.nn.functional.pad(curve.coefficients, (0, 0, 1, 1))
    for e in range(2):  # of one curve after the other, as scipy has it
        spline = BSpline(knots.numpy(), inner[e].numpy(), d)
        line = curve.start[e] + t[:, None] * (curve.end - curve.start)[e]
        assert_close(curve(t)[e], line + torch.from_numpy(spline(t.numpy())))
        slopes = torch.from_numpy(spline.derivative()(t.numpy()))
        assert_close(curve.derivative(t)[e], (curve.end - curve.start)[e] + slopes)


@pytest.mark.parametrize("kind", KINDS)
def test_ends_are_fixed(kind):
    curve = curved(kind)
    assert_close(curve(times(2)), torch.stack([curve.start, curve.end], 1), rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_curve_passes_through_points(kind):
    points = draw(3, 6, 2)
    curve = KINDS[kind].through(points)
    assert curve.segments == 5
    assert_close(curve(times(6)), points)


@pytest.mark.parametrize("kind", KINDS)
def test_a_curve_recovers_itself_from_many_points(kind):
    curve = curved(kind)
    again = KINDS[kind].through(curve(times(41)), segments=curve.segments)
    assert_close(again.coefficients, curve.coefficients)


def test_points_may_have_any_shape():
    curve = CubicSpline.straight(torch.zeros(2, 3, 4), torch.ones(2, 3, 4), segments=3)
    assert curve(times(5)).shape == curve.derivative(times(5)).shape == (2, 5, 3, 4)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: CubicSpline.straight(torch.zeros(2, 3), torch.zeros(2, 2)), ValueError, "should be alike"),
        (lambda: CubicSpline.straight(torch.zeros(3), torch.zeros(3)), ValueError, "should be alike"),
        (lambda: CubicSpline.straight([0.0], [1.0]), TypeError, "give tensors"),
        (lambda: DiscreteCurve.straight(torch.zeros(2, 3), torch.zeros(2, 3), segments=0), ValueError, "segments"),
        (lambda: DiscreteCurve(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 4, 2)), ValueError, "coefficients"),
        (lambda: DiscreteCurve.through(torch.zeros(2, 1, 3)), ValueError, "points"),
        (lambda: curved("spline")(torch.tensor([1.5])), ValueError, "between 0 and 1"),
    ],
)
def test_bad_curves_are_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


# ------------------------------------------------------------------------------------------ energies and lengths


def test_energy_and_length_of_straight_lines_in_flat_space():
    start, end = draw(3, 2), draw(3, 2, seed=1)
    line = CubicSpline.straight(start, end)
    distance = (end - start).norm(dim=1)
    assert_close(curve_energy(nn.Identity(), line), distance**2)
    assert_close(curve_length(nn.Identity(), line), distance)


@pytest.mark.parametrize("method", ["metric", "chords"])
def test_length_of_a_circle_of_latitude(method):
    start, end = torch.tensor([[0.5, 0.0]]).double(), torch.tensor([[0.5, 2.0]]).double()
    expected = torch.tensor([2 * math.cos(0.5)]).double()
    found = curve_length(model_of(sphere), DiscreteCurve.straight(start, end), method=method, points=32)
    assert_close(found, expected, rtol=1e-5, atol=0)


METRICS = {
    "none": (lambda y: None, lambda m, y: torch.eye(y.shape[1]).double()),
    "diagonal": (lambda y: Diagonal(torch.arange(1.0, 6.0).double()), lambda m, y: torch.diag_embed(m.d)),
    "tensor": (lambda y: torch.eye(5).double() + 0.5, lambda m, y: m),
    "factor": (lambda y: Factor(draw(5, 3)), lambda m, y: m.v @ m.v.mT),
    "softmax": (
        lambda y: Softmax,
        lambda m, y: torch.diag_embed(y.softmax(1)) - y.softmax(1)[:, :, None] * y.softmax(1)[:, None],
    ),
    "of_outputs": (
        lambda y: lambda y: Dense(torch.diag_embed(y.square() + 1)),
        lambda m, y: torch.diag_embed(y.square() + 1),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", METRICS)
def test_energy_and_length_integrate_the_pullback_metric(name, kind):
    model, curve = decoder(), curved(kind)
    t = (torch.arange(400).double() + 0.5) / 400  # the midpoint rule
    x = curve(t).flatten(0, 1)
    y = model(x).detach()
    metric = METRICS[name][0](y)
    dense = METRICS[name][1](metric, y)
    metric = (lambda y: Softmax(y)) if name == "softmax" else metric
    speeds = torch.einsum("boi,bi->bo", jacobians(model, x), curve.derivative(t).flatten(0, 1))
    squares = torch.einsum("bo,bop,bp->b", speeds, dense.expand(len(x), 5, 5), speeds).reshape(2, -1)
    assert_close(curve_energy(model, curve, metric, points=8), squares.mean(1), rtol=1e-4, atol=0)
    assert_close(curve_length(model, curve, metric, points=64), squares.sqrt().mean(1), rtol=1e-4, atol=0)
    chords = curve_energy(model, curve, metric, points=100, method="chords")
    assert_close(chords, squares.mean(1), rtol=1e-3, atol=0)


@pytest.mark.parametrize("method", ["metric", "chords"])
@pytest.mark.parametrize("of", [curve_energy, curve_length])
def test_energy_and_length_are_differentiable_in_the_curve_and_the_weights(of, method):
    model, curve = decoder(), curved("spline")
    w = curve.coefficients.requires_grad_()
    tensors, metric = [w, *model.parameters()], METRICS["of_outputs"][0](None)
    value = of(model, curve, metric, method=method, create_graph=True).sum()
    grads = torch.autograd.grad(value, tensors, allow_unused=True, materialize_grads=True)
    steps = [draw(*tensor.shape, seed=3 + j) for j, tensor in enumerate(tensors)]

    def moved(t: float) -> Tensor:
        with torch.no_grad():
            for p, step in zip(model.parameters(), steps[1:], strict=True):
                p.add_(t * step)
            c = CubicSpline(curve.start, curve.end, w.detach() + t * steps[0])
            found = of(model, c, metric, method=method).sum()
            for p, step in zip(model.parameters(), steps[1:], strict=True):
                p.sub_(t * step)
        return found

    inner = sum((g * step).sum() for g, step in zip(grads, steps, strict=True))
    assert_close(inner, slope(moved), rtol=1e-6, atol=1e-8)


def test_a_curve_that_stands_still_has_length_zero_with_a_gradient():
    line = DiscreteCurve.straight(torch.zeros(1, 2), torch.zeros(1, 2), 3)
    w = line.coefficients.requires_grad_()
    length = curve_length(nn.Linear(2, 3), line, create_graph=True)
    (grad,) = torch.autograd.grad(length.sum(), w)
    assert length.item() == 0 and bool(grad.isfinite().all())


def test_points_stand_for_a_polygon():
    points, model = draw(2, 5, 2), decoder()
    assert_close(curve_energy(model, points), curve_energy(model, DiscreteCurve.through(points)))


def test_parameters_and_gradients_stay_as_they_were():
    model, curve = decoder(), curved("spline")
    model[0].weight.grad = torch.ones_like(model[0].weight)
    state = torch.get_rng_state()
    assert not curve_energy(model, curve).requires_grad
    assert not curve_length(model, curve, method="chords").requires_grad
    assert all(p.requires_grad for p in model.parameters())
    assert_close(model[0].weight.grad, torch.ones_like(model[0].weight))
    assert model[3].weight.grad is None
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("options", [{"method": "arcs"}, {"points": 0}], ids=str)
def test_unknown_options_are_named(options):
    with pytest.raises(ValueError, match="known are|at least 1"):
        curve_energy(nn.Identity(), draw(1, 3, 2), **options)


# ------------------------------------------------------------------------------------------ volumes


def wide(n: int) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(n, 7), nn.Tanh(), nn.LayerNorm(7), nn.Linear(7, 5)).double()


@pytest.mark.parametrize("name", METRICS)
def test_volume_is_the_root_of_the_determinant(name):
    model, x = wide(2), draw(4, 2)
    y = model(x).detach()
    metric = METRICS[name][0](y)
    given = Softmax(y) if name == "softmax" else metric
    j = jacobians(model, x)
    expected = (j.mT @ METRICS[name][1](metric, y) @ j).det().sqrt()
    assert_close(volume(model, x, given), expected)
    assert_close(log_volume(model, x, given), expected.log())


def test_volume_of_the_sphere_is_the_cosine_of_the_latitude():
    x = draw(5, 2)
    assert_close(volume(model_of(sphere), x), x[:, 0].cos().abs())


def test_volume_by_weights_and_by_several_inputs():
    model, x = nn.Linear(1, 3).double(), draw(4, 1)  # 6 weights, 3 outputs
    assert volume(model, x, wrt="weight").tolist() == [0.0] * 4
    both = Net(lambda net, x, y: torch.cat([x, 2 * y, x * y], 1))
    a, b = draw(4, 1), draw(4, 1, seed=1)
    j = torch.stack([torch.cat([torch.ones_like(a), 0 * a, b], 1), torch.cat([0 * a, 2 + 0 * a, a], 1)], 2)
    found = volume(both, (a, b), wrt=("0", "1"))
    assert_close(found, (j.mT @ j).det().sqrt())


def test_small_volumes_keep_their_digits():
    q, _ = torch.linalg.qr(draw(4, 2))
    r = torch.tensor([[1.0, 0.5], [0.0, 1e-10]]).double()  # det(J' J) is 1e-20: lost beside 1
    model = nn.Linear(2, 4, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(q @ r)
    assert_close(volume(model, draw(1, 2)), torch.tensor([1e-10]).double(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("outputs", [1, 2, 5], ids=["fewer_outputs", "as_many", "more"])
def test_volume_is_zero_without_full_column_rank(outputs):
    model = nn.Sequential(nn.Linear(2, 1), nn.Tanh(), nn.Linear(1, outputs)).double()
    assert volume(model, draw(3, 2)).tolist() == [0.0] * 3
    assert log_volume(model, draw(3, 2)).tolist() == [-math.inf] * 3


def test_volume_is_zero_under_a_metric_that_ignores_a_direction():
    model = nn.Linear(2, 3).double()
    assert volume(model, draw(3, 2), Factor(draw(3, 1))).abs().max() < 1e-7


def test_an_indefinite_metric_is_refused():
    with pytest.raises(ValueError, match="semidefinite"):
        volume(nn.Linear(2, 2).double(), draw(3, 2), Diagonal(torch.tensor([1.0, -1.0]).double()))


@pytest.mark.parametrize("name", ["none", "of_outputs"])
def test_volume_is_differentiable_in_the_inputs_and_the_weights(name):
    model, x, metric = wide(2), draw(3, 2).requires_grad_(), METRICS[name][0](None)
    tensors = [x, *model.parameters()]
    value = log_volume(model, x, metric, create_graph=True).sum()
    grads = torch.autograd.grad(value, tensors, allow_unused=True, materialize_grads=True)
    steps = [draw(*tensor.shape, seed=3 + j) for j, tensor in enumerate(tensors)]

    def moved(t: float) -> Tensor:
        with torch.no_grad():
            for p, step in zip(model.parameters(), steps[1:], strict=True):
                p.add_(t * step)
            found = log_volume(model, x.detach() + t * steps[0], metric).sum()
            for p, step in zip(model.parameters(), steps[1:], strict=True):
                p.sub_(t * step)
        return found

    inner = sum((g * step).sum() for g, step in zip(grads, steps, strict=True))
    assert_close(inner, slope(moved), rtol=1e-6, atol=1e-8)
