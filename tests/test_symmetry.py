"""Data that are not symmetric are refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nngeo import FMatDense, FVector, LayerCollection, PMatBlockDiag, PMatDense, PMatKFAC, PMatMixed
from nngeo.linalg.matrixview import MatrixView
from nngeo.representations.kroneckerblock import KroneckerBlock
from nngeo.representations.rows import RowsBlock
from nngeo.representations.sumblock import SumBlock
from nngeo.uses import kernel_predict

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


def _lopsided(p: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.eye(p, dtype=dtype) + torch.ones(p, p, dtype=dtype).triu(1)


@DTYPES
def test_asymmetric_data_are_refused(dtype):
    layers = LayerCollection.from_model(nn.Linear(1, 1))
    with pytest.raises(ValueError, match="should be symmetric"):
        PMatDense(layers, data=_lopsided(2, dtype))
    with pytest.raises(ValueError, match="layer '' should be symmetric"):
        PMatBlockDiag(layers, data={"": _lopsided(2, dtype)})


@pytest.mark.parametrize("kind", [PMatKFAC, PMatMixed])
def test_asymmetric_parts_of_blocks_are_refused(kind):
    layers, one = LayerCollection.from_model(nn.Linear(1, 1)), torch.ones(1, 1, 1)
    view = MatrixView(groups=1, rows=1, columns=1, bias=True)
    factors = KroneckerBlock(_lopsided(2, torch.float32)[None], one, view)
    rows = RowsBlock(_lopsided(2, torch.float32)[None, None], view)
    blocks = [factors] if kind is PMatKFAC else [factors, rows, SumBlock((rows, rows))]
    for block in blocks:
        with pytest.raises(ValueError, match="layer '' should be symmetric"):
            kind(layers, data={"": block})


@pytest.mark.parametrize("place", [(0, 1099), (1099, 0), (1090, 1091)])
def test_a_single_entry_of_a_large_matrix_is_found(place):
    data = torch.ones(1100, 1100)
    data[place] += 1e-3
    with pytest.raises(ValueError, match="differs from its transpose by up to 0.001"):
        PMatDense(LayerCollection.from_model(nn.Linear(109, 10)), data=data)


@pytest.mark.parametrize(
    "call",
    [lambda K: K.get_eigendecomposition(), lambda K: K.solve(FVector(torch.ones(2, 2)))],
    ids=["eigenvalues", "solve"],
)
def test_a_kernel_between_two_sets_is_not_taken_for_a_symmetric_one(call):
    K = FMatDense(LayerCollection(), data=_lopsided(4, torch.float32).reshape(2, 2, 2, 2))
    with pytest.raises(ValueError, match="kernel should be symmetric"):
        call(K)


@DTYPES
def test_rounding_is_no_asymmetry(dtype):
    torch.manual_seed(0)
    x = torch.randn(1000, 12, dtype=dtype)
    data = torch.einsum("ni,nj->ij", x, x) + torch.finfo(dtype).eps * torch.randn(12, 12, dtype=dtype)
    PMatDense(LayerCollection.from_model(nn.Linear(3, 3)), data=data)


@pytest.mark.parametrize("ridge", [0.0, 0.1])
def test_asymmetric_kernels_foretell_nothing(ridge):
    with pytest.raises(ValueError, match="`K` should be symmetric"):
        kernel_predict(_lopsided(3, torch.float32), torch.ones(3, 1), torch.ones(2, 3), ridge=ridge)
