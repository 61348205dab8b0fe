"""What the papers promise of each aggregator, on Jacobians of every rank, shape, scale and stationarity."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from nngeo.descent.aggregation import CRMOGM, MeanWeighting
from nngeo.linalg.simplex import project_onto_simplex
from tests.aggregators import EVERY, FEWEST, MATRICES, NOT, RANKS, SAMPLERS, STATIONARY, WEAK, build, matrix, pairs

SCALES = [(torch.float64, 1e-10), (torch.float32, 1e15)]
GRAPHS = ["aligned_mtl", "constant", "krum", "mean", "mgda", "random", "sum", "trimmed_mean"]
NO_GRAPHS = [name for name in EVERY if not name.startswith((*GRAPHS, "cr_mogm"))]


def unit(name: str, seed: int = 0) -> Tensor:
    """The Jacobian of this name with Frobenius norm 1, or zero."""
    j = matrix(name, seed)
    return j / j.norm() if j.any() else j


def aggregated(name: str, j: Tensor) -> Tensor:
    """By a new aggregator, random ones with one seed."""
    torch.manual_seed(0)
    return build(name, len(j))(j)


def has_right_structure(name: str, j: Tensor) -> bool:
    """In the first call and, with what the aggregator remembers, in the next."""
    a = build(name, len(j))
    first, second = a(j), a(j)
    return first.shape == second.shape == j.shape[1:] and bool((first.isfinite() & second.isfinite()).all())


@pytest.mark.parametrize(("dtype", "scale"), SCALES, ids=[f"{str(d)[6:]}-{s:g}" for d, s in SCALES])
@pytest.mark.parametrize("name", EVERY)
def test_every_jacobian_gives_a_finite_vector(name, dtype, scale):
    torch.manual_seed(0)
    assert [j for _, j in pairs([name], MATRICES) if not has_right_structure(name, (scale * matrix(j)).to(dtype))] == []


@pytest.mark.parametrize("name", EVERY)
def test_zero_gives_zero(name):
    assert not aggregated(name, torch.zeros(max(FEWEST.get(name, 1), 4), 3, dtype=torch.float64)).any()


@pytest.mark.parametrize("name", EVERY)
def test_dtype_and_input_stay(name):
    j = matrix("normal 5x8 rank 3", dtype=torch.float32)
    before = j.clone()
    assert aggregated(name, j).dtype == torch.float32
    assert torch.equal(j, before)


# The default ridge of 1e-4 of UPGrad and DualProj, and the inexact minimum of MGDA, go against some rows a little.
# Without a ridge there is only rounding; CAGrad's is that of the square root of its ridge of 1e-12.
CONFLICTS = {
    "upgrad": 4e-4,
    "dualproj": 4e-4,
    "mgda": 4e-4,
    "cagrad": 1e-5,
    "cagrad_two": 1e-5,
    "upgrad_exact": 1e-13,
    "upgrad_strict": 1e-13,
    "dualproj_strict": 1e-13,
}


@pytest.mark.parametrize("j", MATRICES)
@pytest.mark.parametrize("name", CONFLICTS)
def test_no_loss_is_made_worse(name, j):
    j = unit(j)
    assert (j @ aggregated(name, j)).amin() >= -CONFLICTS[name]


STRICT = [(m, n, r) for m, n in [(2, 3), (4, 3), (7, 9), (12, 20)] for r in range(1, min(m, n) + 1, 1 + m // 5)]


def worst_cosine(a: str, j: Tensor) -> float:
    """The least product of a row with the result, both relative to the lengths of the rows."""
    lengths = j.norm(dim=1)
    j, lengths = j[lengths > 0], lengths[lengths > 0]
    return float(((j @ aggregated(a, j)) / lengths / lengths.mean()).amin())


@pytest.mark.parametrize("kind", SAMPLERS)
@pytest.mark.parametrize(("m", "n", "rank"), STRICT, ids=[f"{m}x{n}-rank{r}" for m, n, r in STRICT])
def test_strict_makes_no_loss_worse_in_1000_draws(kind, m, n, rank):
    draws = [matrix(f"{kind} {m}x{n} rank {rank}", seed) for seed in range(20)]
    assert len(draws) * len(SAMPLERS) * len(STRICT) >= 1000
    assert min(worst_cosine("upgrad_strict", j) for j in draws) >= -1e-13
    # A Gramian in single precision is known to rounding only, and lengths are its square roots.
    assert min(worst_cosine("upgrad_strict", j.float()) for j in draws) >= -2 * torch.finfo(torch.float32).eps ** 0.5


INVARIANT = ["upgrad", "upgrad_strict", "upgrad_exact", "dualproj", "dualproj_strict", "mgda", "aligned_mtl"]
INVARIANT += ["aligned_mtl_median", "aligned_mtl_rmse", "config", "imtl_g", "mean", "sum", "trimmed_mean"]
INVARIANT += ["fairgrad_mean", "excess_mtl", "cr_mogm", "modo"]


@pytest.mark.parametrize("j", MATRICES[::3])
@pytest.mark.parametrize("name", INVARIANT)
def test_order_of_objectives_does_not_matter(name, j):
    j = unit(j)
    order = torch.randperm(len(j), generator=torch.Generator().manual_seed(1))
    # Inverses of small eigenvalues amplify rounding, by up to 1e4 here.
    assert_close(aggregated(name, j[order]), aggregated(name, j), rtol=1e-8, atol=1e-10)


# The ridge of the default UPGrad is of one size for all rows, and bends it where rows differ in length.
LINEAR = {"upgrad": 6e-2, "upgrad_exact": 1e-10, "upgrad_strict": 1e-10, "config": 1e-10}
LINEAR |= {"mean": 1e-14, "sum": 1e-14, "constant": 1e-14, "pcgrad": 1e-10}


@pytest.mark.parametrize("j", RANKS[1::2] + NOT)
@pytest.mark.parametrize("name", LINEAR)
def test_results_are_linear_in_the_lengths_of_gradients(name, j):
    j = unit(j)
    c, d = torch.rand(2, len(j), 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = aggregated(name, (0.7 * c + 0.4 * d) * j)
    expected = 0.7 * aggregated(name, c * j) + 0.4 * aggregated(name, d * j)
    assert_close(found, expected, rtol=0, atol=LINEAR[name])


NEVER_ZERO = [
    "upgrad",
    "upgrad_exact",
    "upgrad_strict",
    "dualproj",
    "dualproj_strict",
    "mean",
    "sum",
    "constant",
    "random",
]


@pytest.mark.parametrize("j", WEAK + NOT)
@pytest.mark.parametrize("name", NEVER_ZERO)
def test_results_are_zero_only_where_positive_weights_cancel(name, j):
    assert aggregated(name, unit(j)).norm() > 5e-3


@pytest.mark.parametrize("j", STATIONARY)
@pytest.mark.parametrize("name", ["upgrad_exact", "upgrad_strict", "dualproj_strict"])
def test_exact_projections_are_zero_where_positive_weights_cancel(name, j):
    assert aggregated(name, unit(j)).norm() < 1e-13


@pytest.mark.parametrize("name", NO_GRAPHS)
def test_no_graph_is_kept(name):
    assert not aggregated(name, matrix("normal 5x8 rank 5").requires_grad_()).requires_grad


@pytest.mark.parametrize("name", GRAPHS)
def test_graphs_go_through_weights_and_rows(name):
    j = matrix("normal 5x8 rank 5")
    direction = torch.randn(5, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    (gradient,) = torch.autograd.grad(aggregated(name, j.requires_grad_()).square().sum(), j)
    h = 1e-6
    ends = [aggregated(name, (j + step * direction).detach()).square().sum() for step in (h, -h)]
    assert_close((gradient * direction).sum(), (ends[0] - ends[1]) / (2 * h), rtol=1e-5, atol=1e-7)


def test_smoothed_weights_keep_the_graph_of_their_own():
    assert CRMOGM(MeanWeighting())(matrix("normal 5x8 rank 5").requires_grad_()).requires_grad


@pytest.mark.parametrize("shift", [-1e30, -1e3, 0.0, 1e30], ids=str)
def test_simplex_projection_of_any_size_is_on_the_simplex(shift):
    x = project_onto_simplex(torch.tensor([0.2, 0.3, -1.0], dtype=torch.float64) + shift)
    assert_close(x.sum(), torch.tensor(1.0, dtype=torch.float64))
    assert (x >= 0).all()


def test_config_has_no_direction_between_opposite_gradients():
    j = torch.tensor([[0.7], [-0.3]], dtype=torch.float64)
    assert not aggregated("config", j).any() and not aggregated("config", j.flip(0)).any()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", ["cagrad", "cagrad_two"])
@pytest.mark.parametrize("j", WEAK)
def test_cagrad_is_zero_where_weights_cancel_in_any_order(name, j, seed):
    """The worst-off loss cannot gain there, and zero is in the ball."""
    j = unit(j)
    order = torch.randperm(len(j), generator=torch.Generator().manual_seed(seed))
    assert not aggregated(name, j[order]).any()


@pytest.mark.parametrize("seed", range(4))
def test_cagrad_does_not_depend_on_the_order_near_stationary_points(seed):
    """A case in which some orders of the objectives once were left unsolved."""
    j = unit("normal 20x100 rank 10", 1)
    order = torch.randperm(len(j), generator=torch.Generator().manual_seed(seed))
    assert_close(aggregated("cagrad_half", j[order]), aggregated("cagrad_half", j), rtol=0, atol=1e-5)
