"""Projections onto the simplex, by trying every support."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from nngeo.linalg.simplex import project_onto_simplex


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def nearest_in_simplex(x: Tensor) -> Tensor:
    """By trying every support: on it the projection subtracts one number."""
    m, best = len(x), None
    for support in itertools.product([False, True], repeat=m):
        at = torch.tensor(support)
        if not at.any():
            continue
        point = torch.where(at, x - (x[at].sum() - 1) / at.sum(), 0)
        if (point >= 0).all() and (best is None or (point - x).norm() < (best - x).norm()):
            best = point
    return best


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e4])
@pytest.mark.parametrize("m", range(1, 8))
def test_simplex_projections_are_the_nearest_of_all_supports(m, scale):
    x = scale * normal(m, seed=m)
    assert_close(project_onto_simplex(x), nearest_in_simplex(x), rtol=1e-10, atol=1e-10)


def test_simplex_projections_are_row_by_row():
    x = normal(2, 3, 5)
    expected = torch.stack([nearest_in_simplex(row) for row in x.reshape(-1, 5)]).reshape(x.shape)
    assert_close(project_onto_simplex(x), expected)


@pytest.mark.parametrize("x", [[0.2, 0.3, 0.5], [1.0, 0.0, 0.0]], ids=["inside", "vertex"])
def test_points_of_the_simplex_stay(x):
    x = torch.tensor(x, dtype=torch.float64)
    assert_close(project_onto_simplex(x), x)


def test_equal_entries_stay_equal():
    assert_close(project_onto_simplex(torch.full((4,), 7.0)), torch.full((4,), 0.25))
