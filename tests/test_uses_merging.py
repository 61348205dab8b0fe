"""Merging and pruning against the minima of their quadratic forms, found with dense matrices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from nngeo import FIM, LayerCollection, PMatDense, PMatDiag, PMatEKFAC, PMatImplicit, PMatKFAC, PMatLowRank, PVector
from nngeo.uses import merge, prune

DAMPING = 0.01
KINDS = [PMatDense, PMatDiag, PMatKFAC, PMatEKFAC, PMatLowRank]
each_kind = pytest.mark.parametrize("kind", KINDS)
each_dtype = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def network(dtype: torch.dtype = torch.float64) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).to(dtype)


def experts(kind: type, dtype: torch.dtype = torch.float64, n: int = 2) -> tuple[list, list]:
    models = [network(dtype) for _ in range(n)]
    return models, [FIM(model, (torch.randn(8, 3, dtype=dtype),), kind) for model in models]


def flat(model: nn.Module) -> Tensor:
    return PVector.from_model(model).to_torch().detach()


def damped(F) -> Tensor:
    M = F.to_torch()
    return M + DAMPING * torch.eye(len(M)).to(M)


# ------------------------------------------------------------------------------------------ merging


@each_kind
@each_dtype
@pytest.mark.parametrize("weights", [None, [1.0, 3.0]], ids=["equal", "weighted"])
def test_merged_weights_solve_the_sum_of_the_matrices(kind, dtype, weights):
    models, Fs = experts(kind, dtype)
    found = merge(models, Fs, DAMPING, weights=weights, rtol=1e-6).to_torch()
    a = weights or [1.0, 1.0]
    total = sum(share * damped(F) for share, F in zip(a, Fs, strict=True))
    right = sum(share * damped(F) @ flat(model) for share, F, model in zip(a, Fs, models, strict=True))
    assert_close(found, torch.linalg.solve(total, right), rtol=1e-3, atol=1e-3)


@each_kind
def test_a_network_merged_with_itself_is_itself(kind):
    (model, *_), (F, *_) = experts(kind)
    assert_close(merge([model, model, model], [F, F, F]).to_torch(), flat(model))


def test_three_networks_merge_too():
    models, Fs = experts(PMatKFAC, n=3)
    total = sum(damped(F) for F in Fs)
    right = sum(damped(F) @ flat(model) for F, model in zip(Fs, models, strict=True))
    assert_close(merge(models, Fs, DAMPING, rtol=1e-8).to_torch(), torch.linalg.solve(total, right))


@pytest.mark.parametrize("kinds", [(PMatDiag, PMatKFAC), (PMatImplicit, PMatImplicit)], ids=["mixed", "implicit"])
def test_matrices_without_a_mean_merge_all_the_same(kinds):
    models = [network(), network()]
    xs = [(torch.randn(8, 3).double(),) for _ in models]
    Fs = [FIM(model, x, kind) for model, x, kind in zip(models, xs, kinds, strict=True)]
    total = sum(damped(F) for F in Fs)
    right = sum(damped(F) @ flat(model) for F, model in zip(Fs, models, strict=True))
    assert_close(merge(models, Fs, DAMPING, rtol=1e-8).to_torch(), torch.linalg.solve(total, right))


def test_where_no_matrix_says_anything_weights_are_averaged():
    models, x = [network(), network()], torch.zeros(4, 3).double()  # so that the first weight has no gradient
    merged = merge(models, [FIM(model, (x,), PMatDiag) for model in models])
    assert_close(merged["0.weight"], (models[0][0].weight + models[1][0].weight).detach() / 2)


def test_vectors_and_layers_stand_for_networks():
    models = [network(), network()]
    layers = LayerCollection.from_model(models[0], layers="2")
    Fs = [FIM(model, (torch.randn(8, 3).double(),), PMatKFAC, layer_collection=layers) for model in models]
    found = merge([PVector.from_model(model) for model in models], Fs)
    assert found.layer_collection == layers
    assert_close(found.to_torch(), merge(models, Fs).to_torch())


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"models": []}, ValueError, "equally many"),
        ({"damping": 0.0}, ValueError, "positive"),
        ({"weights": [1.0]}, ValueError, "positive numbers"),
        ({"max_iter": 1}, RuntimeError, "max_iter"),
    ],
)
def test_what_can_not_be_merged_is_refused(change, error, match):
    models, Fs = experts(PMatKFAC)
    with pytest.raises(error, match=match):
        merge(**{"models": models, "Fs": Fs} | change)


def test_matrices_over_other_layers_do_not_merge():
    models, Fs = experts(PMatDiag)
    last = FIM(
        models[1], (torch.randn(8, 3).double(),), PMatDiag, layer_collection=LayerCollection.from_model(models[1], "2")
    )
    with pytest.raises(ValueError, match="same layers"):
        merge(models, [Fs[0], last])


# ------------------------------------------------------------------------------------------ pruning


def best(M: Tensor, w: Tensor, kept: Tensor) -> Tensor:
    """The v, zero where it is not kept, with the least `(v - w)' M (v - w)`."""
    v = torch.zeros_like(w)
    v[kept] = torch.linalg.solve(M[kept][:, kept], M[kept] @ w)
    return v


@each_kind
@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.7, 1.0])
def test_in_one_round_the_least_worth_go_and_the_others_make_up_for_them(kind, fraction):
    model = network()
    F, w = FIM(model, (torch.randn(8, 3).double(),), kind), flat(model)
    M = damped(F)
    worth = w.square() / torch.linalg.inv(M).diagonal()
    kept = torch.ones(31, dtype=torch.bool)
    kept[worth.argsort()[: round(31 * fraction)]] = False
    found = prune(F, PVector.from_model(model), fraction, damping=DAMPING, rounds=1).to_torch()
    assert torch.equal(found == 0, ~kept)
    assert_close(found, best(M, w, kept), rtol=1e-4, atol=1e-5)


@each_kind
def test_after_several_rounds_what_is_kept_is_still_at_its_best(kind):
    model = network()
    F, w = FIM(model, (torch.randn(8, 3).double(),), kind), flat(model)
    found = prune(F, PVector.from_model(model), 0.6, damping=DAMPING, rounds=5).to_torch()
    assert (found == 0).sum() == round(31 * 0.6)
    assert_close(found, best(damped(F), w, found != 0), rtol=1e-4, atol=1e-5)


@each_dtype
def test_without_an_update_the_others_stay_as_they_are(dtype):
    model = network(dtype)
    w, F = flat(model), FIM(model, (torch.randn(8, 3, dtype=dtype),), PMatDiag)
    found = prune(F, PVector.from_model(model), 0.5, update=False, damping=DAMPING).to_torch()
    gone = (w.square() * (F.get_diag() + DAMPING)).argsort()[:16]
    expected = w.clone()
    expected[gone] = 0.0
    assert torch.equal(found, expected)


def test_for_a_diagonal_there_is_nothing_to_make_up():
    model = network()
    F, w = FIM(model, (torch.randn(8, 3).double(),), PMatDiag), PVector.from_model(model)
    assert_close(prune(F, w, 0.5).to_torch(), prune(F, w, 0.5, update=False).to_torch())


@each_dtype
def test_dead_units_and_a_zero_column_cost_nothing(dtype):
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3)).to(dtype)
    with torch.no_grad():
        model[0].bias[0] = -100.0
    x = torch.randn(8, 3, dtype=dtype)
    x[:, 0] = 0.0
    F, w = FIM(model, (x,), PMatKFAC), PVector.from_model(model).detach()
    pruned = prune(F, w, 0.3)  # 9 of 31, of which 14 have no gradient
    assert (F.get_diag() == 0).sum() >= 10
    assert pruned.to_torch().isfinite().all()
    assert F.vTMv(pruned - w) < 1e-4 * F.vTMv(w)


@pytest.mark.parametrize("fraction", [-0.1, 1.5, float("nan")])
def test_a_fraction_that_is_none_is_refused(fraction):
    model = network()
    F = FIM(model, (torch.randn(8, 3).double(),), PMatDiag)
    with pytest.raises(ValueError, match="from 0 to 1"):
        prune(F, PVector.from_model(model), fraction)
