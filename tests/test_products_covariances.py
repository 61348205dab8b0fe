"""J M J' over the weights for matrices that are block-diagonal by layer: from factors of gradients, never from rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nngeo
from nngeo import FIM, LayerCollection, PMat
from nngeo.products import Diagonal, jacobian, jmjTp
from nngeo.products.opening import differential
from nngeo.products.planner import cheapest
from nngeo.products.structured import as_metric
from tests import networks
from tests.product_settings import exact
from tests.test_products_untouched import Largest


def reals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


MODELS = {
    "linear": (lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), (3,)),
    "positions": (lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2, bias=False)), (5, 3)),
    "groups": (lambda: nn.Sequential(nn.Conv2d(2, 4, 2, groups=2), nn.Tanh(), nn.Flatten()), (2, 3, 3)),
    "transposed": (networks.conv_transpose2d, (2, 2, 3)),
    "normalized": (networks.layer_norm, (4, 3)),
}
KINDS = ["Diag", "KFAC", "EKFAC", "EKFACBlockDiag", "BlockDiag"]
PAIRS = [(id, kind) for id in MODELS for kind in KINDS if id != "normalized" or kind not in ("KFAC", "EKFAC")]
each_pair = pytest.mark.parametrize("id, kind", PAIRS)
each_result = pytest.mark.parametrize("result", ["dense", "diag", "trace"])
each_batch = pytest.mark.parametrize("two", [False, True], ids=["one", "two"])


def made(id: str) -> tuple[nn.Module, Tensor, Tensor]:
    build, shape = MODELS[id]
    torch.manual_seed(1)
    return build().double().eval(), reals(3, *shape), reals(3, *shape, seed=1)


def fisher(model: nn.Module, x: Tensor, kind: str) -> PMat:
    return FIM(model, (x.flip(0) + 0.3,), getattr(nngeo, f"PMat{kind}"), "regression")


def formed(J: Tensor, M: Tensor, J2: Tensor, result: str) -> Tensor:
    dense = J @ M @ J2.mT
    diag = dense.diagonal(dim1=1, dim2=2)
    return {"dense": dense, "diag": diag, "trace": diag.sum(1)}[result]


@each_pair
@each_result
@each_batch
@pytest.mark.parametrize("inverse", [False, True], ids=["matrix", "inverse"])
def test_a_matrix_by_layers_is_its_dense_form(id, kind, inverse, two, result):
    model, x, x2 = made(id)
    S = fisher(model, x, kind)
    S = (S + 0.5).inv() if inverse else S
    J, J2 = (jacobian(model, z, "weight") for z in (x, x2 if two else x))
    found = jmjTp(model, x, S, "weight", result=result, x2=x2 if two else None)
    exact(found, formed(J, S.to_torch(), J2, result))


@pytest.mark.parametrize("id", MODELS)
@each_result
@each_batch
@pytest.mark.parametrize("shared", [False, True], ids=["batched", "shared"])
@pytest.mark.parametrize("reduce", [None, "mean"])
def test_a_diagonal_of_the_weights_is_its_dense_form(id, reduce, shared, two, result):
    model, x, x2 = made(id)
    J, J2 = (jacobian(model, z, "weight") for z in (x, x2 if two else x))
    d = reals(*([] if shared else [3]), J.shape[2], seed=2)
    found = jmjTp(model, x, Diagonal(d), "weight", result=result, reduce=reduce, x2=x2 if two else None, budget=999)
    truth = formed(J, d.diag_embed(), J2, result)
    exact(found, truth if reduce is None else truth.mean(0))


@each_result
def test_a_diagonal_reaches_embeddings(result):
    torch.manual_seed(0)
    model, x = networks.token_mlp().double().eval(), torch.arange(12).reshape(4, 3) % 5
    J = jacobian(model, x, "weight")
    d = reals(J.shape[2])
    exact(jmjTp(model, x, Diagonal(d), "weight", result=result), formed(J, d.diag(), J, result))


def test_a_layer_that_is_used_otherwise_takes_rows():
    """A Kronecker product of a layer's matrix, for a layer whose gradients are no outer products here."""
    model, x, _ = made("linear")
    S = fisher(model, x, "KFAC")
    own = nn.Sequential(*model)
    J = jacobian(own, x, "weight", function=lambda x: own(x) + own[2].weight.sum())
    found = jmjTp(own, x, S, "weight", function=lambda x: own(x) + own[2].weight.sum())
    exact(found, formed(J, S.to_torch(), J, "dense"))


WIDE = nn.Sequential(nn.Linear(40, 50), nn.Tanh(), nn.Linear(50, 4))


@pytest.mark.parametrize("result", ["dense", "diag"])
@pytest.mark.parametrize("kind", ["Diag", "KFAC", "EKFAC"])
def test_no_row_of_the_jacobian_is_formed(kind, result):
    x, layers = torch.randn(8, 40), LayerCollection.from_model(WIDE)
    S: Any = (FIM(WIDE, (x,), getattr(nngeo, f"PMat{kind}"), "regression") + 0.1).inv()
    with differential(WIDE, x, "weight") as at:
        assert cheapest(at.T, as_metric(S), result, False).way == "kernel"
    jmjTp(WIDE, x, S, "weight", result=result)
    with Largest() as largest:
        jmjTp(WIDE, x, S, "weight", result=result)
    assert largest.numel < len(x) * layers.numel()


def test_a_matrix_in_another_precision_is_an_error():
    model, x, _ = made("linear")
    S = FIM(nn.Sequential(*model).float(), (x.float(),), nngeo.PMatKFAC, "regression")
    with pytest.raises(ValueError, match=r"torch.float32.*torch.float64"):
        jmjTp(model.double(), x, S, "weight")
