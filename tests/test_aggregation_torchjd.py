"""Every aggregator and weighting that torchjd 0.18 has gives what torchjd gives, or a better solution."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from nngeo.descent import aggregation
from tests.aggregators import BUILDERS, build, matrix, pairs, preference

torchjd = pytest.importorskip("torchjd.aggregation", reason="needs torchjd")

FULL = ["normal 2x3 rank 2", "normal 3x3 rank 3", "normal 3x8 rank 3", "normal 5x8 rank 5", "normal 8x20 rank 8"]
NOT_STATIONARY = ["not 4x3 rank 3", "not 9x11 rank 4"]
GRID = ["normal 1x3 rank 1", *FULL, "normal 4x3 rank 2", "normal 5x8 rank 2", "normal 9x11 rank 4", *NOT_STATIONARY]
NASH_FAILS = "normal 3x3 rank 3"
BY_SOLVERS = [name for name in BUILDERS if name.startswith(("cagrad", "nash", "fairgrad")) and name != "fairgrad_mean"]
SAME = [name for name in BUILDERS if name not in BY_SOLVERS]


def theirs(function: Any, statistic: Tensor) -> Tensor:
    """torchjd's result, without the warnings of its solvers about their accuracy."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(statistic)


def assert_same(found: Tensor, expected: Tensor) -> None:
    """To 1e-5 of the length."""
    assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.norm()) + 1e-14)


def results(ours: Any, upstream: Any, statistics: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Of one call after the other (calls, ...), with the same seed for both."""
    torch.manual_seed(0)
    found = torch.stack([ours(statistic) for statistic in statistics])
    torch.manual_seed(0)
    return found, torch.stack([theirs(upstream, statistic) for statistic in statistics])


SAME_PAIRS = pairs(SAME, GRID)


@pytest.mark.parametrize(("name", "j"), SAME_PAIRS, ids=[f"{name}-{j}" for name, j in SAME_PAIRS])
def test_three_calls_give_what_torchjd_gives(name, j):
    first = matrix(j)
    js = [first, first + 0.1 * first.roll(1, 1), 0.5 * first]
    assert_same(*results(build(name, len(first)), build(name, len(first), torchjd), js))


@pytest.mark.parametrize("j", GRID)
def test_regularisation_is_that_of_torchjd(j):
    projectors = pytest.importorskip("torchjd.linalg", reason="needs torchjd")
    matrices, options = [matrix(j), 1e-3 * matrix(j)], {"norm_eps": 1e-3, "reg_eps": 1e-2}
    u = preference(len(matrices[0]))
    ours = aggregation.UPGrad(u, **options)
    assert_same(*results(ours, torchjd.UPGrad(u, projectors.QuadprogProjector(**options)), matrices))


@pytest.mark.parametrize("j", GRID)
def test_quadprog_projector_gives_what_pivoting_gives(j):
    pytest.importorskip("quadprog", reason="needs quadprog")
    gramian = matrix(j) @ matrix(j).T
    u = torch.diag(preference(len(gramian)))
    assert_same(aggregation.PivotingProjector()(u, gramian), aggregation.QuadprogProjector()(u, gramian))


WEIGHTINGS = {
    "modo": lambda lib, m: lib.MoDoWeighting(gamma=0.3, rho=0.2),
    "sdmgrad": lambda lib, m: lib.SDMGradWeighting(),
    "sdmgrad_preference": lambda lib, m: lib.SDMGradWeighting(0.5, 0.2, 7, 0.6, preference(m)),
    "cr_mogm": lambda lib, m: lib.CRMOGMWeighting(lib.UPGradWeighting(), alpha=0.7),
    "cr_mogm_initial": lambda lib, m: lib.CRMOGMWeighting(lib.MeanWeighting(), initial_weights=preference(m)),
    "upgrad": lambda lib, m: lib.UPGradWeighting(),
    "imtl_g": lambda lib, m: lib.IMTLGWeighting(),
    "gradvac": lambda lib, m: lib.GradVacWeighting(),
    "pcgrad": lambda lib, m: lib.PCGradWeighting(),
    "pcd": lambda lib, m: lib.PCDWeighting(),
}
CROSS = ["modo", "sdmgrad", "sdmgrad_preference"]  # made for Gramians of two batches


@pytest.mark.parametrize("j", FULL + NOT_STATIONARY)
@pytest.mark.parametrize("name", WEIGHTINGS)
def test_weightings_give_what_those_of_torchjd_give(name, j):
    steps = [matrix(j, seed) for seed in range(4)]
    other = [x + 0.2 * x.roll(1, 1) if name in CROSS else x for x in steps]
    gramians = [x @ y.T for x, y in zip(steps, other, strict=True)]
    m = len(steps[0])
    assert_same(*results(WEIGHTINGS[name](aggregation, m), WEIGHTINGS[name](torchjd, m), gramians))


@pytest.mark.parametrize("j", FULL + NOT_STATIONARY)
@pytest.mark.parametrize("c", [0.5, 1.0, 2.0], ids=str)
def test_cagrad_serves_the_worst_off_loss_no_worse_than_torchjd(c, j):
    """CLARABEL stops at about 1e-4 of the minimum's place, as its objective is flat there: hence compared by value."""
    j = matrix(j)
    found, expected = results(aggregation.CAGrad(c), torchjd.CAGrad(c), [j])
    mean = j.mean(0)
    assert (found[0] - mean).norm() <= (1 + 1e-8) * c * mean.norm()
    assert (j @ found[0]).amin() >= (j @ expected[0]).amin() - 1e-9 * j.norm() ** 2
    # The place is off by the square root of the error of the value.
    assert_close(found, expected, rtol=0, atol=1e-3 * float(expected.norm()))


def imbalance(j: Tensor, w: Tensor, s: float) -> float:
    """How far the utilities `G w` are from `w^-s`, relative to them."""
    return float((w**s * (j @ j.T @ w) - 1).abs().amax())


@pytest.mark.parametrize("j", FULL + NOT_STATIONARY)
@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0], ids=str)
def test_fairgrad_solves_its_equation_as_torchjd_does(alpha, j):
    """Not on the whole grid: where some weights >= 0 cancel the gradients, the equation has no solution."""
    j = matrix(j)
    ours, upstream = aggregation.FairGrad(alpha).gramian_weighting, torchjd.FairGradWeighting(alpha)
    found, expected = results(ours, upstream, [j @ j.T])
    assert imbalance(j, found[0], 1 / alpha) < 1e-11
    assert_same(found, expected)


