"""The point of a ball that serves the worst-off row best: by its conditions, and in how many steps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from nngeo.descent.aggregation import CAGrad
from nngeo.linalg.maximin import maximin_weights
from tests.aggregators import matrix

CASES = ["not 4x3 rank 3", "not 9x11 rank 4", "not 20x100 rank 20", "normal 5x8 rank 5", "normal 20x100 rank 20"]


def problem(name: str, c: float) -> tuple[Tensor, Tensor, Tensor]:
    """A Gramian of trace 1, its products with the mean of the rows, and a radius of c times the length of that."""
    j = matrix(name) / matrix(name).norm()
    g = j @ j.T + 1e-12 * torch.eye(len(j), dtype=j.dtype)
    b = g.mean(0)
    return g, b, c * b.mean().sqrt()


@pytest.mark.parametrize("c", [0.1, 0.5, 1.0, 2.0], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_the_least_product_is_that_of_every_row_with_a_weight(name, c):
    g, b, radius = problem(name, c)
    p, error = maximin_weights(g, b, radius)
    y = g @ p + b
    assert (p >= 0).all() and error < 1e-10
    assert_close((p @ g @ p).sqrt(), radius, rtol=1e-10, atol=0)
    assert_close(y[p > 0], y.amin().expand_as(y[p > 0]), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("c", [0.1, 0.5, 1.0, 2.0], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_newtons_steps_need_no_more_than_a_dozen(name, c):
    """Halving the interval would take more than forty."""
    g, b, radius = problem(name, c)
    p, error = maximin_weights(g, b, radius, max_iter=12)
    assert error < 1e-10
    assert_close(p, maximin_weights(g, b, radius)[0], rtol=1e-12, atol=0)


def test_an_error_says_that_steps_were_too_few():
    _, error = maximin_weights(*problem("not 9x11 rank 4", 0.5), max_iter=1)
    assert error > 1e-3


@pytest.mark.parametrize("seed", range(10))
def test_per_example_losses_beyond_the_rank_are_served_in_single_precision(seed):
    """Zero is in the ball of c = 1."""
    j = matrix("normal 16x30 rank 3", seed, dtype=torch.float32)
    assert (j @ CAGrad(c=1.0)(j)).amin() >= -1e-6 * j.norm() ** 2
    assert not torch.equal(CAGrad(c=1.0)(j), j.mean(0))


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("name", ["not 9x40 rank 1", "not 16x5 rank 1", "not 24x200 rank 2"])
def test_the_worst_row_alone_may_have_the_weight(name, seed):
    """Then the first t is the right one, where p is as long as the radius but for rounding."""
    j = matrix(name, seed, dtype=torch.float32).double()
    j = j / j.norm()
    g = j @ j.T + 1e-12 * torch.eye(len(j), dtype=j.dtype)
    radius = 0.5 * g.mean().sqrt()
    p, error = maximin_weights(g, g.mean(0), radius)
    assert error < 1e-10
    assert_close((p @ g @ p).sqrt(), radius, rtol=1e-10, atol=0)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("c", [0.5, 1.0, 2.0], ids=str)
def test_gramians_that_come_in_single_precision_are_solved_to_their_rounding(c, seed):
    j = matrix("normal 6x30 rank 3", seed, dtype=torch.float32)
    j = j / j.norm()
    mean, found = j.mean(0), CAGrad(c).gramian_weighting(j @ j.T) @ j
    assert (found - mean).norm() <= (1 + 1e-3) * c * mean.norm() or not found.any()
    assert (j @ found).amin() >= min(float((j @ mean).amin()), 0.0) - 1e-3
