"""Few parameters, many outputs: gradients are taken column by column, and are what they are row by row."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import nngeo
from nngeo import FIM, Jacobian, PMatDiag, PMatImplicit, PMatKFAC, PVector
from nngeo.generators.columns import columns_pay
from nngeo.layers.collection import LayerCollection
from nngeo.variants import Exact, MonteCarlo, make_variant
from tests import reference

MATRICES = [nngeo.PMatDense, nngeo.PMatDiag, nngeo.PMatBlockDiag, nngeo.PMatLowRank, nngeo.PMatImplicit]
VARIANTS = ["regression", "segmentation_logits", "poisson_log_rate", "classif_binary_logits"]


def filtered(outputs: int, activation: type[nn.Module] = nn.Tanh) -> nn.Module:
    """Images (b, 1, 8, 8) to as many pixels in each of the outputs; 14 parameters where these are two."""
    torch.manual_seed(0)
    first, last = nn.Conv2d(1, 1, 3, padding=1), nn.Conv2d(1, outputs, 1)
    return nn.Sequential(first, activation(), last).double()


def images(n: int, size: int = 8) -> Tensor:
    return torch.randn(n, 1, size, size, generator=torch.Generator().manual_seed(n)).double()


@cache
def defined(variant: str) -> Tensor:
    """(P, P), the matrix of five images."""
    model, x = filtered(2), images(5)
    metrics = reference.metrics(model, (x, torch.zeros(5, 8, 8, dtype=torch.long)), variant)
    return reference.pulled_back(reference.jacobian(model, (x,)), metrics)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", MATRICES, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_matrices_by_columns_are_those_of_the_definition(kind, variant, dtype):
    model, x = filtered(2), images(5)
    layers, want = LayerCollection.from_model(model), defined(variant)
    assert columns_pay(layers, Exact(make_variant(variant))(model(x)))
    batches = [(part.to(dtype),) for part in (x[:1], x[1:3], x[3:])]
    F = FIM(model.to(dtype), batches, kind, variant=variant)
    tolerance = {"rtol": 1e-8, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 1e-3, "atol": 1e-3}
    assert_close(F.get_diag().double(), want.diagonal(), **tolerance)
    assert_close(F.trace().double(), want.trace(), **tolerance)
    v = PVector(layers, vector_repr=torch.randn(len(want)).to(dtype))
    if kind not in (nngeo.PMatDiag, nngeo.PMatBlockDiag):
        assert_close(F.mv(v).to_torch().double(), want @ v.to_torch().double(), **tolerance)
    if kind is nngeo.PMatBlockDiag:
        assert_close(F.to_torch().double(), reference.block_diagonal(want, reference.layer_slices(model)), **tolerance)


def test_draws_go_row_by_row_for_each_column_would_make_them_anew():
    model, x = filtered(2), images(5)
    draws = MonteCarlo(make_variant("segmentation_logits"), 400)(model(x))
    assert draws.count == 400
    assert not columns_pay(LayerCollection.from_model(model), draws)


def test_a_jacobian_by_columns_is_that_of_autograd():
    model, x = filtered(1), images(3)
    assert_close(Jacobian(model, x).to_torch(), reference.jacobian(model, (x,)))


@pytest.mark.parametrize("variant", [*VARIANTS, "token_logits", "classif_logits"])
@pytest.mark.parametrize("odd", ["usual", "certain", "impossible"])
def test_products_with_all_cotangents_are_those_one_by_one(variant, odd):
    shape = (3, 4) if variant == "classif_logits" else (3, 4, 2, 4)
    outputs = torch.randn(*shape).double() * (300 if odd == "certain" else 1)
    if odd == "impossible":
        classes = outputs.movedim(-1, 1) if variant == "token_logits" else outputs
        classes[:, 1::2] = -float("inf") if "logits" in variant and "binary" not in variant else -50.0
    c = Exact(make_variant(variant))(outputs)
    rows = torch.randn(5, *shape).double()
    want = torch.einsum("kbo,mbo->mkb", c.all().flatten(2), rows.flatten(2))
    assert_close(c.contracted(rows), want, rtol=1e-8, atol=1e-10)


def test_masked_positions_do_not_count_by_columns():
    model, x = filtered(2), images(4)
    mask = torch.rand(4, 8, 8) > 0.3
    F = FIM(model, (x, mask), PMatDiag, variant="segmentation_logits", mask=lambda batch: batch[1])
    kfac = FIM(model, (x, mask), nngeo.PMatEKFAC, variant="segmentation_logits", mask=lambda batch: batch[1])
    assert_close(F.trace(), kfac.trace())  # whose scalings are exact, and go by rows


def test_factors_are_there_where_they_are_asked_for():
    model, x = filtered(2), images(4)
    F = FIM(model, (x,), PMatKFAC, variant="regression")
    assert F.solve(PVector.from_model(model), regul=0.1).to_torch().isfinite().all()


class Once(torch.autograd.Function):
    """A square whose derivative has none."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 2 * g * x


class Squared(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Once.apply(x)


@pytest.mark.parametrize("kind", [PMatDiag, PMatImplicit], ids=lambda kind: kind.__name__)
def test_a_model_that_is_differentiable_once_goes_row_by_row(kind):
    model, x = filtered(1, Squared), images(3)
    want = reference.jacobian(model, (x,)).square().sum(0).mean(0)
    assert_close(FIM(model, (x,), kind, variant="regression").get_diag(), want)
