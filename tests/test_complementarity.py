"""Linear complementarity problems by their conditions, from any start, and where plain pivoting would cycle."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from nngeo.linalg import complementarity
from nngeo.linalg.complementarity import MASKED, active_set_solutions, complementary_solutions
from nngeo.linalg.pivoting import pivoted

CYCLES = {5: 7862, 8: 14921}  # sizes and seeds of problems on which pivoting cycles, found by search
seeds = pytest.mark.parametrize("seed", range(3))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def definite(m: int, seed: int = 0) -> Tensor:
    jacobian = normal(m, m + 2, seed=seed) + 0.3 * normal(m + 2, seed=seed + 1)
    return jacobian @ jacobian.T


def assert_complementary(z: Tensor, m: Tensor, q: Tensor) -> None:
    y = z @ m + q
    size = (z @ m.abs() + q.abs()).amax(1, keepdim=True)
    assert (z >= 0).all()
    assert (torch.minimum(z * m.diagonal(), y).abs() <= 1e-11 * size).all()


@seeds
@pytest.mark.parametrize("start", ["nothing", "all", "noise", "opposite", "solution"])
@pytest.mark.parametrize("m", [1, 5, 30, MASKED + 5])
def test_any_starting_set_leads_to_the_solution(m, start, seed):
    g, q = definite(m, seed=seed), normal(6, m, seed=seed)
    solution, solved = complementary_solutions(g, q)
    starts = {
        "nothing": torch.zeros_like(q, dtype=torch.bool),
        "all": torch.ones_like(q, dtype=torch.bool),
        "noise": normal(6, m, seed=seed + 5) > 0,
        "opposite": solution == 0,
        "solution": solution > 0,
    }
    found, found_solved = complementary_solutions(g, q, starts[start])
    assert solved.all() and found_solved.all()
    assert_complementary(found, g, q)
    assert_close(found, solution, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("m", [MASKED, MASKED + 1])
def test_the_solution_as_a_start_needs_one_round(m):
    g, q = definite(m), normal(6, m)
    solution, _ = complementary_solutions(g, q)
    found, solved = complementary_solutions(g, q, solution > 0, max_iter=1)
    assert solved.all()
    assert_close(found, solution)


def cycling(m: int) -> tuple[Tensor, Tensor]:
    """A problem on which changing the sides of all wrong unknowns at once repeats itself."""
    if m > 8:
        parts = [cycling(5), cycling(8), cycling(5)]
        return torch.block_diag(*(g for g, _ in parts)), torch.cat([q for _, q in parts])
    seed = CYCLES[m]
    rows = normal(m, m, seed=seed) + 2 * normal(m, seed=seed + 1)
    return rows @ rows.T + 1e-6 * torch.eye(m, dtype=torch.float64), normal(m, seed=seed + 2)


def all_at_once_repeats(g: Tensor, q: Tensor) -> bool:
    """Whether block pivoting without a safeguard, from the set `q < 0`, comes back to a set that it left."""
    passive, seen = q < 0, set()
    while True:
        z = torch.zeros_like(q)
        at = passive.nonzero()[:, 0]
        z[at] = torch.linalg.solve(g[at][:, at], -q[at])
        wrong = torch.where(passive, z, g @ z + q) < -1e-12
        if not wrong.any():
            return False
        key = tuple(passive.tolist())
        if key in seen:
            return True
        seen.add(key)
        passive = passive ^ wrong


@pytest.mark.parametrize("m", [5, 8, 18])
def test_problems_that_cycle_without_a_safeguard_are_solved(m):
    g, q = cycling(m)
    assert all_at_once_repeats(g, q)
    z, solved = complementary_solutions(g, q[None], (q < 0)[None])
    assert solved.all()
    assert_complementary(z, g, q[None])


@pytest.mark.parametrize("m", [5, 8, 18])
def test_rows_that_run_out_of_rounds_are_solved_by_active_sets(m):
    g, q = cycling(m)
    q = torch.stack([q, q.abs(), -q])
    z, solved = complementary_solutions(g, q, q < 0, max_iter=1)
    assert solved.all()
    assert_complementary(z, g, q)


def test_rows_that_active_sets_give_up_are_reported(monkeypatch):
    def gives_up(*_, **__):
        raise RuntimeError("Maximum number of iterations reached.")

    monkeypatch.setattr(complementarity, "nnls", gives_up)
    g, q = cycling(8)
    _, solved = complementary_solutions(g, torch.stack([q, q.abs()]), torch.stack([q < 0, q > 9]), max_iter=2)
    assert solved.tolist() == [False, True]


@seeds
@pytest.mark.parametrize(("m", "rank"), [(9, 3), (30, 5), (MASKED + 20, 12)])
def test_active_sets_solve_singular_problems(m, rank, seed):
    rows = normal(m, rank, seed=seed) + 1
    g, q = rows @ rows.T, normal(4, rank, seed=seed) @ rows.T
    z, solved = active_set_solutions(g, q)
    assert solved.all()
    assert_complementary(z, g, q)


@seeds
def test_nearly_singular_problems_are_solved(seed):
    rows = normal(60, 8, seed=seed) + 0.5
    g, q = rows @ rows.T + 1e-9 * torch.eye(60, dtype=torch.float64), rows @ rows.T
    z, solved = complementary_solutions(g, q)
    assert solved.all()
    assert_complementary(z, g, q)


def test_ties_at_zero_are_solutions():
    # y = 0 and z = 0 at once, in every unknown: no strict complementarity.
    g = torch.ones(4, 4, dtype=torch.float64) + torch.eye(4, dtype=torch.float64)
    q = torch.stack([torch.zeros(4, dtype=torch.float64), torch.tensor([-2.0, -1.0, -1.0, -1.0]).double()])
    z, solved = complementary_solutions(g, q)
    assert solved.all()
    assert_close(z, torch.tensor([[0.0, 0, 0, 0], [1, 0, 0, 0]], dtype=torch.float64))


def unit_diagonal(m: int, seed: int) -> tuple[Tensor, Tensor]:
    g = definite(m, seed=seed)
    d = g.diagonal().rsqrt()
    return g * d * d[:, None], normal(6, m, seed=seed)


@seeds
@pytest.mark.parametrize("m", [1, 2, 7, 20])
def test_small_problems_are_solved_without_torch(m, seed):
    g, q = unit_diagonal(m, seed)
    z, solved = pivoted(g.numpy(), q.numpy(), (q < 0).numpy(), 20)
    assert solved.any()
    assert_complementary(torch.from_numpy(z[solved]).clamp(min=0), g, q[solved])


def test_small_problems_that_cycle_are_left():
    g, q = cycling(5)
    d = g.diagonal().rsqrt()
    q = torch.stack([q * d, (q * d).abs()])
    _, solved = pivoted((g * d * d[:, None]).numpy(), q.numpy(), (q < 0).numpy(), 20)
    assert solved.tolist() == [False, True]


def test_small_singular_problems_are_left():
    g, q = torch.ones(3, 3, dtype=torch.float64), -torch.ones(2, 3, dtype=torch.float64)
    _, solved = pivoted(g.numpy(), q.numpy(), (q < 0).numpy(), 20)
    assert not solved.any()


@seeds
@pytest.mark.parametrize("m", [16, 32])
def test_a_guess_leaves_two_rounds_of_pivoting(m, seed):
    """Projections of gradients in conflict, which take more from where q is negative."""
    rows = normal(m, m, seed=seed)
    g = rows @ rows.T / rows.norm() ** 2 + 1e-4 * torch.eye(m, dtype=torch.float64)
    d = g.diagonal().rsqrt()
    g = (g * d * d[:, None]).numpy()
    guessed, started = (pivoted(g, g, sets, 2)[1] for sets in (None, g < 0))
    assert guessed.mean() > 0.9
    assert started.mean() < 0.5
