"""Projections onto dual cones, by their conditions, other solvers, invariances, and what is refused."""

from __future__ import annotations

import pytest
import torch
from scipy.optimize import nnls
from torch import Tensor
from torch.testing import assert_close

from nngeo.descent.aggregation import (
    DualProj,
    PivotingProjector,
    QuadprogProjector,
    UPGrad,
)
from nngeo.linalg import complementarity, dualcone
from nngeo.linalg.dualcone import dual_cone_weights, semidefinite_dual_cone_weights

SIZES = (1, 2, 3, 8, 20, 33, 64)
SCALES = (1e-10, 1e-3, 1.0, 1e3, 1e15)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def of_rank(m: int, rank: int, seed: int = 0) -> Tensor:
    """A Jacobian (m, m + 2) of that rank."""
    return normal(m, rank, seed=seed) @ normal(rank, m + 2, seed=seed + 1)


def duplicated(seed: int = 0) -> Tensor:
    rows = normal(6, 4, seed=seed)
    return torch.cat([rows, rows, rows[:2]])


def opposite(seed: int = 0) -> Tensor:
    rows = normal(5, 9, seed=seed)
    return torch.cat([rows, -2 * rows[:2]])


def with_zero_rows(seed: int = 0) -> Tensor:
    rows = normal(7, 3, seed=seed)
    rows[[0, 4]] = 0
    return rows


def unlike_scales(seed: int = 0) -> Tensor:
    return normal(12, 6, seed=seed) * torch.logspace(-8, 8, 12, dtype=torch.float64)[:, None]


def near_singular(seed: int = 0) -> Tensor:
    return normal(10, 4, seed=seed) @ normal(4, 20, seed=seed + 1) + 1e-7 * normal(10, 20, seed=seed + 2)


def nearly_one_direction(seed: int = 0) -> Tensor:
    return torch.ones(30, 40, dtype=torch.float64) + 1e-3 * normal(30, 40, seed=seed)


JACOBIANS = {
    "duplicated": duplicated,
    "opposite": opposite,
    "zero_rows": with_zero_rows,
    "zero": lambda seed=0: torch.zeros(5, 3, dtype=torch.float64),
    "diagonal": lambda seed=0: torch.diag(normal(9, seed=seed)),
    "unlike_scales": unlike_scales,
    "near_singular": near_singular,
    "nearly_one_direction": nearly_one_direction,
    "one_column": lambda seed=0: normal(16, 1, seed=seed),
    "stationary": lambda seed=0: torch.cat([normal(8, 5, seed=seed), -normal(8, 5, seed=seed).sum(0)[None]]),
}
named = pytest.mark.parametrize("jacobian", JACOBIANS.values(), ids=JACOBIANS)
seeds = pytest.mark.parametrize("seed", range(3))


def definite(m: int, seed: int = 0) -> Tensor:
    jacobian = normal(m, m + 2, seed=seed) + 0.3 * normal(m + 2, seed=seed + 1)
    return jacobian @ jacobian.T


def assert_projects(w: Tensor, u: Tensor, g: Tensor, tolerance: float = 1e-10) -> None:
    """w >= u, G w >= 0 and (w - u)'G w = 0, for rows w, u; beyond rounding of the sums that these come from."""
    norms = g.diagonal().sqrt()
    size = ((w.abs() + u.abs()) @ norms)[:, None]
    assert torch.isfinite(w).all()
    assert ((w - u) >= -1e-15 * u.abs()).all()
    products = w @ g
    assert (products >= -tolerance * size * norms).all()
    assert (((w - u) * products).sum(1).abs() <= tolerance * size[:, 0] ** 2).all()


