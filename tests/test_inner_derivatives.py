"""Models that vectorise or differentiate inside of their forward, and functions that differentiate models."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import nngeo
from nngeo import FIM, NTK, Jacobian, PMatDense, PMatDiag, PMatImplicit
from nngeo.descent import Engine
from nngeo.products import jacobian as jacobian_of
from nngeo.products import jTmjp
from tests import networks, reference

EXACT = {"rtol": 1e-8, "atol": 1e-10}
REPRESENTATIONS = [nngeo.PMatDense, nngeo.PMatLowRank, nngeo.PMatImplicit]

# The bias of an energy has no influence on its gradient.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The outputs do not depend on"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning"),  # torch.func.jvp, of itself
]
each_way = pytest.mark.parametrize("way", networks.DERIVATIVES_INSIDE)


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def made(way: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return networks.differentiating(way).double()


@each_way
@pytest.mark.parametrize("n", [1, 5])
def test_jacobian_and_kernel(way, n):
    model, x = made(way), drawn(n, 3)
    rows = reference.jacobian(model, (x, x), lambda x, _: model(x.clone()))
    assert_close(Jacobian(model, x).to_torch(), rows, **EXACT)
    assert_close(NTK(model, x).to_torch(), torch.einsum("knp,lmp->knlm", rows, rows), **EXACT)


@each_way
def test_products_without_a_matrix(way):
    model, x = made(way), drawn(5, 3)
    rows = reference.jacobian(model, (x, x), lambda x, _: model(x.clone())).flatten(0, 1)
    matrix, v = FIM(model, x, PMatImplicit, variant="regression"), drawn(3, rows.shape[1], seed=1)
    assert_close(matrix.mv(v[0]), rows.mT @ (rows @ v[0]) / 5, **EXACT)
    assert_close(matrix.linearize().mv(v[1]), rows.mT @ (rows @ v[1]) / 5, **EXACT)
    assert_close(matrix.trace(), rows.square().sum() / 5, **EXACT)


@each_way
def test_the_same_in_float32(way):
    model, x = made(way).float(), drawn(5, 3, dtype=torch.float32)
    rows = reference.jacobian(model, (x, x), lambda x, _: model(x.clone()))
    assert_close(FIM(model, x, PMatDiag, variant="regression").get_diag(), rows.square().sum(0).mean(0))


@each_way
def test_derivatives_by_inputs(way):
    model, x = made(way), drawn(5, 3).requires_grad_()
    outputs = model(x)
    columns = [torch.autograd.grad(outputs[:, k].sum(), x, retain_graph=True)[0] for k in range(outputs.shape[1])]
    rows = torch.stack(columns, 1).detach()
    assert_close(jacobian_of(model, x), rows, **EXACT)
    assert_close(jTmjp(model, x), rows.mT @ rows, **EXACT)


@each_way
@pytest.mark.parametrize("batch_dim", [0, None])
@pytest.mark.filterwarnings("ignore:.*loss by loss")
def test_gramian_of_losses(way, batch_dim):
    model, x = made(way), drawn(5, 3)
    rows = reference.jacobian(model, (x, x), lambda x, _: model(x.clone()).sum(1)).flatten(0, 1)
    with Engine(model, batch_dim=batch_dim) as engine:
        gramian = engine.compute_gramian(model(x.clone()).sum(1))
    assert_close(gramian, rows @ rows.mT, **EXACT)


def laplacian_by_hessian(net: nn.Module, x: Tensor) -> Tensor:
    return torch.vmap(lambda z: torch.func.hessian(lambda q: net(q)[0])(z).diagonal().sum()[None])(x)


def laplacian_by_jvp(net: nn.Module, x: Tensor) -> Tensor:
    def one(z: Tensor) -> Tensor:
        grad = torch.func.grad(lambda q: net(q)[0])
        terms = [torch.func.jvp(grad, (z,), (e,))[1] @ e for e in torch.eye(2).to(z)]
        return torch.stack(terms).sum()[None]

    return torch.vmap(one)(x)


def laplacian_by_autograd(net: nn.Module, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    (slope,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
    second = [torch.autograd.grad(slope[:, j].sum(), x, create_graph=True)[0][:, j] for j in range(2)]
    return torch.stack(second).sum(0)[:, None]


@pytest.mark.parametrize("residual", [laplacian_by_hessian, laplacian_by_jvp, laplacian_by_autograd])
@pytest.mark.parametrize("representation", REPRESENTATIONS)
def test_residuals_of_differential_equations(residual: Callable, representation):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    x, v = drawn(6, 2), drawn(17, seed=1)
    rows = reference.jacobian(net, (x, x), lambda x, _: laplacian_by_autograd(net, x)).flatten(0, 1)
    matrix = FIM(net, x, representation, variant="regression", function=lambda x: residual(net, x))
    assert_close(matrix.mv(v), rows.mT @ (rows @ v) / 6, **EXACT)


def laplacian_without_asking_for_gradients(net: nn.Module, x: Tensor) -> Tensor:
    """Of a copy of the inputs, as scripts write it, which depends on nothing else."""
    x = x.detach().requires_grad_()
    (slope,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
    return slope


@pytest.mark.parametrize("residual", [laplacian_by_hessian, laplacian_without_asking_for_gradients])
def test_residuals_may_be_functions_of_functions(residual):
    """What is remembered of a function goes through its closures; torch's own functions are known as themselves."""
    net, x, v = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).double(), drawn(6, 2), drawn(17, seed=1)
    settings = {"points": (x, [{"weight": (1.0, ((2.0,),))}])}

    def scaled(points: Tensor) -> Tensor:
        return settings["points"][1][0]["weight"][0] * residual(net, points)

    rows = reference.jacobian(net, (x, x), lambda x, _: residual(net, x)).flatten(0, 1)
    matrix = FIM(net, x, PMatImplicit, variant="regression", function=lambda points: scaled(points))
    assert_close(matrix.mv(v), rows.mT @ (rows @ v) / 6, **EXACT)
    found = jacobian_of(net, x, "weight", function=lambda points: scaled(points))
    assert_close(found.flatten(0, 1).T @ found.flatten(0, 1), rows.T @ rows, **EXACT)


