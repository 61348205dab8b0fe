"""Weights with `G w = w^-s`, and those of Nash-MTL and FairGrad, by this equation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from nngeo.descent.aggregation import FairGradWeighting, NashMTLWeighting
from nngeo.linalg.balance import balanced_weights


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def definite(m: int, seed: int = 0) -> Tensor:
    jacobian = normal(m, m + 2, seed=seed) + 0.3 * normal(m + 2, seed=seed + 1)
    return jacobian @ jacobian.T


@pytest.mark.parametrize("scale", [1e-10, 1.0, 1e15])
@pytest.mark.parametrize("s", [0.2, 0.5, 1.0, 2.0, 10.0])
@pytest.mark.parametrize("m", [1, 2, 7, 30])
def test_balanced_weights_meet_their_equation(m, s, scale):
    g = scale**2 * definite(m, seed=m)
    w = balanced_weights(g, s)
    assert (w > 0).all()
    assert_close(g @ w * w**s, torch.ones_like(w), rtol=1e-8, atol=1e-8)


def test_balanced_weights_of_rows_of_unlike_lengths_meet_their_equation():
    rows = normal(6, 9) * torch.logspace(-4, 4, 6, dtype=torch.float64)[:, None]
    g = rows @ rows.T
    w = balanced_weights(g, 1)
    assert_close(g @ w * w, torch.ones_like(w), rtol=1e-8, atol=1e-8)


def test_orthogonal_rows_are_balanced_in_closed_form():
    squares = torch.tensor([1e-6, 1.0, 4.0, 1e8], dtype=torch.float64)
    assert_close(balanced_weights(squares.diag(), 0.5), squares ** (-1 / 1.5))


@pytest.mark.parametrize("rank", [1, 3])
def test_balanced_weights_of_singular_gramians_meet_their_equation_where_solvable(rank):
    rows = normal(6, rank).abs() @ normal(rank, 9, seed=1).abs()  # no conflict: a solution exists
    g = rows @ rows.T
    w = balanced_weights(g, 1)
    assert_close(g @ w * w, torch.ones_like(w), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("s", [0.5, 1.0, 2.0])
def test_balanced_weights_are_zero_where_some_weights_cancel_the_rows(s, dtype):
    rows = torch.cat([normal(3, 5), -normal(3, 5).sum(0)[None]]).to(dtype).double()
    assert not balanced_weights(rows @ rows.T, s).any()


def test_too_few_steps_are_reported():
    with pytest.raises(ArithmeticError, match="not found in 1 steps"):
        balanced_weights(definite(7), 1, max_iter=1)


def test_rows_of_zeros_are_balanced_by_one():
    g = torch.diag(torch.tensor([4.0, 0.0, 1.0], dtype=torch.float64))
    assert_close(balanced_weights(g, 1), torch.tensor([0.5, 1, 1], dtype=torch.float64))


def test_balanced_weights_are_the_minimum_of_their_potential():
    g = definite(5)
    w = balanced_weights(g, 1)

    def potential(x: Tensor) -> float:
        return float(x @ g @ x / 2 - x.log().sum())

    around = [w * torch.exp(1e-2 * normal(5, seed=seed)) for seed in range(20)]
    assert potential(w) < np.min([potential(x) for x in around])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("m", [2, 9])
def test_nash_weights_meet_their_first_order_condition(m, dtype):
    g = definite(m, seed=m).to(dtype)
    a = NashMTLWeighting(n_tasks=m, max_norm=0)(g)
    assert_close(g @ a * a, torch.ones_like(a), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("max_norm", [0.1, 1.0])
def test_nash_weights_are_scaled_down_to_the_largest_norm(max_norm):
    g = definite(9)
    free, a = (NashMTLWeighting(n_tasks=9, max_norm=limit)(g) for limit in (0, max_norm))
    assert_close(a, free * max_norm / 3)  # |J'a|^2 = a'Ga = m where G a = 1/a


@pytest.mark.parametrize("alpha", [0.1, 0.5, 1.0, 2.0, 10.0])
def test_fair_weights_meet_their_first_order_condition(alpha):
    g = definite(9)
    w = FairGradWeighting(alpha=alpha)(g)
    assert_close(g @ w, w ** (-1 / alpha), rtol=1e-8, atol=1e-8)
