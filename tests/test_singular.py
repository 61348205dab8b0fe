"""Singular matrices are not solved, and damping is not drowned by rounding."""

from __future__ import annotations

from math import comb

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from nngeo import (
    FIM,
    FMatDense,
    FVector,
    LayerCollection,
    PMatBlockDiag,
    PMatDense,
    PMatDiag,
    PMatEKFAC,
    PMatImplicit,
    PMatKFAC,
    PMatLowRank,
    PMatQuasiDiag,
    PVector,
)
from nngeo.linalg.matrixview import MatrixView
from nngeo.linalg.symmetric import SymmetricMatrix
from nngeo.representations.quasidiag import QuasiDiagBlock

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
STORED = [PMatDense, PMatBlockDiag, PMatKFAC, PMatEKFAC, PMatLowRank]
ALL = [*STORED, PMatDiag, PMatQuasiDiag]


def net(dtype: torch.dtype, n: int = 10):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)
    return model, torch.randn(n, 4, dtype=dtype)


# Without damping


@DTYPES
@pytest.mark.parametrize("n", [1, 10])
@pytest.mark.parametrize("pmat", STORED)
def test_a_singular_matrix_is_not_solved(pmat, n, dtype):
    model, x = net(dtype, n)
    F, v = FIM(model, (x,), pmat), PVector.from_model(model).detach()
    with pytest.raises(ValueError, match="singular|rank"):
        F.solve(v, regul=0)


@DTYPES
def test_a_singular_kernel_is_not_solved(dtype):
    rows = torch.randn(6, 3, dtype=dtype)
    K = FMatDense(LayerCollection(), data=(rows @ rows.mT).reshape(2, 3, 2, 3))
    with pytest.raises(ValueError, match="singular"):
        K.solve(FVector(torch.ones(2, 3, dtype=dtype)), regul=0)


@DTYPES
def test_a_function_of_a_singular_quasi_diagonal_is_not_solved(dtype):
    F = FIM(nn.Linear(1, 1).to(dtype), (torch.ones(5, 1, dtype=dtype),), PMatQuasiDiag, variant="regression")
    with pytest.raises(ValueError, match="singular"):
        F.solve(torch.ones(2, dtype=dtype), regul=0)
    with pytest.raises(ValueError, match="singular"):
        F.pow(2).solve(torch.ones(2, dtype=dtype), regul=0)


@DTYPES
@pytest.mark.parametrize("negative", [0, 1], ids=["definite", "indefinite"])
def test_a_matrix_with_one_small_eigenvalue_is_told_from_a_singular_one(negative, dtype):
    torch.manual_seed(0)
    q = torch.linalg.qr(torch.randn(50, 50, dtype=torch.float64)).Q
    values = torch.linspace(1, 2, 50, dtype=torch.float64)
    values[1] *= -1 if negative else 1
    small = 1e3 * torch.finfo(dtype).eps

    def matrix(least: float) -> SymmetricMatrix:
        values[0] = least
        return SymmetricMatrix(((q * values) @ q.mT).to(dtype))

    v = matrix(small).tensor @ torch.ones(50, dtype=dtype)
    assert_close(matrix(small).solve(v, 0.0), torch.ones(50, dtype=dtype), rtol=0, atol=0.2)
    with pytest.raises(ValueError, match="singular"):
        matrix(small * 1e-3).solve(v, 0.0)


@DTYPES
def test_a_small_damping_solves_without_further_regul(dtype):
    model, x = net(dtype)
    F, v = FIM(model, (x,), PMatDense), torch.randn(67, dtype=dtype)
    damping = 0.1 * torch.finfo(dtype).eps
    assert_close((F + damping).solve(v, regul=0), F.solve(v, regul=damping), rtol=1e-3, atol=1e-3 / damping)


# With the default damping


