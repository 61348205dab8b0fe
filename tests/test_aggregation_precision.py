"""Aggregators of float32 Jacobians: of deficient rank, nearly parallel, of any scale, beside double precision."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from nngeo.descent import Engine, aggregation, autojac, backward, jac_to_grad
from nngeo.descent.autojac import combine
from nngeo.linalg.gramian import row_gramian
from tests.aggregators import EVERY, FEWEST, build, matrix, normal

# Rows in single precision span more than these ranks, by rounding.
DEFICIENT = [f"{kind} {m}x{n} rank {r}" for kind in ("normal", "not") for m, n, r in [(4, 50, 2), (9, 30, 3)]]
DEFICIENT += ["strong 4x50 rank 2", "strong 12x40 rank 5"]
RANDOM = ["random", "graddrop", "graddrop_leak"]


def aggregated(name: str, j: Tensor) -> Tensor:
    """By a new aggregator, random ones with one seed."""
    torch.manual_seed(0)
    return build(name, len(j))(j)


@pytest.mark.parametrize("j", DEFICIENT)
@pytest.mark.parametrize("name", [name for name in EVERY if name not in RANDOM])
def test_single_precision_gives_what_double_precision_gives(name, j):
    j = matrix(j) / matrix(j).norm()
    assert_close(aggregated(name, j.float()).double(), aggregated(name, j), rtol=0, atol=1e-5)


# The least share of its length by which a row may lose: what the ridge of 1e-4 and the short run of MGDA cost.
CONFLICTS = {"upgrad": 1e-3, "dualproj": 1e-3, "mgda": 1e-2, "cagrad": 1e-5, "cagrad_two": 1e-5, "nash_mtl": 1e-5}
CONFLICTS |= {"upgrad_exact": 1e-6, "upgrad_strict": 1e-6, "dualproj_strict": 1e-6, "fairgrad": 1e-5}


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("j", DEFICIENT)
@pytest.mark.parametrize("name", CONFLICTS)
def test_no_loss_is_made_worse_in_single_precision(name, j, seed):
    j = matrix(j, seed, dtype=torch.float32)
    j = j / j.norm()
    assert (j @ aggregated(name, j)).amin() >= -CONFLICTS[name]


def parallel(m: int, seed: int) -> Tensor:
    """Rows that differ by a hundredth of their length."""
    generator = torch.Generator().manual_seed(seed)
    return normal(1, 200, 1, generator) + 1e-2 * normal(m, 200, m, generator)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", [name for name in EVERY if name not in [*RANDOM, *(n for n in EVERY if "mgda" in n)]])
def test_nearly_parallel_rows_give_what_they_give_in_double_precision(name, seed):
    j = parallel(8, seed).float()
    found, expected = aggregated(name, j), aggregated(name, j.double())
    # Where the result is short, weights of single precision cancel.
    assert (found - expected).norm() <= 1e-4 * max(float(expected.norm()), 0.01 * float(j.norm()))


@pytest.mark.parametrize("seed", range(5))
def test_config_is_the_pseudo_inverse_of_unit_rows(seed):
    j = parallel(8, seed)
    v = torch.linalg.pinv(j / j.norm(dim=1, keepdim=True)).sum(1)
    v = v / v.norm()
    assert_close(aggregated("config", j.float()).double(), (j @ v).sum() * v, rtol=1e-4, atol=1e-4)


# The power of the scale with which the result grows; 1 elsewhere.
DEGREE = {"nash_mtl": 0.0, "nash_mtl_free": 0.0, "fairgrad": 0.0, "fairgrad_half": 1 / 3, "fairgrad_two": -1 / 3}
# A step, epsilons and a first call that have the units of gradients or of their squares.
WITH_UNITS = ["modo", "gradvac", "gradvac_slow", "pcd", "pcd_half", "excess_mtl"]
WITHOUT = {"gradvac": lambda: aggregation.GradVac(eps=0.0), "pcd": lambda: aggregation.PCD(eps=0.0)}


def scaled_and_not(name: str, j: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Results of three calls with J times the scale, divided by their scale again, and with J."""
    results = []
    for factor in (scale, 1.0):
        torch.manual_seed(0)
        a = WITHOUT[name]() if name in WITHOUT else build(name, len(j))
        found = [a(factor * x).double() for x in (j, j + 0.1 * j.roll(1, 1), 0.5 * j)]
        results.append(torch.stack(found) / factor ** DEGREE.get(name, 1.0))
    return results[0], results[1]


@pytest.mark.parametrize("scale", [1e-20, 1e-10, 1e10, 1e20], ids=str)
@pytest.mark.parametrize("j", ["normal 5x8 rank 5", "normal 5x8 rank 3", "not 5x8 rank 5"])
@pytest.mark.parametrize("name", [*(name for name in EVERY if name not in WITH_UNITS), *WITHOUT])
def test_the_scale_of_the_gradients_does_not_matter(name, j, scale):
    assert_close(*scaled_and_not(name, matrix(j, dtype=torch.float32), scale), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-20, 1e20], ids=str)
@pytest.mark.parametrize("name", WITH_UNITS)
def test_results_with_units_stay_finite(name, scale):
    j = scale * matrix("normal 5x8 rank 5", dtype=torch.float32)
    assert aggregated(name, j).isfinite().all()


