"""Numbers may have any size that their dtype holds."""

from __future__ import annotations

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
from nngeo.linalg.length import length
from nngeo.uses import cka

ALL = [PMatDense, PMatBlockDiag, PMatKFAC, PMatEKFAC, PMatLowRank, PMatDiag, PMatQuasiDiag]


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)), torch.randn(10, 4)


SIZES = pytest.mark.parametrize("size", [1e-30, 1e-20, 1e20, 1e30])


@SIZES
def test_lengths_of_vectors_scale(size):
    torch.manual_seed(0)
    x = torch.randn(3, 4)
    layers = LayerCollection.from_model(nn.Linear(3, 3))
    assert_close(length(size * x, 1) / size, x.norm(dim=1))
    assert_close(FVector(size * x).norm() / size, x.norm())
    assert_close(PVector(layers, size * x.flatten()).norm() / size, x.norm())


@pytest.mark.parametrize("ord", ["fro", 2])
@pytest.mark.parametrize("size", [1e-20, 1e-15, 1e15, 1e20])
@pytest.mark.parametrize("pmat", ALL)
def test_norms_of_matrices_scale(pmat, size, ord):
    model, x = net()
    F = FIM(model, (x,), pmat)
    assert_close((size * F).norm(ord) / size, F.norm(ord))


@pytest.mark.parametrize("ord", ["fro", 2])
@pytest.mark.parametrize("size", [1e-20, 1e20])
@pytest.mark.parametrize("linearized", [False, True], ids=["implicit", "linearized"])
def test_norms_of_implicit_matrices_scale(linearized, size, ord):
    model, x = net()
    F = FIM(model, (x,), PMatImplicit)
    F = F.linearize() if linearized else F
    assert_close((size * F).norm(ord) / size, F.norm(ord))


@pytest.mark.parametrize("size", [1e-20, 1e20])
@pytest.mark.parametrize(
    "estimate",
    [
        lambda F, g: F.estimate_trace(method="hutchinson", generator=g),
        lambda F, g: F.estimate_trace(method="hutch++", generator=g),
        lambda F, g: F.estimate_trace(method="xtrace", generator=g),
        lambda F, g: F.estimate_diag(method="hutchinson", generator=g),
        lambda F, g: F.estimate_diag(method="xdiag", generator=g),
        lambda F, g: F.trace_of(lambda values: values, generator=g),
    ],
    ids=["hutchinson", "hutch++", "xtrace", "diagonal", "xdiag", "quadrature"],
)
def test_estimates_and_their_errors_scale(estimate, size):
    model, x = net()
    F = FIM(model, (x,), PMatImplicit)
    small, usual = (estimate(M, torch.Generator().manual_seed(0)) for M in (size * F, F))
    assert_close(small.value / size, usual.value, rtol=1e-3, atol=1e-5)
    assert_close(small.error / size, usual.error, rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("which", ["largest", "smallest"])
@pytest.mark.parametrize("method", ["lanczos", "lobpcg"])
@pytest.mark.parametrize("size", [1e-20, 1e20])
def test_eigenpairs_scale(size, method, which):
    model, x = net()
    F = FIM(model, (x,), PMatImplicit) + 0.1
    found, usual = (
        M.top_eigenpairs(3, method=method, which=which, generator=torch.Generator().manual_seed(0))
        for M in (size * F, F)
    )
    assert_close(found.values / size, usual.values, rtol=1e-3, atol=1e-4)


def test_the_default_damping_of_an_implicit_matrix_is_finite_at_any_scale():
    model, x = net()
    F = 1e20 * FIM(model, (x,), PMatImplicit)
    assert F.solve(torch.ones(67), max_iter=1, rtol=1.0).isfinite().all()


@pytest.mark.parametrize("size", [1e-20, 1e20])
def test_alignments_of_kernels_scale(size):
    K1, K2 = torch.randn(2, 6, 4)
    K1, K2 = K1 @ K1.mT, K2 @ K2.mT
    assert_close(cka(size * K1, size * K2), cka(K1, K2))


@pytest.mark.parametrize("ord", ["fro", 2])
@pytest.mark.parametrize("size", [1e-20, 1e20])
def test_norms_of_kernels_scale(size, ord):
    rows = torch.randn(6, 6)
    K = FMatDense(LayerCollection(), data=(rows @ rows.mT).reshape(2, 3, 2, 3))
    assert_close((size * K).norm(ord) / size, K.norm(ord))


@pytest.mark.parametrize("size", [1e-25, 1e-15, 1e15])
def test_low_rank_matrices_of_any_size_are_solved(size):
    torch.manual_seed(0)
    rows = torch.randn(3, 4)
    F = PMatLowRank(LayerCollection.from_model(nn.Linear(3, 1)), data=size * rows[None])
    x, large = torch.linalg.pinv(rows) @ torch.ones(3), 1e15 if size < 1e-20 else 1.0  # so that M x is not zero
    s = F.solve(size * rows.mT @ (size * rows @ (large * x)), regul=0)
    assert_close(s / large, x, rtol=1e-3, atol=1e-4)