@pytest.mark.parametrize("pmat", [*STORED, PMatImplicit])
def test_the_default_damping_is_not_drowned_by_float32(pmat):
    model, x = net(torch.float32)
    F = 1e4 * FIM(model, (x,), pmat)
    v = torch.randn(67)
    s = F.solve(v) if pmat is not PMatImplicit else F.solve(v, rtol=0.5)
    largest = float(F.norm(2))
    assert s.norm() <= v.norm() / (5 * torch.finfo(torch.float32).eps * largest)


@pytest.mark.parametrize("pmat", ALL)
def test_the_default_damping_is_small_in_float64(pmat):
    model, x = net(torch.float64)
    F, v = FIM(model, (x,), pmat), torch.randn(67, dtype=torch.float64)
    assert_close(F.solve(v), F.solve(v, regul=1e-8))


def test_the_default_damping_of_a_kernel_is_not_drowned():
    K = FMatDense(LayerCollection(), data=1e4 * torch.ones(2, 3, 2, 3))
    v = FVector(torch.tensor([[1.0, -1.0, 0.0]] * 2))
    assert K.solve(v).to_torch().norm() < 1e3


# Quasi-diagonal: weight and bias that move together


@DTYPES
@pytest.mark.parametrize("c", [1.0, 0.3, -7.0])
@pytest.mark.parametrize("regul", [1e-8, 1e-4])
def test_weight_and_bias_that_move_together_are_solved(c, regul, dtype):
    """[[c^2, c], [c, 1]] + r I has the inverse [[1 + r, -c], [-c, c^2 + r]] / (r (1 + c^2 + r))."""
    model, x = nn.Linear(1, 1).to(dtype), torch.full((5, 1), c, dtype=dtype)
    F = FIM(model, (x,), PMatQuasiDiag, variant="regression")
    inverse = torch.tensor([[1 + regul, -c], [-c, c * c + regul]]).double() / (regul * (1 + c * c + regul))
    found = F.solve(torch.eye(2, dtype=dtype), regul=regul)
    assert_close(found.double(), inverse, rtol=1e-2, atol=0)


@DTYPES
def test_quasi_diagonal_solutions_are_those_of_the_dense_matrix(dtype):
    model, x = net(dtype)
    F, v = FIM(model, (x,), PMatQuasiDiag), torch.randn(67, dtype=dtype)
    dense = F.to_torch().double() + 0.3 * torch.eye(67)
    assert_close(F.solve(v, regul=0.3), torch.linalg.solve(dense, v.double()).to(dtype), rtol=1e-4, atol=1e-5)


@DTYPES
def test_a_dead_input_of_a_quasi_diagonal_matrix_is_solved(dtype):
    x = torch.tensor([[0.0, 1.0], [0.0, 2.0]], dtype=dtype)
    F = FIM(nn.Linear(2, 1).to(dtype), (x,), PMatQuasiDiag, variant="regression")
    dense = F.to_torch().double() + 1e-3 * torch.eye(3)
    v = torch.tensor([1.0, 2.0, 3.0], dtype=dtype)
    assert_close(F.solve(v, regul=1e-3), torch.linalg.solve(dense, v.double()).to(dtype), rtol=1e-4, atol=1e-4)


@DTYPES
def test_an_indefinite_row_with_a_weight_of_zero_is_solved(dtype):
    """As in a difference of two matrices."""
    view = MatrixView(groups=1, rows=1, columns=2, bias=True)
    block = QuasiDiagBlock(torch.tensor([0, 2, 1], dtype=dtype), torch.tensor([[[3, 1]]], dtype=dtype), view)
    dense = torch.tensor([[0.5, 0, 3], [0, 2.5, 1], [3, 1, 1.5]], dtype=dtype)
    v = torch.tensor([1, 2, 3], dtype=dtype)
    assert_close(block.solve(v, 0.5), torch.linalg.solve(dense, v))


# Twice is enough: what is divided by the damping is orthogonal to the rows


