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
    PMatKFAC,
    PMatLowRank,
    PMatQuasiDiag,
    PVector,
)
from nngeo.linalg.length import length

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
