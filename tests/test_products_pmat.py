"""J S J' for a matrix S over the parameters in any representation: the covariance of outputs, linearised."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import nngeo
from nngeo import FIM, LayerCollection, PMat, PMatBlockDiag, PMatDense, PMatDiag, PMatEye
from nngeo.products import jmjTp
from tests import reference_products as reference
from tests.product_settings import draw, exact, seen, setting

RESULTS = ("dense", "diag", "factor", "trace")
STORED = "Dense Diag BlockDiag EKFACBlockDiag QuasiDiag LowRank".split()
KRONECKER = ["KFAC", "EKFAC"]
IDS = {"mlp": KRONECKER, "lenet": KRONECKER, "tied_linears": KRONECKER, "layer_norm": [], "lstm": []}
PAIRS = [(id, kind) for id, more in IDS.items() for kind in (*STORED, *more)]
each_pair = pytest.mark.parametrize("id, kind", PAIRS)


@cache
def fisher(id: str, kind: str) -> PMat:
    """The Fisher matrix of other examples."""
    at = setting(id, "weight")
    return FIM(at.model, (at.module.inputs(6, seed=3),), getattr(nngeo, f"PMat{kind}"), "regression")


def found(id: str, metric: Any, results: Sequence[str] = RESULTS) -> dict[str, Tensor]:
    at = setting(id, "weight")
    return {r: seen(jmjTp(at.model, at.x, metric, "weight", result=r), r) for r in results}


def expected(J: Tensor, S: Tensor, results: Sequence[str] = RESULTS) -> dict[str, Tensor]:
    return {r: reference.result(reference.forward(J, S), r) for r in results}


@each_pair
def test_a_matrix_over_the_parameters_is_a_forward_metric(id, kind):
    S = fisher(id, kind)
    # A quasi-diagonal matrix need not be positive semidefinite.
    results = [result for result in RESULTS if result != "factor" or kind != "QuasiDiag"]
    exact(found(id, S, results), expected(setting(id, "weight").J, S.to_torch(), results))


@each_pair
def test_an_inverse_is_a_covariance(id, kind):
    S = (fisher(id, kind) + 0.7).inv()
    exact(found(id, S), expected(setting(id, "weight").J, S.to_torch()))


@pytest.mark.parametrize("id", IDS)
def test_a_matrix_known_by_its_products_is_a_forward_metric(id):
    S = fisher(id, "Implicit")
    exact(found(id, S), expected(setting(id, "weight").J, fisher(id, "Dense").to_torch()))


@pytest.mark.parametrize("kind", [*STORED, *KRONECKER])
@pytest.mark.parametrize("reduce", ["sum", "mean"])
def test_a_covariance_is_reduced_over_the_batch(kind, reduce):
    at, S = setting("mlp", "weight"), fisher("mlp", kind)
    matrix = reference.forward(at.J, S.to_torch())
    matrix = matrix.sum(0) if reduce == "sum" else matrix.mean(0)
    diag = jmjTp(at.model, at.x, S, "weight", result="diag", reduce=reduce)
    exact(diag, reference.result(matrix, "diag"))


@pytest.mark.parametrize("kind", [*STORED, *KRONECKER])
def test_a_covariance_between_two_inputs(kind):
    at, S = setting("mlp", "weight"), fisher("mlp", kind)
    exact(jmjTp(at.model, at.x, S, "weight", x2=at.x2), reference.forward(at.J, S.to_torch(), at.J2))


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_a_multiple_of_the_identity_is_a_forward_metric(scale):
    at = setting("mlp", "weight")
    S = PMatEye(LayerCollection.from_model(at.model), scale, dtype=torch.float64)
    exact(found("mlp", S), expected(at.J, S.to_torch()))


def test_an_indefinite_matrix_has_no_factor_but_all_else():
    at = setting("mlp", "weight")
    layers = LayerCollection.from_model(at.model)
    root = draw(layers.numel(), layers.numel())
    S = PMatDense(layers, data=root + root.mT)
    results = ("dense", "diag", "trace")
    matrices = {r: jmjTp(at.model, at.x, S, "weight", result=r) for r in results}
    exact(matrices, {r: reference.result(reference.forward(at.J, S.to_torch()), r) for r in results})
    with pytest.raises(ValueError, match="factor"):
        jmjTp(at.model, at.x, S, "weight", result="factor")


# ------------------------------------------------------------------------------------------ whose parameters


def matrix_of(layers: LayerCollection, kind: str) -> PMat:
    if kind == "Diag":
        return PMatDiag(layers, data=draw(layers.numel()).square())
    roots = {name: draw(layer.numel(), layer.numel()) for name, layer in layers.layers.items()}
    return PMatBlockDiag(layers, data={name: root @ root.mT for name, root in roots.items()})


@pytest.mark.parametrize("kind", ["Diag", "BlockDiag"])
@pytest.mark.parametrize("names", [("2",), ("4", "0")], ids="+".join)
def test_a_matrix_speaks_of_the_parameters_of_its_collection(kind, names):
    at = setting("mlp", "weight")
    whole = LayerCollection.from_model(at.model)
    layers = LayerCollection([whole[name] for name in names])
    S = matrix_of(layers, kind)
    J = reference.jacobian(at.model, at.x, "weight", list(layers.parameters(at.model)))
    exact(jmjTp(at.model, at.x, S, "weight", layer_collection=layers), reference.forward(J, S.to_torch()))


def test_a_matrix_of_another_model_is_an_error():
    at = setting("mlp", "weight")
    with pytest.raises(ValueError, match="LayerCollection"):
        jmjTp(at.model, at.x, fisher("lenet", "Diag"), "weight")


def test_a_matrix_over_parameters_is_no_metric_on_inputs():
    at = setting("mlp", "input")
    with pytest.raises((TypeError, ValueError), match="PMat"):
        jmjTp(at.model, at.x, fisher("mlp", "Diag"), "input")