@DTYPES
@pytest.mark.parametrize("pmat", [PMatLowRank, "damped"])
def test_what_lies_outside_of_the_rows_is_orthogonal_to_them(pmat, dtype):
    """One projection of a vector in the span leaves its rounding there, which is divided by the damping."""
    torch.manual_seed(0)
    layers = LayerCollection.from_model(nn.Linear(99, 2))
    eps = torch.finfo(dtype).eps
    rows = torch.randn(1, 60, 200, dtype=dtype)
    F, damping = PMatLowRank(layers, data=rows), eps
    v = torch.randn(60, dtype=dtype) @ rows[0]
    solved = F.solve(v, regul=damping) if pmat is PMatLowRank else (F + damping).solve(v, regul=0)
    span = F.svd()[1]
    inside = solved @ span.mT @ span
    outside = solved - inside
    exact = torch.linalg.lstsq(rows[0].mT.double(), v.double()[:, None]).solution[:, 0]
    assert_close(rows[0] @ solved, exact.to(dtype), rtol=1e-2, atol=1e-2)
    assert (outside @ span.mT).norm() <= 20 * eps * outside.norm()


@pytest.mark.parametrize("n", range(9, 14))
def test_a_matrix_that_float32_can_hold_but_not_factorise_is_factorised_in_float64(n):
    """Pascal's symmetric matrix has integer entries and the determinant 1; here from the largest entry on."""
    entries = [[float(comb(i + j, i)) for j in reversed(range(n))] for i in reversed(range(n))]
    F = PMatDense(LayerCollection.from_model(nn.Linear(n, 1, bias=False)), data=torch.tensor(entries))
    assert_close(F.logdet(), torch.tensor(0.0), rtol=0, atol=1e-5)


@DTYPES
@pytest.mark.parametrize("damping", [1e-3, 1e-6, 1e-9])
def test_rows_that_span_everything_leave_no_digits_to_woodburys_identity(damping, dtype):
    """The sum has the condition of R'R, whatever the diagonal: its inverse has the digits of a dense one."""
    torch.manual_seed(0)
    layers = LayerCollection.from_model(nn.Linear(20, 1))
    F = PMatLowRank(layers, data=torch.randn(1, 60, 21, dtype=dtype))
    diagonal, v = damping * (1 + torch.rand(21, dtype=dtype)), torch.randn(21, dtype=dtype)
    exact = (F.to_torch() + diagonal.diag()).double()
    expected = torch.linalg.solve(exact, v.double()).to(dtype)
    tolerance = {"rtol": 1e3 * torch.finfo(dtype).eps, "atol": 100 * torch.finfo(dtype).eps}
    for found in ((F + diagonal).solve(v, regul=0), (F + diagonal).inv().mv(v)):
        assert_close(found, expected, **tolerance)
    assert_close((F + diagonal).logdet(), torch.logdet(exact).to(dtype), **tolerance)


@DTYPES
def test_a_small_diagonal_where_the_rows_are_does_not_cancel(dtype):
    layers = LayerCollection.from_model(nn.Linear(3, 1, bias=False))
    F = PMatLowRank(layers, data=torch.tensor([[[10.0, 0.0, 1.0]]], dtype=dtype))
    diagonal = torch.tensor([1e-7, 1.0, 1.0], dtype=dtype)
    exact, v = (F.to_torch() + diagonal.diag()).double(), torch.ones(3, dtype=dtype)
    solved = (F + diagonal).solve(v, regul=0)
    assert_close(solved, torch.linalg.solve(exact, v.double()).to(dtype), rtol=2e-4, atol=0)


def test_the_default_damping_of_low_rank_matrices_asks_for_no_singular_values(monkeypatch):
    F = PMatLowRank(LayerCollection.from_model(nn.Linear(3, 1)), data=torch.randn(1, 2, 4))
    monkeypatch.setattr(PMatLowRank, "svd", lambda self: pytest.fail("singular values"))
    F.solve(torch.ones(4), solve="cg", rtol=1.0)
