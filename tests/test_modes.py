"""Under torch.inference_mode results are those outside of it: parameters that are zero and norm layers included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import nngeo
from nngeo import FIM, NTK, Jacobian, LayerCollection, PMatImplicit, products


def zero_head() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    nn.init.zeros_(model[2].weight)
    return model


def normed(norm: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), norm, nn.Linear(8, 3))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "LayerNorm": lambda: normed(nn.LayerNorm(8)),
    "BatchNorm1d": lambda: normed(nn.BatchNorm1d(8)),
    "GroupNorm": lambda: normed(nn.GroupNorm(2, 8)),
    "RMSNorm": lambda: normed(nn.RMSNorm(8)),
    "a zero head": zero_head,
    "attention": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 3)), nn.TransformerEncoderLayer(3, 1, 4, 0.0, batch_first=True), nn.Flatten()
    ),
}


def ones(model: nn.Module) -> nngeo.PVector:
    layers = LayerCollection.from_model(model)
    return nngeo.PVector(layers, vector_repr=torch.ones(layers.numel()))


def matrix(kind: type) -> Callable[[nn.Module, Tensor], Any]:
    """F v and v' F v, of the linear layers: every representation has them."""

    def call(model: nn.Module, x: Tensor) -> Any:
        layers = LayerCollection.from_model(model, lambda name, module: type(module) is nn.Linear)
        F = FIM(model, (x,), kind, "regression", layer_collection=layers)
        v = nngeo.PVector(layers, vector_repr=torch.ones(layers.numel()))
        return F.mv(v).to_torch(), F.vTMv(v), F.trace()

    return call


KINDS = [nngeo.PMatBlockDiag, nngeo.PMatQuasiDiag, nngeo.PMatKFAC, nngeo.PMatEKFAC, nngeo.PMatEKFACBlockDiag]
KINDS += [nngeo.PMatLowRank]
CALLS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "diagonal": lambda model, x: FIM(model, (x,), nngeo.PMatDiag, "regression").get_diag(),
    "dense": lambda model, x: FIM(model, (x,), nngeo.PMatDense, "regression").to_torch(),
    **{kind.__name__: matrix(kind) for kind in KINDS},
    "implicit": lambda model, x: FIM(model, (x,), PMatImplicit, "regression").mv(ones(model)).to_torch(),
    "quadratic form": lambda model, x: FIM(model, (x,), PMatImplicit, "regression").vTMv(ones(model)),
    "linearized": lambda model, x: FIM(model, (x,), PMatImplicit, "regression").linearize().mv(ones(model)).to_torch(),
    "draws": lambda model, x: nngeo.FIM_MonteCarlo(
        model, (x,), nngeo.PMatDiag, "regression", generator=torch.Generator().manual_seed(0)
    ).get_diag(),
    "kernel": lambda model, x: NTK(model, (x,)).to_torch(),
    "Jacobian": lambda model, x: Jacobian(model, (x,)).to_torch(),
    "by weights": lambda model, x: products.jacobian(model, x, wrt="weight"),
    "by inputs": lambda model, x: products.jacobian(model, x),
}


@pytest.mark.parametrize("data", [False, True], ids=["data made outside", "data made inside"])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_inference_mode_changes_nothing(make, call, data):
    torch.manual_seed(0)
    model, x = make().eval(), torch.randn(5, 6)
    with torch.inference_mode():
        found = call(model, x.clone() if data else x)
    assert_close(found, call(model, x))
    model(x).sum().backward()
