"""Metrics without symmetry, of rank zero, in half precision; arguments that do not fit; what works in place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from nngeo import LayerCollection, PMatDiag
from nngeo.products import (
    BlockDiagonal,
    Dense,
    Factor,
    Kronecker,
    LowRankPlusDiagonal,
    jacobian,
    jmjTp,
    jmp,
    jTmjp,
    mjp,
)
from tests.product_settings import exact

each_side = pytest.mark.parametrize("wrt", ["input", "weight"])


def reals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def perceptron() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


# Metrics that are not symmetric


@pytest.mark.parametrize("result", ["dense", "diag"])
@pytest.mark.parametrize("two", [False, True], ids=["one", "two"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_random_signs_are_unbiased_without_symmetry(two, result, seed):
    model, x, m = perceptron(), reals(2, 3), torch.tensor([[1.0, 3.0], [-2.0, 0.5]], dtype=torch.float64)
    options: dict[str, Any] = {"result": result, "x2": reals(2, 3, seed=1) if two else None}
    generator = torch.Generator().manual_seed(seed)
    found = jTmjp(model, x, m, method="mc", samples=600, generator=generator, **options)
    truth = jTmjp(model, x, m, **options)
    assert ((found.value - truth).abs() <= 5 * found.standard_error + 1e-9).all()


@each_side
@pytest.mark.parametrize("kind", ["dense", "blocks", "kronecker"])
@pytest.mark.parametrize("result", ["diag", "trace"])
def test_the_diagonal_without_symmetry_is_that_of_the_product(result, kind, wrt):
    model, x, m = perceptron(), reals(2, 3), reals(2, 2, seed=1)
    metrics = {"dense": Dense(m), "blocks": BlockDiagonal({"outputs": m}), "kronecker": Kronecker(m, m[:1, :1])}
    J, M = jacobian(model, x, wrt), m * (m[0, 0] if kind == "kronecker" else 1)
    truth = (J.mT @ M @ J).diagonal(dim1=1, dim2=2)
    exact(jTmjp(model, x, metrics[kind], wrt, result=result), truth if result == "diag" else truth.sum(1))


# Rank zero


@each_side
@pytest.mark.parametrize("create_graph", [False, True], ids=["plain", "graph"])
@pytest.mark.parametrize("result", ["dense", "diag", "trace", "factor"])
def test_a_metric_of_rank_zero_is_zero(result, create_graph, wrt):
    model, x = perceptron(), reals(2, 3)
    n = jacobian(model, x, wrt).shape[2]
    shape = {"dense": (2, n, n), "diag": (2, n), "trace": (2,), "factor": (2, n, 0)}[result]
    found = jTmjp(model, x, Factor(reals(2, 0)), wrt, result=result, create_graph=create_graph)
    assert_close(found, torch.zeros(shape, dtype=torch.float64))


@pytest.mark.parametrize("result", ["dense", "diag", "factor"])
def test_a_low_rank_of_zero_leaves_the_diagonal(result):
    model, x = perceptron(), reals(2, 3)
    found = jTmjp(model, x, LowRankPlusDiagonal(reals(2, 0), torch.ones(2, dtype=torch.float64)), result=result)
    exact(found @ found.mT if result == "factor" else found, jTmjp(model, x, result=result.replace("factor", "dense")))


@each_side
def test_no_columns_give_none(wrt):
    model, x = perceptron(), reals(2, 3)
    n = jacobian(model, x, wrt).shape[2]
    assert jmp(model, x, reals(n, 0), wrt).shape == (2, 2, 0)
    assert mjp(model, x, reals(0, 2), wrt).shape == (2, 0, n)


# Half precision


@each_side
@pytest.mark.parametrize("kind", ["dense", "kronecker"])
@pytest.mark.parametrize("result", ["dense", "diag", "trace"])
def test_dense_metrics_in_half_precision(result, kind, wrt):
    model, x, root = perceptron(), reals(2, 3), reals(2, 2)
    m = root @ root.mT
    make = Dense if kind == "dense" else lambda m: Kronecker(m, torch.ones(1, 1, dtype=m.dtype))
    truth = jTmjp(model, x, make(m), wrt, result=result)
    found = jTmjp(model.bfloat16(), x.bfloat16(), make(m.bfloat16()), wrt, result=result)
    assert found.dtype == torch.bfloat16
    assert (found.double() - truth).norm() < 0.05 * truth.norm()


# In place


class Rectified(nn.Module):
    """Works in place, and does not say so."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu_(x)


@each_side
@pytest.mark.parametrize("transposed", [False, True], ids=["back", "forth"])
def test_diagonals_leave_the_data_as_they_were(transposed, wrt):
    model, x = nn.Sequential(Rectified(), nn.Linear(3, 2), Rectified(), nn.Linear(2, 2)).double(), reals(4, 3)
    plain = nn.Sequential(nn.ReLU(), model[1], nn.ReLU(), model[3])
    before, product = x.clone(), jmjTp if transposed else jTmjp
    found = product(model, x, None, wrt, result="diag", method="diag_backprop")
    assert_close(x, before, rtol=0, atol=0)
    assert_close(found, product(plain, x, None, wrt, result="diag", method="diag_backprop"))


# What does not fit


def test_inputs_of_two_lengths_have_a_dense_product_only():
    class Total(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.tanh().cumsum(1)[:, -2:]

    x, x2 = reals(2, 4), reals(2, 5)
    J, J2 = jacobian(Total(), x), jacobian(Total(), x2)
    exact(jTmjp(Total(), x, x2=x2), J.mT @ J2)
    with pytest.raises(ValueError, match=r"4 entries for `x` and 5 for `x2`; result='diag' needs equal"):
        jTmjp(Total(), x, x2=x2, result="diag")
    with pytest.raises(ValueError, match=r"4 entries for `x` and 5 for `x2`; one metric"):
        jmjTp(Total(), x, x2=x2)


@pytest.mark.parametrize("make", [Factor, lambda v: LowRankPlusDiagonal(v, torch.ones(2).double())])
def test_a_factor_is_a_tensor(make):
    with pytest.raises(TypeError, match=r"\.v` is a list; it should be a tensor"):
        jTmjp(perceptron(), reals(2, 3), make([[1.0], [2.0]]))


def test_a_matrix_of_other_layers_is_named():
    layers = LayerCollection.from_model(nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2)))
    with pytest.raises(ValueError, match=r"PMatDiag is over the layers 0, 1 .* those of 0, 2"):
        jmjTp(perceptron(), reals(2, 3), PMatDiag(layers, data=reals(layers.numel())), "weight")
