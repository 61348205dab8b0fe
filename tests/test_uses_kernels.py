"""Predictions of kernels against gradient descent and numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from nngeo import NTK, FMatDense, Jacobian, LayerCollection
from nngeo.uses import alignment, cka, effective_rank, kernel_predict

N, M, K = 6, 4, 2
each_dtype = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def network(dtype: torch.dtype = torch.float64) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, K)).to(dtype)


def data(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(N, 3, dtype=dtype), torch.randn(N, K, dtype=dtype), torch.randn(M, 3, dtype=dtype)


def wishart(n: int, rank: int) -> Tensor:
    x = torch.randn(n, rank, dtype=torch.float64)
    return x @ x.T


def descended(model: nn.Module, x: Tensor, y: Tensor, new: Tensor, ridge: float, rate: float, steps: int) -> Tensor:
    """(m, k), of the linearized network, by steps on its weights."""
    J, J_new = (Jacobian(model, z).data.transpose(0, 1).flatten(0, 1) for z in (x, new))  # (n k, P)
    f0, f0_new, w = model(x).detach().flatten(), model(new).detach().flatten(), torch.zeros(J.shape[1]).to(x)
    for _ in range(steps):
        w = w - rate / len(x) * (J.T @ (f0 + J @ w - y.flatten()) + ridge * w)
    return (f0_new + J_new @ w).view(-1, K)


# ------------------------------------------------------------------------------------------ predictions


@pytest.mark.parametrize("ridge", [0.0, 0.5])
@pytest.mark.parametrize("time", [0.5, 5.0])
def test_at_a_time_it_is_the_linearized_network_after_small_steps(time, ridge):
    model, (x, y, new) = network(), data()
    found = kernel_predict(
        NTK(model, x), y, NTK(model, new, x), t=time, ridge=ridge, f0=model(x).detach(), f0_cross=model(new).detach()
    )
    steps = 20_000
    assert_close(found, descended(model, x, y, new, ridge, time / steps, steps), rtol=1e-3, atol=1e-4)


@each_dtype
def test_the_rate_is_a_unit_of_time(dtype):
    model, (x, y, new) = network(dtype), data(dtype)
    kernels = NTK(model, x), y, NTK(model, new, x)
    assert_close(kernel_predict(*kernels, t=2.0, rate=3.0), kernel_predict(*kernels, t=6.0))


def test_at_time_zero_nothing_is_learned():
    model, (x, y, new) = network(), data()
    f0_cross = model(new).detach()
    found = kernel_predict(NTK(model, x), y, NTK(model, new, x), t=0.0, f0=model(x).detach(), f0_cross=f0_cross)
    assert_close(found, f0_cross)


@each_dtype
@pytest.mark.parametrize("ridge", [0.0, 0.1])
def test_the_end_is_kernel_ridge_regression(dtype, ridge):
    model, (x, y, new) = network(dtype), data(dtype)
    matrix, cross = NTK(model, x), NTK(model, new, x)
    dense = matrix.to_matrix() + ridge * torch.eye(N * K).to(x)
    expected = (cross.to_matrix() @ torch.linalg.solve(dense, y.T.flatten())).view(K, M).T
    tolerance = {} if dtype == torch.float64 else {"rtol": 1e-2, "atol": 1e-2}
    assert_close(kernel_predict(matrix, y, cross, ridge=ridge), expected, **tolerance)


def test_the_end_is_the_limit_of_long_times():
    model, (x, y, new) = network(), data()
    kernels = NTK(model, x), y, NTK(model, new, x)
    assert_close(kernel_predict(*kernels, t=1e9), kernel_predict(*kernels))
    assert_close(kernel_predict(*kernels, t=1e9, ridge=0.1), kernel_predict(*kernels, ridge=0.1))


@pytest.mark.parametrize("t", [None, 2.0], ids=["end", "time"])
@pytest.mark.parametrize("ridge", [0.0, 0.3])
def test_one_kernel_for_all_outputs_is_the_same_on_each(t, ridge):
    matrix, cross, y = wishart(N, 9), torch.randn(M, N).double(), torch.randn(N, K).double()
    full = [
        FMatDense(LayerCollection(), data=torch.einsum("kl,nm->knlm", torch.eye(K).double(), x))
        for x in (matrix, cross)
    ]
    assert_close(kernel_predict(matrix, y, cross, t, ridge), kernel_predict(full[0], y, full[1], t, ridge))


@pytest.mark.parametrize("t", [None, 2.0], ids=["end", "time"])
def test_a_singular_kernel_learns_within_its_range(t):
    matrix, y = wishart(N, 2), torch.randn(N, 1).double()
    found = kernel_predict(matrix, y, matrix, t)
    inside = matrix @ torch.linalg.pinv(matrix)
    assert_close(found, inside @ found)
    assert_close(kernel_predict(matrix, y, matrix), inside @ y)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"y": torch.zeros(N + 1, K).double()}, "do not fit"),
        ({"y": torch.zeros(N, K + 1).double()}, "should be"),
        ({"t": -1.0}, "negative"),
        ({"ridge": -1.0}, "negative"),
    ],
)
def test_what_does_not_fit_is_refused(change, match):
    model, (x, y, new) = network(), data()
    with pytest.raises(ValueError, match=match):
        kernel_predict(**{"K": NTK(model, x), "y": y, "K_cross": NTK(model, new, x)} | change)


# ------------------------------------------------------------------------------------------ how kernels compare


def centring(n: int) -> np.ndarray:
    return np.eye(n) - np.ones((n, n)) / n


@pytest.mark.parametrize("centred", [False, True])
def test_alignment_is_that_of_numpy(centred):
    matrix, y = wishart(N, 4), torch.randn(N, K).double()
    a, b = matrix.numpy(), (y @ y.T).numpy()
    if centred:
        H = centring(N)
        a, b = H @ a @ H, H @ b @ H
    expected = np.sum(a * b) / np.linalg.norm(a) / np.linalg.norm(b)
    assert_close(alignment(matrix, y, centred=centred).item(), expected, rtol=1e-10, atol=0)


def test_cka_is_that_of_numpy():
    first, second, H = wishart(N, 4), wishart(N, 3), centring(N)
    a, b = H @ first.numpy() @ H, H @ second.numpy() @ H
    expected = np.sum(a * b) / np.linalg.norm(a) / np.linalg.norm(b)
    assert_close(cka(first, second).item(), expected, rtol=1e-10, atol=0)


def test_cka_sees_neither_factors_nor_means():
    x = torch.randn(N, 4).double()
    assert_close(cka(x @ x.T, 3 * (x + 5) @ (x + 5).T).item(), 1.0)


def test_kernels_of_several_outputs_are_summed_over_them():
    model, (x, y, _) = network(), data()
    matrix = NTK(model, x)
    summed = sum(matrix.data[k, :, k] for k in range(K))
    assert_close(alignment(matrix, y), alignment(summed, y))
    assert_close(cka(matrix, summed).item(), 1.0)


@pytest.mark.parametrize("ridge", [None, 0.5])
def test_the_effective_rank_is_that_of_numpy(ridge):
    matrix = wishart(N, 4)
    values = np.linalg.eigvalsh(matrix.numpy())[-4:]
    share = values / values.sum()
    expected = np.exp(-np.sum(share * np.log(share))) if ridge is None else np.sum(values / (values + ridge))
    assert_close(effective_rank(matrix, ridge).item(), expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("rank", [1, 3, N])
def test_equal_eigenvalues_all_count(rank):
    basis = torch.linalg.qr(torch.randn(N, N).double()).Q[:, :rank]
    assert_close(effective_rank(basis @ basis.T).item(), float(rank))


def test_kernels_of_other_examples_do_not_compare():
    with pytest.raises(ValueError, match="same examples"):
        cka(wishart(N, 4), wishart(M, 4))


@each_dtype
def test_one_example_with_dead_units_is_finite(dtype):
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, K)).to(dtype)
    with torch.no_grad():
        model[0].bias.fill_(-100.0)
    x, y = torch.zeros(1, 3, dtype=dtype), torch.ones(1, K, dtype=dtype)
    matrix = NTK(model, x)
    assert_close(kernel_predict(matrix, y, matrix), y)
    assert effective_rank(matrix).isfinite()