@pytest.mark.parametrize("small", [2**20, 0], ids=["small", "large"])
@pytest.mark.parametrize("m", [4, 12], ids=["combined", "streamed"])
def test_every_way_to_a_gramian_is_in_double_precision(m, small, monkeypatch):
    """By their Jacobian kept, by one pass without it, and by `.jac`: all in the plane, with weights that are huge."""
    monkeypatch.setattr(combine, "SMALL", small)
    j = matrix(f"normal {m}x30 rank 2", dtype=torch.float32)
    seen: list[Tensor] = []

    class Spy(aggregation.MeanWeighting):
        reads_values = True

        def weights(self, matrix: Tensor) -> Tensor:
            seen.append(matrix)
            return super().weights(matrix)

    spy = aggregation.GramianWeightedAggregator(Spy())
    w = torch.zeros(30, requires_grad=True)
    weights = backward(j @ w, [w], spy)
    assert weights.dtype == w.grad.dtype == torch.float32
    backward(j @ w, inputs=[w])
    jac_to_grad([w], spy)
    spy(j)
    assert [g.dtype for g in seen] == [torch.float64] * 3
    assert_close(torch.stack(seen), (j.double() @ j.double().T).expand(3, m, m), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(3, 0), (1, 5), (3, 300000), (300, 2000)], ids=str)
def test_gramians_are_in_double_precision(shape, dtype):
    j = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)
    assert_close(row_gramian(j), j.double() @ j.double().T, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("name", sorted(name for name in EVERY if hasattr(build(name, 5), "gramian_weighting")))
def test_weights_come_in_the_dtype_of_what_they_are_found_from(name):
    aggregator, j = build(name, 5), matrix("not 5x8 rank 5", dtype=torch.float32)
    assert aggregator.weighting(j).dtype == torch.float32
    assert aggregator.gramian_weighting(row_gramian(j)).dtype == torch.float64
    assert FEWEST.get(name, 1) <= 5


ENGINE_NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 9), nn.Tanh(), nn.Linear(9, 2)),
    "conv": lambda: nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(256, 2)),
    "embedding": lambda: nn.Sequential(Bins(), nn.Embedding(5, 3), nn.Flatten(), nn.Linear(192, 2)),
    "norm": lambda: nn.Sequential(nn.Flatten(), nn.LayerNorm(64), nn.Linear(64, 2)),
    "positions": lambda: nn.Sequential(nn.Flatten(), nn.Unflatten(1, (2, 32)), nn.Linear(32, 32), nn.Tanh()),
    "tied": lambda: Tied(),
}


class Bins(nn.Module):
    """Numbers to one of five indices."""

    def forward(self, x: Tensor) -> Tensor:
        return (x.flatten(1) * 50).long() % 5


class Tied(nn.Module):
    """Words, whose table is the head, too, and what differs by little."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(99, 7), nn.Linear(7, 99, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.embedding(torch.tensor([1, 5], device=x.device).expand(len(x), 2))
        return self.head((h * x[:, 0, 0, :2, None]).tanh()).flatten(1)


def alike(m: int) -> Tensor:
    """Images that differ by a thousandth, so that their gradients are nearly parallel."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand(1, 1, 8, 8, generator=generator) + 1e-3 * torch.rand(m, 1, 8, 8, generator=generator)


@pytest.mark.parametrize("name", ENGINE_NETWORKS)
def test_gramians_of_an_engine_are_those_of_float32_rows_in_double_precision(name):
    """To the rounding of the rows: far below that of a float32 product, for rows that are nearly parallel."""
    torch.manual_seed(0)
    model, x = ENGINE_NETWORKS[name](), alike(6)
    engine = Engine(model, batch_dim=0)
    losses = model(x).square().flatten(1).sum(1)
    found = engine.compute_gramian(losses)
    parameters = list(model.parameters())
    rows = torch.cat([j.flatten(1) for j in autojac.jac(losses, parameters)], 1).double()
    assert found.dtype == torch.float64
    d = found.diagonal().rsqrt()
    cosines, differences = found * d * d[:, None], rows / rows.norm(dim=1, keepdim=True)
    # |u_i - u_j|^2 = 2 - 2 cos(i, j): about 1e-6 or less.
    assert_close(2 - 2 * cosines, torch.cdist(differences, differences).square(), rtol=1e-2, atol=1e-12)


def test_steps_of_an_engine_hand_weightings_double_precision_and_give_weights_of_the_losses():
    model, x, seen = ENGINE_NETWORKS["linear"](), alike(6), []
    losses = model(x).square().sum(1)

    def weighting(gramian: Tensor) -> Tensor:
        seen.append(gramian.dtype)
        return gramian.new_full((6,), 1 / 6)

    weights = Engine(model, batch_dim=0).step(losses, weighting)
    assert (seen, weights.dtype) == ([torch.float64], torch.float32)
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


def test_weights_in_double_precision_go_backward_from_losses_in_single():
    model, x = ENGINE_NETWORKS["linear"](), alike(6)
    losses = model(x).square().sum(1)
    weights = aggregation.UPGradWeighting()(Engine(model, batch_dim=0).compute_gramian(losses))
    losses.backward(weights, retain_graph=True)
    expected = torch.autograd.grad((weights * losses).sum(), list(model.parameters()))
    assert_close([p.grad for p in model.parameters()], list(expected))
