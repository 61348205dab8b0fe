"""A metric may have no cotangents at all, in some mini-batches or in all: these count as examples without gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import nngeo
from nngeo import FIM

KINDS = [nngeo.PMatDense, nngeo.PMatBlockDiag, nngeo.PMatDiag, nngeo.PMatQuasiDiag, nngeo.PMatKFAC, nngeo.PMatEKFAC]
KINDS += [nngeo.PMatEKFACBlockDiag, nngeo.PMatLowRank, nngeo.PMatImplicit]


def of_small(outputs: Tensor) -> Tensor:
    """Its own gradient for each output, of batches of up to two examples; none of others."""
    b, o = outputs.shape
    return torch.eye(o).to(outputs)[:, None].expand(o, b, o)[: o if b <= 2 else 0]


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2)).double()


def product(model: nn.Module, kind: type, *batches: Tensor) -> Tensor:
    """F v."""
    return FIM(model, [(x,) for x in batches], kind, of_small).mv(nngeo.PVector.from_model(model)).to_torch()


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_without_cotangents_the_matrix_is_zero(kind, model):
    assert_close(product(model, kind, torch.randn(4, 3).double()), torch.zeros(14, dtype=torch.float64))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_examples_without_cotangents_count(kind, model):
    some, none = torch.randn(2, 3).double(), torch.randn(3, 3).double()
    found = product(model, kind, some, none)
    if kind in (nngeo.PMatKFAC, nngeo.PMatEKFAC, nngeo.PMatEKFACBlockDiag):  # their other factor is of all examples
        assert found.norm() > 0
    else:
        assert_close(found, product(model, kind, some) * 2 / 5)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_batch_of_which_every_position_is_left_out_has_no_gradients(kind):
    tokens, model = torch.arange(12).reshape(3, 4) % 5, nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5)).double()
    F = FIM(model, (tokens, torch.full((3, 4), -100)), kind, "token_logits", ignore_index=-100)
    v = nngeo.PVector.from_model(model)
    assert_close(F.mv(v).to_torch(), torch.zeros_like(v.to_torch()))
