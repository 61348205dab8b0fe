"""Operations of which torch has no second derivative, or a wrong one, against their definitions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from nngeo import FIM, GGN, NTK, Hessian, PMatDense, PMatImplicit
from nngeo.products import jacobian
from tests.networks import Net

X = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.randn(5, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def distances(p: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, c: torch.linalg.vector_norm(x[:, None] - c, p, -1)


def pairs(p: float) -> Callable[[Tensor, Tensor], Tensor]:
    i, j = torch.triu_indices(4, 4, 1)
    return lambda x, c: torch.stack([torch.linalg.vector_norm(r[i] - r[j], p, -1) for r in (x @ c.T).view(-1, 4, 1)])[
        :, :4
    ]


def channels_last(norm: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, c: norm((x @ c.T).view(-1, 1, 1, 4).expand(-1, 2, 2, 4).permute(0, 3, 1, 2)).mean((2, 3))


def group_norm(x: Tensor) -> Tensor:
    parts = x.reshape(len(x), 2, -1)
    return ((parts - parts.mean(-1, keepdim=True)) / (parts.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()).view_as(
        x
    )


# (x (b, 3), a parameter (4, 3)) -> (b, 4): the operation, and its definition.
OPERATIONS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "hard sigmoid": (lambda x, c: F.hardsigmoid(x @ c.T), lambda x, c: ((x @ c.T + 3) / 6).clamp(0, 1)),
    "hard sigmoid in place": (
        lambda x, c: F.hardsigmoid(2 * (x @ c.T), inplace=True),
        lambda x, c: ((2 * (x @ c.T) + 3) / 6).clamp(0, 1),
    ),
    **{f"cdist {p}": (lambda x, c, p=p: torch.cdist(x, c, p), distances(p)) for p in (1.0, 2.0, 3.0, float("inf"))},
    **{
        f"pdist {p}": (
            lambda x, c, p=p: torch.stack([F.pdist(r, p) for r in (x @ c.T).view(-1, 4, 1)])[:, :4],
            pairs(p),
        )
        for p in (1.0, 2.0)
    },
    "group norm": (channels_last(lambda x: F.group_norm(x, 2)), channels_last(group_norm)),
}
each_operation = pytest.mark.parametrize("fused, plain", OPERATIONS.values(), ids=OPERATIONS)


def made(operation: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype = torch.float64) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = Net(lambda net, x: net.head(operation(net.body(x), net.c)), c=nn.Parameter(torch.randn(4, 3)))
        net.body, net.head = nn.Linear(3, 3), nn.Linear(4, 2)
        return net.to(dtype)


def cubes(outputs: Tensor, target: Tensor) -> Tensor:
    return (outputs - target).pow(4).sum()


@each_operation
@pytest.mark.parametrize("representation", [PMatDense, PMatImplicit])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_second_derivatives(fused, plain, representation, dtype):
    x, y = X.to(dtype), Y.to(dtype)
    v = torch.linspace(-1, 1, 34).to(dtype)
    expected = Hessian(made(plain, dtype), (x, y), PMatDense, cubes).mv(v)
    tolerance = {"rtol": 1e-6, "atol": 1e-6} if dtype == torch.float64 else {"rtol": 1e-3, "atol": 1e-3}
    assert_close(Hessian(made(fused, dtype), (x, y), representation, cubes).mv(v), expected, **tolerance)


@each_operation
def test_first_derivatives_without_layers(fused, plain):
    v = torch.linspace(-1, 1, 34).double()
    for_plain = FIM(made(plain), (X,), PMatDense, variant="regression")
    assert_close(
        FIM(made(fused), (X,), PMatImplicit, variant="regression").mv(v), for_plain.mv(v), rtol=1e-6, atol=1e-7
    )
    found = GGN(made(fused), (X, Y), PMatImplicit, lambda a, b: (a - b).square().sum() / 2)
    assert_close(found.mv(v), for_plain.mv(v), rtol=1e-6, atol=1e-7)
    assert_close(NTK(made(fused), X).to_torch(), NTK(made(plain), X).to_torch(), rtol=1e-6, atol=1e-7)


@each_operation
def test_graphs_of_jacobians(fused, plain):
    def slope(operation: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        x = X.clone().requires_grad_()
        return torch.autograd.grad(
            jacobian(made(operation), x, create_graph=True).pow(3).sum(), x, materialize_grads=True
        )[0]

    assert_close(slope(fused), slope(plain), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, float("inf")])
def test_points_at_no_distance_have_finite_derivatives(p):
    net = made(lambda x, c: torch.cdist(x, torch.cat([x[:1].detach(), c[1:]]), p))
    assert Hessian(net, (X[:1], Y[:1]), PMatDense, cubes).to_torch().isfinite().all()
