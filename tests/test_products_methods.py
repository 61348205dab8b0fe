"""Approximations: random signs with their standard error, and diagonals kept between layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn
from torch.testing import assert_close

from nngeo.products import Diagonal, LowRankPlusDiagonal, Softmax, jmjTp, jTmjp
from tests import reference_products as reference
from tests.modules import mlp, modules
from tests.product_settings import OUTPUT_METRICS, Setting, draw, exact, setting, settings

# ------------------------------------------------------------------------------------------ random signs

IDS = ("mlp", "conv2d_groups", "layer_norm", "two_inputs")
some = pytest.mark.parametrize("at", settings(*IDS), ids=lambda at: at.id)
each_seed = pytest.mark.parametrize("seed", [0, 1, 2])
each_result = pytest.mark.parametrize("result", ["diag", "trace"])


def seeded(seed: int) -> Generator:
    return Generator().manual_seed(seed)


def estimate(at: Setting, metric: Any = None, samples: int = 10, seed: int = 0, **options: Any) -> Any:
    options = {"result": "diag", "wrt": at.wrt, "generator": seeded(seed), "samples": samples, **options}
    return jTmjp(at.model, at.x, metric, method="mc", **options)


@each_seed
@pytest.mark.parametrize("kind", [kind for kind in OUTPUT_METRICS if kind.factor], ids=lambda kind: kind.id)
@some
def test_random_signs_are_unbiased(at, kind, seed):
    metric, M = kind.make({"": at.J.shape[1]}, at.outputs)
    found = estimate(at, metric, 400, seed)
    truth = reference.backward(at.J, M).diagonal(dim1=1, dim2=2)
    assert ((found.value - truth).abs() <= 5 * found.standard_error + 1e-9).all()


@each_seed
@some
def test_a_trace_by_random_signs_is_unbiased(at, seed):
    found = estimate(at, None, 400, seed, result="trace")
    truth = at.J.square().sum((1, 2))
    assert ((found.value - truth).abs() <= 5 * found.standard_error + 1e-9).all()


@some
@each_seed
def test_random_signs_are_unbiased_forward(at, seed):
    n = at.J.shape[2]
    v, d = draw(n, 2), draw(n, seed=1).square()
    truth = reference.forward(at.J, v @ v.mT + d.diag()).diagonal(dim1=1, dim2=2)
    options = {"result": "diag", "method": "mc", "samples": 400, "generator": seeded(seed)}
    found = jmjTp(at.model, at.x, LowRankPlusDiagonal(v, d), at.wrt, **options)
    assert ((found.value - truth).abs() <= 5 * found.standard_error + 1e-9).all()


@pytest.mark.parametrize("at", settings("mlp", "layer_norm"), ids=lambda at: at.id)
@each_result
def test_the_standard_error_is_that_of_many_estimates(at, result):
    found = [estimate(at, None, 20, seed, result=result) for seed in range(150)]
    spread = torch.stack([each.value for each in found]).var(0)
    claimed = torch.stack([each.standard_error for each in found]).square().mean(0)
    moves = spread > 1e-12 * spread.max()
    ratio = claimed[moves] / spread[moves]
    assert 0.85 < ratio.mean() < 1.2
    assert ((0.4 < ratio) & (ratio < 2.5)).all()


@some
def test_random_signs_come_from_the_generator(at):
    first, same, other = estimate(at, seed=3), estimate(at, seed=3), estimate(at, seed=4)
    assert_close(first.value, same.value, rtol=0, atol=0)
    assert not torch.equal(first.value, other.value)


@some
@pytest.mark.parametrize("reduce", ["sum", "mean"])
def test_random_signs_of_a_batch_are_unbiased(at, reduce):
    truth = reference.backward(at.J, torch.eye(at.J.shape[1], dtype=at.J.dtype)).diagonal(dim1=1, dim2=2)
    truth = truth.sum(0) if reduce == "sum" else truth.mean(0)
    found = estimate(at, None, 400, reduce=reduce)
    assert found.value.shape == truth.shape
    assert ((found.value - truth).abs() <= 5 * found.standard_error + 1e-9).all()


def test_more_samples_are_more_precise():
    at = setting("mlp", "weight")
    few, many = (estimate(at, None, samples).standard_error.square().mean() for samples in (100, 1600))
    assert 8 < few / many < 32


def test_one_output_leaves_nothing_to_chance():
    at = setting("scalar_outputs", "weight")
    found = estimate(at, None, 3)
    exact((found.value, found.standard_error), (at.J[:, 0].square(), torch.zeros_like(found.standard_error)))


# ------------------------------------------------------------------------------------------ diagonals between layers

CHAINS = [module for module in modules("sequential") if not isinstance(module.inputs(), tuple)]
chains = pytest.mark.parametrize("at", settings(*(chain.id for chain in CHAINS)), ids=lambda at: at.id)


def diagonal_backprop(at: Setting, metric: Any = None, **options: Any) -> Tensor:
    return jTmjp(at.model, at.x, metric, at.wrt, result="diag", method="diag_backprop", **options)


def truth(at: Setting, M: Tensor) -> Tensor:
    return reference.backward(at.J, M).diagonal(dim1=1, dim2=2)


@chains
def test_diag_backprop_is_its_recursion(at):
    d = draw(3, at.J.shape[1]).square()
    exact(diagonal_backprop(at, Diagonal(d)), reference.diagonals_backward(at.model, at.x, d, at.wrt))


@chains
def test_diag_backprop_forward_is_its_recursion(at):
    d = draw(3, at.J.shape[2]).square()
    found = jmjTp(at.model, at.x, Diagonal(d), at.wrt, result="diag", method="diag_backprop")
    exact(found, reference.diagonals_forward(at.model, at.x, d, at.wrt))


@chains
def test_diag_backprop_of_the_identity_starts_with_ones(at):
    ones = torch.ones(3, at.J.shape[1], dtype=at.J.dtype)
    exact(diagonal_backprop(at), reference.diagonals_backward(at.model, at.x, ones, at.wrt))


LONE = [
    at
    for at in settings(*(chain.id for chain in CHAINS))
    if not isinstance(at.module.build(), nn.Sequential) and at.wrt in ("input", "weight")
]


@pytest.mark.parametrize("at", LONE, ids=lambda at: at.id)
def test_diag_backprop_is_exact_for_one_layer(at):
    d = draw(3, at.J.shape[1]).square()
    exact(diagonal_backprop(at, Diagonal(d)), truth(at, d.diag_embed()))


def deep() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return mlp(3, 4, 5, 4, 2).double(), draw(3, 3)


def test_diag_backprop_is_exact_for_the_last_two_linear_layers_only():
    model, x = deep()
    J = reference.jacobian(model, x, "weight")
    d = draw(3, 2).square()
    full = reference.backward(J, d.diag_embed()).diagonal(dim1=1, dim2=2)
    found = jTmjp(model, x, Diagonal(d), "weight", result="diag", method="diag_backprop")
    last = sum(p.numel() for p in [*model[4].parameters(), *model[6].parameters()])
    exact(found[:, -last:], full[:, -last:])
    assert (found[:, :-last] - full[:, :-last]).norm() > 1e-3 * full[:, :-last].norm()


@pytest.mark.parametrize("reduce", ["sum", "mean"])
@pytest.mark.parametrize("wrt", ["input", "weight"])
def test_diag_backprop_of_a_batch(wrt, reduce):
    at = setting("lenet", wrt)
    d = draw(3, at.J.shape[1]).square()
    each = reference.diagonals_backward(at.model, at.x, d, wrt)
    exact(diagonal_backprop(at, Diagonal(d), reduce=reduce), each.sum(0) if reduce == "sum" else each.mean(0))


def test_diag_backprop_differs_from_the_truth_where_layers_mix():
    at = setting("lenet", "weight")
    full = truth(at, torch.eye(3, dtype=at.J.dtype))
    assert (diagonal_backprop(at) - full).norm() > 1e-3 * full.norm()


def test_diag_backprop_starts_with_a_diagonal_only():
    with pytest.raises(ValueError, match="Diagonal"):
        diagonal_backprop(setting("mlp", "weight"), Softmax(draw(3, 2)))


@pytest.mark.parametrize("result", ["dense", "factor", "trace"])
def test_diag_backprop_has_only_a_diagonal(result):
    at = setting("mlp", "weight")
    with pytest.raises(ValueError, match="diag"):
        jTmjp(at.model, at.x, None, "weight", result=result, method="diag_backprop")
