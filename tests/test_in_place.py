"""Models that write to their inputs have the right geometry, and the user's data are as they were."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

import nngeo
from nngeo import FIM, GGN, NTK, FIM_MonteCarlo, Hessian, Jacobian
from nngeo.products import curve_energy, forward_laplacian, jacobian, jmjTp, jTmjp, jvp, vjp
from nngeo.uses import Laplace

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = torch.randn(5, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
EXACT = {"rtol": 1e-10, "atol": 1e-12}


class First(nn.Module):
    """A function, then two layers."""

    def __init__(self, function: Callable[[Tensor], Tensor]):
        super().__init__()
        self.function, self.body, self.head = function, nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.function(x)).tanh())


def filled(x: Tensor) -> Tensor:
    x[:, 0] = 0.5
    return x


def nested(layer: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Identity(), nn.Sequential(layer))


# What writes, and the same without writing.
WRITING: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "a layer": (nn.ReLU(inplace=True), nn.ReLU()),
    "a layer inside": (nested(nn.ELU(inplace=True)), nn.ELU()),
    "a function": (F.relu_, F.relu),
    "a product": (lambda x: x.mul_(2.0), lambda x: 2.0 * x),
    "through a view": (lambda x: x.view(-1, 2).div_(2.0).view(-1, 4), lambda x: x / 2.0),
    "some columns": (filled, lambda x: torch.cat([torch.full_like(x[:, :1], 0.5), x[:, 1:]], 1)),
}


def squares(outputs: Tensor, target: Tensor) -> Tensor:
    return (outputs - target).square().sum()


def seeded(call: Callable[[], Any]) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return call()


def matrix(model: nn.Module, data: Any, representation: Any) -> Tensor:
    return FIM(model, data, representation, "regression").to_torch()


def along_curves(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return curve_energy(model, torch.stack([x, x + 1.0], 1), method="chords")


def laplace(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    posterior = Laplace.fit(model, (x, y), nngeo.PMatDense, likelihood="regression")
    return torch.cat([posterior.predict(x)[1], seeded(lambda: posterior.predict(x, link="samples", samples=2)[0])])


ENTRIES: dict[str, Callable[[nn.Module, Tensor, Tensor], Tensor]] = {
    **{
        kind.__name__: (lambda model, x, y, kind=kind: matrix(model, (x, y), kind))
        for kind in (nngeo.PMatDense, nngeo.PMatDiag, nngeo.PMatKFAC, nngeo.PMatEKFAC, nngeo.PMatImplicit)
    },
    "parts of the data": lambda model, x, y: matrix(model, [(x[:3], y[:3]), (x[3:], y[3:])], nngeo.PMatBlockDiag),
    "a function": lambda model, x, y: FIM(
        model, (x, y), nngeo.PMatDiag, "regression", function=lambda x, y: model(x)
    ).to_torch(),
    "without checks": lambda model, x, y: FIM(model, (x, y), nngeo.PMatDiag, "regression", check=False).to_torch(),
    "draws": lambda model, x, y: seeded(lambda: FIM_MonteCarlo(model, (x, y), nngeo.PMatDiag, "regression").to_torch()),
    "Hessian": lambda model, x, y: Hessian(model, (x, y), nngeo.PMatDense, squares).to_torch(),
    "GGN": lambda model, x, y: GGN(model, (x, y), nngeo.PMatImplicit, squares).to_torch(),
    "NTK": lambda model, x, y: NTK(model, x).to_torch(),
    "Jacobian": lambda model, x, y: Jacobian(model, x).to_torch(),
    "jvp": lambda model, x, y: jvp(model, x, torch.ones_like(x)),
    "vjp": lambda model, x, y: vjp(model, x, y, create_graph=True).detach(),
    "jacobian by a function": lambda model, x, y: jacobian(model, x, "weight", function=lambda x: model(x)),
    "jTmjp": lambda model, x, y: jTmjp(model, x, None, "input"),
    "jmjTp": lambda model, x, y: jmjTp(model, x, None, "weight"),
    "Laplacian": lambda model, x, y: forward_laplacian(model, x).laplacian,
    "curves": along_curves,
    "posterior": laplace,
}


def made(function: Callable[[Tensor], Tensor]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return First(function).double()


@pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)
@pytest.mark.parametrize(("writes", "plain"), WRITING.values(), ids=WRITING)
def test_the_data_are_as_they_were(writes, plain, entry):
    x, y = X.clone(), Y.clone()
    found = entry(made(writes), x, y)
    assert torch.equal(x, X) and torch.equal(y, Y)
    assert_close(found, entry(made(plain), x, y), **EXACT)