def test_a_residual_that_detaches_its_points_has_no_derivative_by_them():
    net, x = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).double(), drawn(6, 2)
    found = jacobian_of(net, x, function=lambda x: laplacian_without_asking_for_gradients(net, x))
    assert_close(found, torch.zeros_like(found))


def test_parameters_kept_from_outside_are_refused():
    net, x = nn.Linear(2, 1).double(), drawn(6, 2)
    kept = dict(net.named_parameters())

    def slopes(x: Tensor) -> Tensor:
        return torch.vmap(torch.func.grad(lambda z: torch.func.functional_call(net, kept, (z,)).sin()[0]))(x)

    with pytest.raises(NotImplementedError, match="kept by `function` from outside"):
        FIM(net, x, PMatDense, "regression", function=slopes)


@pytest.mark.parametrize("representation", [nngeo.PMatKFAC, nngeo.PMatEKFAC])
def test_kronecker_factors_of_residuals_are_refused_by_name(representation):
    net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    with pytest.raises(NotImplementedError, match="Layer '0' .Linear. has no Kronecker factors"):
        FIM(net, drawn(5, 2), representation, variant="regression", function=lambda x: laplacian_by_hessian(net, x))


def test_layers_of_another_shape_of_batch_are_looked_at_anew():
    """With one row the model is called as it is, with more under vmap."""
    net = networks.Net(
        lambda net, x: net.a(x[:, 0]) if x.shape[1] == 1 else torch.vmap(net.a, 1, 1)(x).sum(1), a=nn.Linear(3, 2)
    ).double()
    batches = [drawn(4, 1, 3), drawn(4, 2, 3)]
    expected = torch.cat([reference.jacobian(net, (x, x), lambda x, _: net(x)) for x in batches], 1)
    found = Jacobian(net, [(x,) for x in batches], representation=nngeo.PFMapDense)
    assert_close(found.to_torch(), expected, **EXACT)
    assert_close(
        FIM(net, [(x,) for x in batches], PMatDense, variant="regression").get_diag(), expected.square().sum(0).mean(0)
    )


class WrittenOutNorm(nn.LayerNorm):
    """The definition, of which torch has every derivative."""

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + self.eps).sqrt() * self.weight + self.bias


class Force(nn.Module):
    """The gradient of an energy, through a normalisation."""

    def __init__(self, norm: type[nn.LayerNorm]):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(3, 5), norm(5), nn.Linear(5, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x if x.requires_grad else x.detach().requires_grad_()
            energy = self.last(self.norm(self.first(x)).tanh()).sum()
            return torch.autograd.grad(energy, x, create_graph=True)[0]


@pytest.mark.parametrize("kind", [nngeo.PMatDense, nngeo.PMatImplicit], ids=lambda kind: kind.__name__)
def test_a_hessian_through_a_layer_norm_has_its_third_derivatives(kind):
    x, y = torch.randn(2, 4, 3).double()
    found, expected = (
        nngeo.Hessian(Force(norm).double(), (x, y), kind, nn.functional.mse_loss)
        for norm in (nn.LayerNorm, WrittenOutNorm)
    )
    assert_close(found.to_torch(), expected.to_torch(), rtol=1e-8, atol=1e-10)
