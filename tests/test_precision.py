"""Operations inside an autocast region of the caller are those outside of it, to the last bit."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import nngeo.descent.scalarization
import nngeo.nn
import nngeo.uses
from nngeo import FIM, NTK, FVector, Jacobian, PVector
from nngeo.descent.linalg import DualConeProjector
from nngeo.linalg.precision import full_precision
from nngeo.products import Metric
from nngeo.representations import PMatLowRankPlusDiag

torch.manual_seed(0)
MODEL = nn.Sequential(nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 4))
X = torch.randn(30, 12)
V = PVector.from_model(MODEL).detach().to_torch().clone()
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]
KINDS = [nngeo.PMatDense, nngeo.PMatBlockDiag, nngeo.PMatDiag, nngeo.PMatQuasiDiag, nngeo.PMatKFAC, nngeo.PMatEKFAC]
KINDS += [nngeo.PMatEKFACBlockDiag, nngeo.PMatLowRank, PMatLowRankPlusDiag, nngeo.PMatImplicit]
CALLS = {
    "mv": lambda F, v, J: F.mv(v),
    "@": lambda F, v, J: F @ v,
    "vTMv": lambda F, v, J: F.vTMv(v),
    "mapTMmap": lambda F, v, J: F.mapTMmap(J, reduction="blocks"),
    "solve": lambda F, v, J: F.solve(v, regul=1e-1),
    "cg": lambda F, v, J: F.solve(v, regul=1.0, solve="cg"),
    "trace": lambda F, v, J: F.trace(),
    "get_diag": lambda F, v, J: F.get_diag(),
    "norm": lambda F, v, J: F.norm(2),
    "to_torch": lambda F, v, J: F.to_torch(),
    "damped": lambda F, v, J: (F + 1.0).mv(v),
    "inv": lambda F, v, J: (F + 1.0).inv().mv(v),
}


def on(device: str) -> tuple[nn.Module, Tensor, Tensor]:
    return MODEL.to(device), X.to(device), V.to(device)


@cache
def made(kind: type, device: str) -> nngeo.PMat:
    model, x, _ = on(device)
    return FIM(model, (x,), nngeo.PMatLowRank) + 0.5 if kind is PMatLowRankPlusDiag else FIM(model, (x,), kind)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_matrix_is_the_same_inside_autocast(call, kind, device):
    model, x, v = on(device)
    F, J = made(kind, device), Jacobian(model, (x[:2],))
    expected = call(F, v, J)
    with torch.autocast(device, torch.bfloat16):
        assert_close(call(F, v, J), expected, rtol=1e-5, atol=1e-6)


OTHERS = {
    "NTK": lambda model, x, v: NTK(model, (x[:5],)).to_torch(),
    "NTK.mv": lambda model, x, v: NTK(model, (x[:5],)).mv(FVector(x[:4, :5].contiguous())).to_torch(),
    "Jacobian": lambda model, x, v: Jacobian(model, (x,)).to_torch(),
    "J.T @ (J @ v)": lambda model, x, v: _squared(Jacobian(model, (x,)), v),
    "implicit J": lambda model, x, v: _squared(Jacobian(model, (x,), representation=nngeo.PFMapImplicit), v),
    "J @ J.T": lambda model, x, v: _gram(Jacobian(model, (x[:5],))),
    "dot": lambda model, x, v: PVector.from_model(model) @ PVector.from_model(model),
    "eigenvectors": lambda model, x, v: FIM(model, (x,), nngeo.PMatDense).eigh()[1].into(v).abs(),
    "top_eigenpairs": lambda model, x, v: FIM(model, (x,), nngeo.PMatImplicit).top_eigenpairs(2).values,
    "a block": lambda model, x, v: FIM(model, (x,), nngeo.PMatKFAC).data["0"].mv(v[:117]),
}


def _squared(J: nngeo.PFMapDense, v: Tensor) -> Tensor:
    return (J.T @ (J @ PVector(J.layer_collection, v))).to_torch()


def _gram(J: nngeo.PFMapDense) -> Tensor:
    return (J @ J.T).to_torch()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("call", OTHERS.values(), ids=OTHERS)
def test_maps_kernels_and_vectors_are_the_same_inside_autocast(call, device):
    model, x, v = on(device)
    torch.manual_seed(1)
    expected = call(model, x, v)
    torch.manual_seed(1)
    with torch.autocast(device, torch.bfloat16):
        assert_close(call(model, x, v), expected, rtol=1e-4, atol=1e-5)


def test_autocast_is_on_again_after_an_error():
    F = FIM(MODEL.cpu(), (X,), nngeo.PMatDiag)
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(ValueError, match="Expected a tensor"):
            F.mv(torch.ones(3))
        assert (X @ X.T).dtype == torch.bfloat16


# ------------------------------------------------------------------------------------------ every operation

MODULES = [nngeo, nngeo.descent, nngeo.descent.aggregation, nngeo.descent.autojac, nngeo.descent.linalg]
MODULES += [nngeo.descent.scalarization, nngeo.products, nngeo.uses, nngeo.nn]
GUARD = full_precision(lambda: None).__code__
# Neither these nor their methods compute anything by themselves: what they return, or their caller, is guarded.
FREE = {"convert_to_nnj", "register_diag_rule", "register_rule", "register_variant", "random_fvector", "random_pvector"}
FREE |= {"random_pvector_dict", "random_pfmap", "DiagRule", "LayerCollection", "Stateful", "Matrix", "PSDMatrix"}
# Of likelihoods, what belongs to a forward pass of the user's.
FREE_METHODS = {"forward", "log_density", "metric", "residual", "get_weight", "set_weight", "remove"}


def operations(public: Any) -> list[Callable]:
    """A function, or the methods of a class that users call: of modules and metrics only the call."""
    if not isinstance(public, type):
        return [public]
    names = [name for name in dir(public) if not name.startswith("_")]
    if issubclass(public, nn.Module | Metric | DualConeProjector):
        names = []
    members = [inspect.getattr_static(public, name) for name in [*names, "__call__"] if hasattr(public, name)]
    found = [m.__func__ if isinstance(m, classmethod | staticmethod) else m for m in members]
    own = [m for m in found if inspect.isfunction(m) and str(m.__module__).startswith("nngeo")]
    return [m for m in own if m.__name__ not in FREE_METHODS]


PUBLIC = {
    f"{function.__module__}.{function.__qualname__}": function
    for module in MODULES
    for name in sorted(set(module.__all__) - FREE - set(nngeo.nn.classes.__all__))
    if callable(getattr(module, name))
    for function in operations(getattr(module, name))
}


def test_public_operations_are_found():
    assert len(PUBLIC) > 150


@pytest.mark.parametrize("operation", PUBLIC.values(), ids=PUBLIC)
def test_every_public_operation_switches_autocast_off(operation):
    guarded = inspect.unwrap(operation, stop=lambda f: getattr(f, "__code__", None) is GUARD)
    assert guarded.__code__ is GUARD
