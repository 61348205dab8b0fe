"""Geodesics against manifolds on which they are known, and against the geodesic equation."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import numpy
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor, nn
from torch.testing import assert_close

from nngeo.linalg.cg import ConvergenceWarning
from nngeo.products import CubicSpline, Diagonal, DiscreteCurve, curve_energy, curve_length, geodesics
from tests.networks import Net

OPTIMIZERS = {
    "scipy": "l-bfgs",
    "torch_lbfgs": lambda z: torch.optim.LBFGS(z, line_search_fn="strong_wolfe", max_iter=50),
    "adam": lambda z: torch.optim.Adam(z, lr=0.02),
}


def points(*rows: tuple[float, ...]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def times(count: int) -> Tensor:
    return torch.linspace(0, 1, count, dtype=torch.float64)


def model_of(f: Callable[[Tensor], Tensor]) -> Net:
    return Net(lambda net, x: f(x))


def sphere(x: Tensor) -> Tensor:
    """Latitude and longitude (b, 2) to the unit sphere (b, 3)."""
    return torch.stack([x[:, 0].cos() * x[:, 1].cos(), x[:, 0].cos() * x[:, 1].sin(), x[:, 0].sin()], 1)


def paraboloid(x: Tensor) -> Tensor:
    return torch.cat([x, x.square().sum(1, keepdim=True)], 1)


def poincare(y: Tensor) -> Diagonal:
    """The hyperbolic metric of the unit disk."""
    return Diagonal((2 / (1 - y.square().sum(1, keepdim=True))).square().expand(-1, y.shape[1]))


def decoder() -> nn.Module:
    torch.manual_seed(3)
    layers = [nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 6)]
    model = nn.Sequential(*layers).double()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    return model


ON_SPHERE = (
    points((0.3, 0.0), (0.8, 0.0), (-1.0, 0.2), (0.5, 0.0)),
    points((0.3, 2.0), (0.9, 2.5), (1.0, 1.0), (0.5, 0.01)),
)


def great_circles(start: Tensor, end: Tensor) -> Tensor:
    return torch.acos((sphere(start) * sphere(end)).sum(1))


# ------------------------------------------------------------------------------------------ known manifolds


@pytest.mark.parametrize("method", ["metric", "chords"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_on_the_sphere_they_are_great_circles(optimizer, method):
    start, end = ON_SPHERE
    found = geodesics(model_of(sphere), start, end, optimizer=OPTIMIZERS[optimizer], method=method, points=8)
    expected = great_circles(start, end)
    assert_close(found.length, expected, rtol=1e-4, atol=0)
    assert_close(found.energy, expected**2, rtol=2e-4, atol=0)
    assert bool(found.converged.all())
    assert bool((found.length <= found.straight_length * (1 + 1e-9)).all())
    path = sphere(found.curve(times(15)).flatten(0, 1)).reshape(4, 15, 3)
    normal = torch.linalg.cross(sphere(start), sphere(end))
    assert (path @ normal[:, :, None]).abs().max() < 2e-3  # in the plane through the centre


def test_polygons_come_close_to_great_circles():
    start, end = ON_SPHERE
    found = geodesics(model_of(sphere), start, end, curve="discrete", segments=40)
    assert isinstance(found.curve, DiscreteCurve)
    assert_close(found.length, great_circles(start, end), rtol=1e-3, atol=0)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("curve", ["spline", "discrete"])
def test_in_flat_space_they_are_straight(curve, optimizer):
    model, start, end = nn.Linear(3, 5).double(), torch.randn(4, 3).double(), torch.randn(4, 3).double()
    found = geodesics(model, start, end, curve=curve, optimizer=OPTIMIZERS[optimizer])
    line = type(found.curve).straight(start, end)
    assert_close(found.curve(times(9)), line(times(9)))
    assert_close(found.length, ((end - start) @ model.weight.detach().mT).norm(dim=1))
    assert found.evaluations <= 3


def test_bent_curves_in_flat_space_are_straightened():
    start, end = torch.zeros(1, 2).double(), torch.ones(1, 2).double()
    bent = CubicSpline(start, end, torch.randn(1, 6, 2, generator=torch.Generator().manual_seed(0)).double())
    found = geodesics(nn.Identity(), start, end, curve=bent)
    assert_close(found.length, torch.tensor([2.0]).sqrt().double())
    assert found.evaluations <= 10


def test_on_the_paraboloid_meridians_are_geodesics():
    start, end = points((0.2, 0.1), (-0.3, 0.6)), points((1.0, 0.5), (-1.0, 2.0))

    def arc(r: Tensor) -> Tensor:
        return r / 2 * (1 + 4 * r**2).sqrt() + torch.asinh(2 * r) / 4

    found = geodesics(model_of(paraboloid), start, end)
    assert_close(found.length, arc(end.norm(dim=1)) - arc(start.norm(dim=1)), rtol=1e-5, atol=0)


@pytest.mark.parametrize("curve", ["spline", "discrete"])
def test_in_the_disk_of_poincare_distances_are_hyperbolic(curve):
    start, end = points((0.8, 0.0), (0.5, 0.5), (0.0, 0.0)), points((0.0, 0.85), (-0.5, 0.6), (0.9, 0.1))
    found = geodesics(nn.Identity(), start, end, poincare, curve=curve, segments=20)
    a, b = (1 - p.square().sum(1) for p in (start, end))
    expected = torch.acosh(1 + 2 * (start - end).square().sum(1) / (a * b))
    assert_close(found.length, expected, rtol=5e-4, atol=0)


def test_the_geodesic_equation_carries_the_initial_velocity_to_the_end():
    model, start, end = decoder(), points((-0.5, 0.2)), points((0.6, -0.4))
    found = geodesics(model, start, end, segments=20, tol=1e-5)

    def acceleration(_: float, state: numpy.ndarray) -> numpy.ndarray:
        """x'' = -(J' J)^-1 J' D^2 f[x', x'], the metric being that of the embedding."""
        x, v = torch.from_numpy(state[None, :2].copy()), torch.from_numpy(state[2:].copy())
        x.requires_grad_()
        rows = [torch.autograd.grad(c, x, create_graph=True)[0][0] for c in model(x)[0]]
        j = torch.stack(rows).detach()
        bends = torch.stack([torch.autograd.grad(row @ v, x, retain_graph=True)[0][0] @ v for row in rows])
        return numpy.concatenate([v.numpy(), -torch.linalg.lstsq(j, bends[:, None]).solution[:, 0].numpy()])

    velocity = found.curve.derivative(times(2))[0, 0]
    state = numpy.concatenate([start[0].numpy(), velocity.numpy()])
    solved = solve_ivp(acceleration, (0, 1), state, rtol=1e-8, atol=1e-8)
    assert found.length < 0.999 * found.straight_length
    assert_close(torch.from_numpy(solved.y[:2, -1]), end[0], rtol=0, atol=1e-2)


# ------------------------------------------------------------------------------------------ decoders of any kind


def pooled() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 64), nn.Unflatten(1, (1, 8, 8)), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 5))


def perceptron(activation: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(2, 32), activation, nn.Linear(32, 32), activation, nn.Linear(32, 20))


KINKED = {
    "relu": lambda: perceptron(nn.ReLU()),
    "leaky": lambda: perceptron(nn.LeakyReLU()),
    "hardtanh": lambda: perceptron(nn.Hardtanh()),
    "few": lambda: nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 3)),
    "pooled": pooled,
    "mixed": lambda: nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 20), nn.Sigmoid()),
}
DECODERS = KINKED | {"tanh": lambda: perceptron(nn.Tanh()), "softplus": lambda: perceptron(nn.Softplus())}
each_decoder = pytest.mark.parametrize("make", DECODERS.values(), ids=DECODERS)


def seeded(make: Callable[[], nn.Module], seed: int) -> tuple[nn.Module, Tensor, Tensor]:
    """A decoder, and the ends of six curves."""
    torch.manual_seed(seed)
    return make().double(), torch.randn(6, 2).double(), torch.randn(6, 2).double()


def polygon_length(model: nn.Module, path: Tensor) -> Tensor:
    """Of the images of points (b, p, n)."""
    with torch.no_grad():
        outputs = model(path.flatten(0, 1)).reshape(*path.shape[:2], -1)
    return outputs.diff(dim=1).norm(dim=2).sum(1)


@pytest.mark.parametrize("seed", [1, 2])
@each_decoder
def test_no_geodesic_is_longer_than_the_straight_line(make, seed):
    model, start, end = seeded(make, seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*take more segments", ConvergenceWarning)
        found = geodesics(model, start, end)
    straight = CubicSpline.straight(start, end)
    length, before = (polygon_length(model, c(times(4001))) for c in (found.curve, straight))
    assert bool(found.converged.all())
    assert bool((length <= before * (1 + 1e-9)).all())
    assert bool((found.length <= found.straight_length * (1 + 1e-9)).all())
    assert_close(found.length, length, rtol=2e-3, atol=0)


@pytest.mark.filterwarnings("ignore:.*take more segments")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_path_across_a_crease_is_the_straight_one_of_the_unfolded_surface(optimizer):
    """A sheet folded along x = 0 is as far across as it is when flat."""

    def folded(x: Tensor) -> Tensor:
        beyond = x[:, :1].relu()
        return torch.cat([2 * beyond, x[:, 1:] + beyond, (-x[:, :1]).relu()], 1)

    start, end = points((-1.0, -0.5), (-0.4, 0.2)), points((1.0, -2.0), (0.7, -1.5))
    found = geodesics(model_of(folded), start, end, optimizer=OPTIMIZERS[optimizer], segments=20)
    crossing = torch.linspace(-3, 3, 60001, dtype=torch.float64)
    at = torch.stack([torch.zeros_like(crossing), crossing], 1)
    beyond = end[:, None] - at
    legs = (at - start[:, None]).norm(dim=2) + (beyond @ points((2.0, 1.0), (0.0, 1.0))).norm(dim=2)
    assert_close(found.length, legs.amin(1), rtol=2e-2, atol=0)
    assert bool((found.length < found.straight_length * 0.96).all())


@each_decoder
def test_a_search_that_is_cut_short_is_no_longer_than_the_straight_line(make):
    model, start, end = seeded(make, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        found = geodesics(model, start, end, max_evaluations=3, tol=0)
    straight = CubicSpline.straight(start, end)
    assert bool(
        (
            polygon_length(model, found.curve(times(4001))) <= polygon_length(model, straight(times(4001))) * (1 + 1e-9)
        ).all()
    )


def test_energies_where_the_derivative_jumps_are_those_of_chords():
    model, start, end = seeded(KINKED["relu"], 1)
    found = geodesics(model, start, end)
    assert_close(found.length, curve_length(model, found.curve, method="chords", points=64))
    assert_close(found.energy, curve_energy(model, found.curve, method="chords", points=64))


def test_a_decoder_with_one_latent_gets_constant_speed():
    model = nn.Sequential(nn.Linear(1, 32), nn.ReLU(), nn.Linear(32, 5)).double()
    found = geodesics(model, points((-2.0,)), points((2.0,)))
    assert bool(found.converged) and found.uneven < 0.02


# ------------------------------------------------------------------------------------------ what comes back


def test_curves_do_not_depend_on_their_neighbours():
    start, end = ON_SPHERE
    whole = geodesics(model_of(sphere), start, end, tol=1e-6)
    alone = geodesics(model_of(sphere), start[1:2], end[1:2], tol=1e-6)
    assert_close(whole.curve(times(9))[1:2], alone.curve(times(9)), rtol=0, atol=1e-5)


def test_energies_and_lengths_are_those_of_the_curve():
    model, (start, end) = decoder(), ON_SPHERE
    found = geodesics(model, start, end)
    assert_close(found.energy, curve_energy(model, found.curve))
    assert_close(found.length, curve_length(model, found.curve))
    assert_close(found.straight_length, curve_length(model, CubicSpline.straight(start, end)))
    assert bool((found.energy >= found.length**2 * (1 - 1e-9)).all())


def test_a_geodesic_from_a_point_to_itself_stays_there():
    found = geodesics(decoder(), points((0.1, 0.2)), points((0.1, 0.2)))
    assert found.length.item() == 0 and bool(found.converged)


def test_it_can_go_on_from_curves_found_before():
    start, end = ON_SPHERE
    first = geodesics(model_of(sphere), start, end)
    again = geodesics(model_of(sphere), start, end, curve=first.curve)
    assert again.evaluations == 1
    assert_close(again.length, first.length)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_what_has_not_converged_is_said(optimizer):
    start, end = ON_SPHERE
    with pytest.warns(ConvergenceWarning, match=r"Curves \[.*1.*\] have not converged"):
        found = geodesics(model_of(sphere), start, end, optimizer=OPTIMIZERS[optimizer], max_evaluations=3)
    assert found.evaluations == 3
    assert not found.converged[1] and found.slope[1] > 1e-3
    assert bool((found.length <= found.straight_length * 1.0001).all())


def test_curves_too_coarse_for_their_metric_are_said():
    wall = model_of(lambda x: torch.cat([x, 3 * torch.tanh(20 * x[:, :1])], 1))
    with pytest.warns(ConvergenceWarning, match="take more segments"):
        geodesics(wall, points((-1.0, 0.0)), points((1.0, 0.3)), segments=2, curve="discrete", max_evaluations=2000)


def test_the_model_and_the_random_state_come_back_untouched():
    model, (start, end) = decoder(), ON_SPHERE
    model[0].weight.grad = torch.ones_like(model[0].weight)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    start = start.clone().requires_grad_()
    found = geodesics(model, start, end)
    assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert_close(model[0].weight.grad, torch.ones_like(model[0].weight))
    assert model[2].weight.grad is None and start.grad is None
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(state, torch.get_rng_state())
    assert not found.energy.requires_grad and not found.curve.coefficients.requires_grad


def test_float32_converges_without_a_warning():
    model, (start, end) = decoder().float(), (p.float() for p in ON_SPHERE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = geodesics(model, start, end)
    assert found.length.dtype == torch.float32
    expected = geodesics(model.double(), start.double(), end.double()).length
    assert_close(found.length.double(), expected, rtol=1e-4, atol=0)


def test_images_as_latent_points():
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Flatten()).double()
    start, end = torch.zeros(2, 1, 3, 3).double(), torch.ones(2, 1, 3, 3).double()
    found = geodesics(model, start, end)
    assert found.curve(times(4)).shape == (2, 4, 1, 3, 3)
    assert bool((found.length <= found.straight_length).all())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"curve": "bezier"}, "known are spline, discrete"),
        ({"curve": CubicSpline.straight(torch.zeros(1, 2).double(), torch.ones(1, 2).double())}, "does not go from"),
        ({"optimizer": "newton"}, "l-bfgs"),
        ({"segments": 0}, "segments"),
        ({"method": "arcs"}, "known are 'metric', 'chords'"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_bad_input_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        geodesics(decoder(), points((0.0, 0.1)), points((1.0, 0.0)), **options)