@pytest.mark.parametrize("max_norm", [0.0, 0.5], ids=str)
@pytest.mark.parametrize("j", [j for j in FULL + NOT_STATIONARY if j != NASH_FAILS])
def test_nash_mtl_gives_what_torchjd_gives(j, max_norm):
    j = matrix(j)
    ours, upstream = (lib.NashMTL(n_tasks=len(j), max_norm=max_norm) for lib in (aggregation, torchjd))
    assert_same(*results(ours, upstream, [j]))


@pytest.mark.parametrize("j", FULL + NOT_STATIONARY)
def test_nash_mtl_solves_its_equation_no_worse_than_torchjd(j):
    """On `NASH_FAILS` ECOS fails and torchjd keeps its start, weights of one: only the equation can be held there."""
    j = matrix(j)
    ours, upstream = (lib.NashMTL(n_tasks=len(j), max_norm=0.0).weighting for lib in (aggregation, torchjd))
    found, expected = results(ours, upstream, [j])
    assert imbalance(j, found[0], 1) < 1e-11
    assert imbalance(j, found[0], 1) <= imbalance(j, expected[0], 1)


@pytest.mark.parametrize("j", FULL + NOT_STATIONARY)
def test_nash_mtl_stays_within_max_norm(j):
    j = matrix(j)
    free = aggregation.NashMTL(n_tasks=len(j), max_norm=0.0)(j)
    assert_close(free.norm(), torch.tensor(float(len(j)), dtype=j.dtype).sqrt(), rtol=1e-8, atol=0)
    limited = aggregation.NashMTL(n_tasks=len(j), max_norm=0.5)(j)
    assert_close(limited, 0.5 * free / free.norm(), rtol=1e-8, atol=1e-12)