# ---------------------------------------------------------------------------------------- conditions of optimality


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(("m", "rank"), [(m, r) for m in SIZES for r in sorted({1, (m + 1) // 2, m - 1, m} - {0})])
def test_projections_meet_their_conditions_at_every_rank_and_scale(m, rank, scale):
    jacobian = scale * of_rank(m, rank, seed=m + rank)
    g, u = jacobian @ jacobian.T, torch.cat([torch.eye(m, dtype=torch.float64), normal(3, m, seed=m)])
    assert_projects(PivotingProjector(reg_eps=0)(u, g), u, g)


@seeds
@named
def test_projections_meet_their_conditions_on_degenerate_gramians(jacobian, seed):
    rows = jacobian(seed=seed)
    m, g = len(rows), rows @ rows.T
    u = torch.cat([torch.eye(m, dtype=torch.float64), normal(3, m, seed=seed)])
    assert_projects(PivotingProjector(reg_eps=0)(u, g), u, g)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("m", SIZES)
def test_definite_projections_meet_their_conditions(m, scale):
    g, u = scale**2 * definite(m, seed=m), normal(5, m, seed=m)
    assert_projects(dual_cone_weights(u, g), u, g, 1e-12)


@named
def test_a_projection_is_the_nearest_point_of_the_cone(jacobian):
    rows = jacobian()
    u = normal(1, len(rows), seed=4)
    target = (u @ rows)[0]
    found = (PivotingProjector(reg_eps=0)(u, rows @ rows.T) @ rows)[0]
    # The cone {d: J d >= 0} has the polar {-J'z: z >= 0}; what the projection removes is the nearest point there.
    lengths = torch.where(rows.norm(dim=1) > 0, rows.norm(dim=1), 1)[:, None]
    z, distance = nnls((rows / lengths).T.numpy(), -target.numpy(), maxiter=1000)
    size = float(target.norm() + 1e-300)
    assert abs(float(found.norm()) - distance) <= 1e-5 * size
    assert_close(found / size, (target + torch.from_numpy(z) @ (rows / lengths)) / size, rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------------------- other solvers


@pytest.mark.parametrize("reg_eps", [1e-4, 1e-6])
@pytest.mark.parametrize(("m", "rank"), [(m, r) for m in SIZES for r in sorted({1, (m + 1) // 2, m})])
def test_weights_equal_those_of_quadprog(m, rank, reg_eps):
    pytest.importorskip("quadprog", reason="compares with quadprog, of the extra of that name")
    rows = of_rank(m, rank, seed=m)
    u, g = torch.cat([torch.eye(m, dtype=torch.float64), normal(3, m, seed=m)]), rows @ rows.T
    found, expected = (P(reg_eps=reg_eps)(u, g) for P in (PivotingProjector, QuadprogProjector))
    assert_close(found, expected, rtol=1e-6, atol=1e-7 * float(expected.abs().max()))


@named
def test_weights_of_degenerate_gramians_equal_those_of_quadprog(jacobian):
    pytest.importorskip("quadprog", reason="compares with quadprog, of the extra of that name")
    rows = jacobian()
    u, g = torch.eye(len(rows), dtype=torch.float64), rows @ rows.T
    assert_close(PivotingProjector()(u, g), QuadprogProjector()(u, g), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("m", SIZES)
def test_definite_projections_equal_non_negative_least_squares(m):
    g, u = definite(m, seed=m), normal(4, m, seed=m)
    factor = torch.linalg.cholesky(g).T
    z = [torch.from_numpy(nnls(factor.numpy(), -(factor @ row).numpy(), maxiter=100 * m)[0]) for row in u]
    assert_close(dual_cone_weights(u, g), u + torch.stack(z), rtol=1e-8, atol=1e-9)


def test_two_rows_have_a_closed_form():
    g = torch.tensor([[18.0, -22.0], [-22.0, 38.0]], dtype=torch.float64)
    found = PivotingProjector(reg_eps=0)(torch.eye(2, dtype=torch.float64), g)
    assert_close(found, torch.tensor([[1, 22 / 38], [22 / 18, 1]], dtype=torch.float64))


def test_without_conflict_nothing_changes():
    g, u = normal(6, 6).square() @ normal(6, 6).square().T, normal(4, 6).abs()
    assert_close(PivotingProjector()(u, g), u, rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------- invariances


@pytest.mark.parametrize("scale", [1e-20, 1e-3, 1e7, 1e30])
@pytest.mark.parametrize("strict", [False, True])
def test_weights_do_not_depend_on_the_scale_of_the_gramian(scale, strict):
    g, u = definite(9), torch.eye(9, dtype=torch.float64)
    projector = PivotingProjector(reg_eps=0, strict=strict)
    assert_close(projector(u, scale * g), projector(u, g), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("projector", [PivotingProjector(), PivotingProjector(strict=True)], ids=["regular", "strict"])
def test_projections_are_homogeneous_in_the_right_hand_side(projector):
    g, u = definite(9), normal(4, 9)
    assert_close(projector(1e5 * u, g), 1e5 * projector(u, g))


@seeds
def test_projections_commute_with_permutations(seed):
    g, u = definite(20, seed=seed), normal(4, 20, seed=seed)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(seed))
    projector = PivotingProjector()
    assert_close(projector(u[:, order], g[order][:, order]), projector(u, g)[:, order], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("strict", [False, True])
def test_the_length_of_a_row_does_not_change_the_exact_cone(strict):
    g, u = definite(9), normal(4, 9)
    d = torch.logspace(-6, 6, 9, dtype=torch.float64)
    projector = PivotingProjector(reg_eps=0, strict=strict)
    assert_close(projector(u / d, g * d * d[:, None]) * d, projector(u, g), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("projector", [PivotingProjector(), PivotingProjector(strict=True)], ids=["regular", "strict"])
@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 3), (2, 1, 4), (0,)])
def test_right_hand_sides_have_any_leading_shape(shape, projector):
    g, u = definite(7), normal(*shape, 7)
    found = projector(u, g)
    assert found.shape == (*shape, 7)
    one_by_one = [projector(row, g) for row in u.reshape(-1, 7)]
    assert_close(found.reshape(-1, 7), torch.stack(one_by_one) if one_by_one else found)


@pytest.mark.parametrize("projector", [PivotingProjector(), PivotingProjector(strict=True)], ids=["regular", "strict"])
@pytest.mark.parametrize("u_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("g_dtype", [torch.float32, torch.float64])
def test_results_have_the_dtype_and_device_of_the_gramian(g_dtype, u_dtype, projector):
    g, u = definite(12), normal(3, 12)
    found = projector(u.to(u_dtype), g.to(g_dtype))
    assert (found.dtype, found.device) == (g_dtype, g.device)
    assert_close(found.double(), projector(u, g), rtol=1e-3, atol=1e-4)


def test_projections_leave_their_arguments_alone():
    g, u = definite(12), normal(3, 12)
    copies = g.clone(), u.clone()
    PivotingProjector()(u, g), PivotingProjector(strict=True)(u, g)
    assert_close((g, u), copies, rtol=0, atol=0)


def test_projections_have_no_graph():
    g, u = definite(4).requires_grad_(), normal(3, 4).requires_grad_()
    assert not PivotingProjector()(u, g).requires_grad


# ------------------------------------------------------------------------------------------------- strictness


@seeds
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [1, 3, 7, 12])
@pytest.mark.parametrize("aggregator", [UPGrad, DualProj], ids=lambda kind: kind.__name__)
def test_strict_results_go_against_no_row(aggregator, rank, dtype, seed):
    rows = of_rank(12, rank, seed=10 * seed).to(dtype)
    found = aggregator(strict=True)(rows)
    cosines = rows @ found / (rows.norm(dim=1) * found.norm().clamp(min=torch.finfo(dtype).tiny))
    assert cosines.min() >= -20 * torch.finfo(dtype).eps ** 0.5


@seeds
def test_strict_weights_are_zero_where_the_exact_projection_is(seed):
    rows = of_rank(12, 2, seed=seed)  # in the plane twelve directions leave no dual cone but {0}
    weights = semidefinite_dual_cone_weights(torch.eye(12, dtype=torch.float64), rows @ rows.T, strict=True)
    angles = torch.atan2(*torch.linalg.svd(rows).U[:, :2].T).sort().values
    gaps = torch.diff(angles, append=angles[:1] + 2 * torch.pi)
    assert bool((weights == 0).all()) == bool((gaps < torch.pi).all())


def test_weights_of_zero_rows_stay():
    rows = with_zero_rows()
    u = normal(4, len(rows))
    found = PivotingProjector(strict=True)(u, rows @ rows.T)
    assert_close(found[:, [0, 4]], u[:, [0, 4]], rtol=0, atol=0)


# --------------------------------------------------------------------------------------------------- when it fails


@pytest.fixture
def no_pivoting(monkeypatch):
    """Pivoting that finds nothing."""
    monkeypatch.setattr(dualcone, "complementary_solutions", lambda m, q, *_: (torch.zeros_like(q), q[:, 0] > 9))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("m", [2, 9, 20])
def test_rows_that_pivoting_leaves_wrong_are_solved_by_active_sets(m, strict, no_pivoting):
    g, u = definite(m, seed=m), torch.cat([torch.eye(m, dtype=torch.float64), normal(3, m, seed=m)])
    solve = dual_cone_weights if not strict else lambda u, g: semidefinite_dual_cone_weights(u, g, strict=True)
    assert_projects(solve(u, g), u, g)


def test_an_active_set_method_that_gives_up_is_reported(no_pivoting, monkeypatch):
    def gives_up(*_, **__):
        raise RuntimeError("Maximum number of iterations reached.")

    monkeypatch.setattr(complementarity, "nnls", gives_up)
    with pytest.raises(ArithmeticError, match="did not converge"):
        dual_cone_weights(torch.eye(4), definite(4))


# ------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize("shape", [(3,), (3, 4), (2, 3, 3)])
def test_a_gramian_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match="G should be a Gramian"):
        PivotingProjector()(torch.ones(3), torch.ones(shape))


@pytest.mark.parametrize("shape", [(), (2,), (3, 4)])
def test_right_hand_sides_of_another_length_are_refused(shape):
    with pytest.raises(ValueError, match=r"U should be \(..., 3\)"):
        PivotingProjector()(torch.ones(shape), torch.eye(3))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_gramians_that_are_not_finite_are_refused_by_row(value):
    g = torch.eye(3)
    g[1, 1] = value
    with pytest.raises(ValueError, match=r"G has NaN or infinite entries in the rows \[1\]"):
        PivotingProjector()(torch.ones(3), g)


@pytest.mark.parametrize("options", [{"reg_eps": -1}, {"norm_eps": -1e-9}, {"reg_eps": float("nan")}])
def test_negative_epsilons_are_refused(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} should be at least 0"):
        PivotingProjector(**options)


def test_strict_is_a_boolean():
    with pytest.raises(TypeError, match="strict should be True or False"):
        PivotingProjector(strict="yes")


@pytest.mark.parametrize("g", [[[1.0, -5.0], [-5.0, 1.0]], [[0.0, 0.0], [0.0, 1.0]]], ids=["indefinite", "singular"])
def test_a_matrix_that_is_not_definite_is_reported(g):
    with pytest.raises(ArithmeticError, match="reg_eps"):
        dual_cone_weights(torch.tensor([[1.0, -1.0]]), torch.tensor(g))
