"""Iterative solvers report the residual of what they return, and say when it is not small."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from nngeo import LayerCollection, PMatDense
from nngeo.linalg.cg import conjugate_gradients
from nngeo.linalg.refinement import refined
from nngeo.representations import ConvergenceWarning

SOLVERS = pytest.mark.parametrize("solver", ["cg", "minres", "lsmr"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


def of_rank(rank: int, dtype: torch.dtype, scale: float = 1.0) -> PMatDense:
    """Over 12 parameters, with eigenvalues from `scale` down to its hundredth."""
    torch.manual_seed(0)
    q = torch.linalg.qr(torch.randn(12, rank, dtype=torch.float64)).Q
    values = scale * torch.logspace(0, -2, rank, dtype=torch.float64)
    data = ((q * values) @ q.mT).to(dtype)
    return PMatDense(LayerCollection.from_model(nn.Linear(3, 3)), data=(data + data.mT) / 2)


def told(F, v, **options):
    """The solution, the report, the residual as it is, and whether there was a warning."""
    reports = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        x = F.solve(v, report=reports.append, **options)
    residual = (v - F.mv(x) - options["regul"] * x).double().norm(dim=-1) / v.double().norm(dim=-1)
    return x, reports[-1], float(residual.max()), any(w.category is ConvergenceWarning for w in caught)


@SOLVERS
@DTYPES
@pytest.mark.parametrize("regul", [1e-1, 1e-3, 1e-5, 1e-8])
@pytest.mark.parametrize("several", [False, True], ids=["one", "several"])
def test_the_residual_told_is_that_of_the_solution(solver, dtype, regul, several):
    F = of_rank(6, dtype)
    v = torch.randn(3, 12, dtype=dtype) if several else torch.randn(12, dtype=dtype)
    _, report, residual, warned = told(F, v, regul=regul, solve=solver)
    assert report.residual == pytest.approx(residual, rel=1e-3, abs=1e-7)
    assert report.converged == (report.residual <= (1e-5 if dtype == torch.float32 else 1e-6)) == (not warned)


@SOLVERS
@DTYPES
def test_a_preconditioner_and_a_start_leave_the_residual_true(solver, dtype):
    F, v = of_rank(6, dtype), torch.randn(12, dtype=dtype)
    near = {} if solver == "lsmr" else {"preconditioner": of_rank(12, dtype)}
    _, report, residual, warned = told(F, v, regul=1e-6, solve=solver, x0=torch.randn(12, dtype=dtype), **near)
    assert report.residual == pytest.approx(residual, rel=1e-3, abs=1e-7)
    assert report.converged != warned


@SOLVERS
@DTYPES
@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e20, 1e30])
def test_solutions_scale_with_the_right_hand_side(solver, dtype, size):
    F, v = of_rank(12, dtype), torch.randn(12, dtype=dtype)
    x, report, *_ = told(F, size * v, regul=0.1, solve=solver)
    assert report.converged
    assert_close(x / size, F.solve(v, regul=0.1), rtol=0, atol=1e-3)


@pytest.mark.parametrize("solver", ["cg", "lsmr"])
def test_rounding_is_named_as_the_cause(solver):
    with pytest.warns(ConvergenceWarning, match="it falls no further: rounding in torch.float32.*use float64"):
        of_rank(6, torch.float32).solve(torch.randn(12), regul=1e-7, solve=solver, max_iter=3000)


@DTYPES
def test_least_squares_that_leave_a_residual_have_not_converged(dtype):
    F, v = of_rank(6, dtype), torch.randn(12, dtype=dtype)
    x, report, residual, warned = told(F, v, regul=0.0, solve="lsmr", max_iter=2000)
    assert not report.converged and report.residual == pytest.approx(residual, rel=1e-3)
    assert not warned  # it is what was asked for
    assert F.mv(v - F.mv(x)).norm() < 1e-4 * F.mv(v).norm()


def test_a_run_that_is_too_sure_is_followed_by_another():
    """One that halves what is left, whatever it was told to reach."""
    runs = []

    def half(r, target, limit):
        runs.append(r.norm(dim=-1))
        return 0.6 * r, 1, False

    b = torch.randn(2, 5, dtype=torch.float64)
    found = refined(half, lambda x: x, b, rtol=1e-3)
    assert found.converged and found.iterations == len(runs) == 8  # 0.4^8 < 1e-3
    assert_close(torch.stack(runs), torch.ones(8, 2, dtype=torch.float64))
    assert_close(found.residuals, torch.full((2,), 0.4**8, dtype=torch.float64))


def test_a_run_that_makes_it_worse_is_not_taken():
    found = refined(lambda r, target, limit: (-r, 1, False), lambda x: x, torch.ones(1, 3))
    assert found.stalled and not found.converged
    assert torch.equal(found.x, torch.zeros(1, 3)) and found.residuals == 1


def test_few_iterations_are_taken_though_the_residual_grows():
    """After one step of CG the error is smaller in the norm of A, but |b - A x| is 1.3 |b|."""
    matrix, b = torch.diag(torch.tensor([1.0, 100.0])), torch.tensor([[1.0, 0.1]])
    found = conjugate_gradients(lambda x: x @ matrix, b, max_iter=1)
    step = b.square().sum() / (b @ matrix @ b.mT)
    assert_close(found.x, step * b)
    assert found.residuals > 1 and not found.stalled
