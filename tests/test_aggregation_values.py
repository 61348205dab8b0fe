"""Results that torchjd 0.18.0 gives in double precision for the Jacobian of its documentation, frozen."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from nngeo.descent import aggregation
from tests.aggregators import build

J = [[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]
FOUR = [[1.0, 0.0], [1.0, 0.1], [1.0, 0.25], [-9.0, 5.0]]

RESULTS = {
    "mean": [1.0, 1.0, 1.0],
    "sum": [2.0, 2.0, 2.0],
    "constant": [4.6, 1.1, 1.1],
    "upgrad": [0.2929020002, 1.900352078, 1.900352078],
    "upgrad_preference": [0.8960029381, 2.315430297, 2.315430297],
    "dualproj": [0.5563158129, 1.110921047, 1.110921047],
    "dualproj_preference": [1.001368463, 1.999657884, 1.999657884],
    "mgda": [0.0, 1.0, 1.0],
    "aligned_mtl": [0.213278746, 0.9673329838, 0.9673329838],
    "aligned_mtl_preference": [1.192217418, 0.9584986888, 0.9584986888],
    "aligned_mtl_median": [0.213278746, 0.9673329838, 0.9673329838],
    "aligned_mtl_rmse": [0.5763758127, 2.614172041, 2.614172041],
    "config": [0.1588089758, 2.070606758, 2.070606758],
    "config_preference": [0.7624266433, 2.213169176, 2.213169176],
    "imtl_g": [0.07669683062, 1.0, 1.0],
    "pcgrad": [0.5847953216, 3.801169591, 3.801169591],
    "gradvac": [0.5847953281, 3.801169586, 3.801169586],
    "gradvac_slow": [0.5847959646, 3.80116914, 3.80116914],
    "excess_mtl": [4.807970784, 1.0, 1.0],
    "excess_mtl_warmup": [1.0, 1.0, 1.0],
    "pcd": [-0.8200327513, 2.943428807, 2.943428807],
    "pcd_half": [2.088900025, 2.611177578, 2.611177578],
    "fairgrad_mean": [1.0, 1.0, 1.0],
    "fairgrad_half": [0.1810426452, 1.26822086, 1.26822086],
    "fairgrad": [0.07658428839, 0.9985326351, 0.9985326351],
    "fairgrad_two": [0.03127367982, 0.7908171505, 0.7908171505],
}
# What the solvers that torchjd calls give, and how near they come.
ROUGH = {
    "cagrad_half": ([0.1835034204, 1.204124148, 1.204124148], 1e-7),
    "cagrad": ([-0.0001067790576, 1.999946606, 1.999946606], 2e-4),
    "cagrad_two": ([-4.585515243e-05, 3.345198103, 3.345198103], 1e-4),
    "nash_mtl": ([0.05415325109, 0.7060691982, 0.7060691982], 1e-7),
    "nash_mtl_free": ([0.07658426658, 0.998532694, 0.998532694], 1e-6),
}
OF_FOUR = {
    "krum": [1.0, 0.1],
    "krum_selected": [1.0, 0.05],
    "trimmed_mean": [1.0, 0.175],
}


def result(name: str, rows: list[list[float]]) -> Tensor:
    return build(name, len(rows))(torch.tensor(rows, dtype=torch.float64))


def double(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("name", RESULTS)
def test_result_is_the_frozen_one(name):
    assert_close(result(name, J), double(RESULTS[name]), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", ROUGH)
def test_result_is_the_frozen_one_to_the_accuracy_of_its_solver(name):
    expected, accuracy = ROUGH[name]
    assert_close(result(name, J), double(expected), rtol=0, atol=accuracy)


@pytest.mark.parametrize("name", OF_FOUR)
def test_result_of_four_gradients_is_the_frozen_one(name):
    assert_close(result(name, FOUR), double(OF_FOUR[name]), rtol=1e-12, atol=1e-12)


# By hand: the rows have G = [[18, -22], [-22, 38]], so the projections of g_1 and g_2 onto the dual cone are
# g_1 + 22/38 g_2 and g_2 + 22/18 g_1.
BY_HAND = {
    "upgrad_strict": [((1 + 11 / 9) * -4 + (1 + 11 / 19) * 6) / 2] + 2 * [(2 + 11 / 9 + 11 / 19) / 2],
    "upgrad_exact": [((1 + 11 / 9) * -4 + (1 + 11 / 19) * 6) / 2] + 2 * [(2 + 11 / 9 + 11 / 19) / 2],
    "dualproj_strict": [(11 / 9 * -4 + 6) / 2] + 2 * [(1 + 11 / 9) / 2],
    "cagrad": [0.0, 2.0, 2.0],
}


@pytest.mark.parametrize("name", BY_HAND)
def test_exact_result_is_the_one_by_hand(name):
    assert_close(result(name, J), double(BY_HAND[name]), rtol=1e-10, atol=1e-10)


def test_two_objectives_make_pcgrad_an_upgrad():
    upgrad = aggregation.UPGrad(torch.ones(2), reg_eps=0.0)
    assert_close(upgrad(double(J[0] + J[1]).view(2, 3)), result("pcgrad", J))


def test_random_weights_are_a_softmax_of_normals():
    torch.manual_seed(3)
    weights = torch.randn(2, dtype=torch.float64).softmax(0)
    torch.manual_seed(3)
    assert_close(result("random", J), weights @ torch.tensor(J, dtype=torch.float64))


def test_graddrop_keeps_one_sign_of_each_coordinate():
    x = result("graddrop", J)
    assert x[0] in (-4.0, 6.0)
    assert x[1:].tolist() == [2.0, 2.0]
