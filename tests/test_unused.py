"""Parameters without influence are named in a warning, by every quantity."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nngeo
from nngeo import FIM, NTK, Hessian, Jacobian, LayerCollection

X = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.arange(6) % 3
PMATS = [nngeo.PMatDense, nngeo.PMatDiag, nngeo.PMatBlockDiag, nngeo.PMatKFAC, nngeo.PMatEKFAC]
PMATS += [nngeo.PMatEKFACBlockDiag, nngeo.PMatQuasiDiag, nngeo.PMatLowRank, nngeo.PMatImplicit]


class Idle(nn.Module):
    """A model with a layer that it does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(3, 3).double(), nn.Linear(3, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def constant(outputs: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(outputs.detach(), y)


V, LAYERS = torch.ones(24, dtype=torch.float64), LayerCollection.from_model(Idle())
IDLE = {f"FIM {kind.__name__}": lambda kind=kind: FIM(Idle(), (X, Y), kind) @ V for kind in PMATS}
IDLE |= {
    f"GGN {kind.__name__}": lambda kind=kind: nngeo.GGN(Idle(), (X, Y), kind, F.cross_entropy) @ V for kind in PMATS
}
HESSIANS = [nngeo.PMatDense, nngeo.PMatDiag, nngeo.PMatBlockDiag, nngeo.PMatImplicit]
IDLE |= {
    f"Hessian {kind.__name__}": lambda kind=kind: Hessian(Idle(), (X, Y), kind, F.cross_entropy) @ V
    for kind in HESSIANS
}
IDLE |= {
    "implicit vTMv": lambda: FIM(Idle(), (X, Y), nngeo.PMatImplicit).vTMv(V),
    "implicit linearize": lambda: FIM(Idle(), (X, Y), nngeo.PMatImplicit).linearize(),
    "Hessian's vTMv": lambda: Hessian(Idle(), (X, Y), nngeo.PMatImplicit, F.cross_entropy).vTMv(V),
    "Hessian's linearize": lambda: Hessian(Idle(), (X, Y), nngeo.PMatImplicit, F.cross_entropy).linearize(),
    "NTK": lambda: NTK(Idle(), (X,)),
    "Jacobian": lambda: Jacobian(Idle(), (X,)),
    "implicit Jacobian": lambda: Jacobian(Idle(), (X,), representation=nngeo.PFMapImplicit).jvp(
        nngeo.PVector(LAYERS, V)
    ),
}


@pytest.mark.parametrize("call", IDLE.values(), ids=IDLE)
def test_each_quantity_names_the_parameters_without_influence(call):
    with pytest.warns(UserWarning, match="do not depend on idle.weight, idle.bias: .* zero"):
        call()


@pytest.mark.parametrize("kind", HESSIANS)
def test_the_hessian_of_a_loss_that_depends_on_nothing_says_so(kind):
    with pytest.warns(UserWarning, match="do not depend on weight, bias: .* zero"):
        assert not (Hessian(nn.Linear(3, 3).double(), (X, Y), kind, constant) @ V[:12]).any()


@pytest.mark.parametrize("kind", PMATS)
def test_the_ggn_of_a_loss_that_depends_on_nothing_says_so(kind):
    with pytest.warns(UserWarning, match="do not depend on the outputs, .* zero"):
        assert not (nngeo.GGN(nn.Linear(3, 3).double(), (X, Y), kind, constant) @ V[:12]).any()


def test_an_expert_that_one_batch_leaves_out_is_not_named():
    model = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)]).double()
    model.forward = lambda x: model[int(x.sum() > 0)](x)
    x = X.abs()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Hessian(model, [(x, Y), (-x, Y)], nngeo.PMatDiag, F.cross_entropy)


def test_a_product_says_it_once():
    matrix = FIM(Idle(), (X, Y), nngeo.PMatImplicit)
    with pytest.warns(UserWarning, match="idle"):
        matrix.mv(V)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        matrix.mv(V)
        matrix.trace()
