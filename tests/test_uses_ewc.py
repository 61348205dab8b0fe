"""Elastic weight consolidation against its definition, `sum_t (w - w_t)' F_t (w - w_t)` with dense matrices."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.testing import assert_close

from nngeo import (
    FIM,
    LayerCollection,
    PMatDense,
    PMatDiag,
    PMatEKFAC,
    PMatEKFACBlockDiag,
    PMatKFAC,
    PMatLowRank,
    PMatQuasiDiag,
    PVector,
)
from nngeo.uses import EWC, Quadratic

each_kind = pytest.mark.parametrize(
    "kind", [PMatDense, PMatDiag, PMatKFAC, PMatEKFAC, PMatEKFACBlockDiag, PMatLowRank, PMatQuasiDiag]
)
each_dtype = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def network(dtype: torch.dtype = torch.float64) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).to(dtype)


def task(dtype: torch.dtype = torch.float64, n: int = 8) -> Tensor:
    return torch.randn(n, 3, dtype=dtype)


def moved(model: nn.Module) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))


def dense(kind: type, model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """The matrix (P, P), and the weights (P,)."""
    F = FIM(model, (x,), kind)
    if kind in (PMatEKFAC, PMatEKFACBlockDiag):
        F.update_diag((x,))
    return F.to_torch(), PVector.from_model(model).to_torch().detach()


def quadratic(M: Tensor, v: Tensor) -> Tensor:
    return v @ M @ v


@each_kind
@each_dtype
def test_the_penalty_is_the_quadratic_form_around_the_weights_of_the_task(kind, dtype):
    model, x = network(dtype), task(dtype)
    M, w = dense(kind, model, x)
    penalty = EWC(model, kind).consolidate((x,))
    moved(model)
    loss = penalty()
    step = PVector.from_model(model).to_torch().detach() - w
    assert_close(loss.detach(), quadratic(M, step))
    loss.backward()
    assert_close(PVector.from_model_grad(model).to_torch(), 2 * M @ step, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [PMatDense, PMatDiag, PMatQuasiDiag, PMatLowRank])
@pytest.mark.parametrize("decay", [1.0, 0.5, 0.0])
def test_a_decay_sums_the_matrices_around_the_last_weights(kind, decay):
    model, penalty, total = network(), EWC(network(), kind, decay=decay), 0.0
    penalty.model = model
    for _ in range(3):
        moved(model)
        x = task()
        M, w = dense(kind, model, x)
        total = decay * total + M
        penalty.consolidate((x,))
    moved(model)
    assert_close(penalty().detach(), quadratic(total, PVector.from_model(model).to_torch().detach() - w))


@each_kind
def test_without_a_decay_each_task_keeps_its_own_term(kind):
    model, penalty, terms = network(), EWC(network(), kind, decay=None), []
    penalty.model = model
    for _ in range(3):
        moved(model)
        x = task()
        terms.append(dense(kind, model, x))
        penalty.consolidate((x,))
    moved(model)
    v = PVector.from_model(model).to_torch().detach()
    assert_close(penalty().detach(), sum(quadratic(M, v - w) for M, w in terms))


@pytest.mark.parametrize("kind", [PMatDense, PMatDiag, PMatKFAC, PMatQuasiDiag])
def test_a_decay_takes_constant_memory(kind):
    model = network()
    penalty = EWC(model, kind).consolidate((task(),))
    numels = {key: x.numel() for key, x in penalty.state_dict().items() if key != "plain"}
    penalty.consolidate((task(),)).consolidate((task(),))
    assert {key: x.numel() for key, x in penalty.state_dict().items() if key != "plain"} == numels


def test_tasks_weigh_the_same_however_many_examples_they_have():
    model = network()
    few, many = task(n=3), task(n=50)
    penalty = EWC(model, PMatKFAC).consolidate((few,)).consolidate((many,))
    (term,) = penalty.quadratic.terms
    A = [FIM(model, (x,), PMatKFAC).data["0"].a for x in (few, many)]
    assert term.weight == 2
    assert term.F.n_examples == 53
    assert_close(term.F.data["0"].a, (A[0] + A[1]) / 2)


def test_before_the_first_task_the_penalty_is_zero():
    assert EWC(network(), PMatKFAC)() == 0
    assert Quadratic(None)(PVector.from_model(network())) == 0


@pytest.mark.parametrize(
    ("kind", "decay"), [(PMatDense, 1.0), (PMatDiag, 1.0), (PMatKFAC, 1.0), (PMatKFAC, None), (PMatEKFAC, None)]
)
def test_a_state_of_tensors_goes_through_safetensors_and_on(kind, decay):
    model, x, y = network(), task(), task()
    first = EWC(model, kind, decay=decay).consolidate((x,))
    second = EWC(model, kind, decay=decay)
    second.load_state_dict(load(save(first.state_dict())))
    moved(model)
    assert second() == first()
    first.consolidate((y,)), second.consolidate((y,))
    moved(model)
    assert second() == first()
    assert repr(second) == repr(first)


def test_two_eigenbases_have_no_mean_and_the_error_says_what_has():
    penalty = EWC(network(), PMatEKFAC).consolidate((task(),))
    with pytest.raises(NotImplementedError, match="decay=None"):
        penalty.consolidate((task(),))


def test_an_iterator_that_runs_once_serves_the_factors_and_the_scalings():
    model, x = network(), task()
    once, twice = EWC(model, PMatEKFAC), EWC(model, PMatEKFAC)
    once.consolidate(iter([(x[:5],), (x[5:],)]))
    twice.consolidate([(x[:5],), (x[5:],)])
    moved(model)
    assert_close(once(), twice())


def test_only_the_layers_asked_for_are_kept():
    model, x = network(), task()
    penalty = EWC(model, PMatKFAC, layer_collection=LayerCollection.from_model(model, layers="2")).consolidate((x,))
    moved(model)
    penalty().backward()
    assert model[0].weight.grad is None
    assert model[2].weight.grad.norm() > 0


def test_dict_batches_with_a_function_are_as_tuples():
    model, x = network(), task()
    plain = EWC(model, PMatDiag).consolidate((x,))
    named = EWC(model, PMatDiag, function=lambda batch: model(batch["x"])).consolidate([{"x": x[:4]}, {"x": x[4:]}])
    moved(model)
    assert_close(named(), plain())


def test_draws_and_gradients_at_targets_are_options():
    model, x, y = network(), task(), torch.randint(3, (8,))
    empirical = EWC(model, PMatDiag, empirical=True).consolidate((x, y))
    drawn = EWC(model, PMatDiag, trials=2, generator=torch.Generator().manual_seed(0)).consolidate((x,))
    F = FIM(model, (x, y), PMatDiag, empirical=True)
    assert_close(empirical.quadratic.terms[0].F.get_diag(), F.get_diag())
    assert (drawn.quadratic.terms[0].F.get_diag() - F.get_diag()).norm() > 0


def test_autocast_does_not_round_the_penalty():
    model, x = network(torch.float32), task(torch.float32)
    penalty = EWC(model, PMatKFAC).consolidate((x,))
    moved(model)
    plain = penalty()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert penalty() == plain


def test_a_model_of_half_precision_has_a_penalty_of_full_precision():
    model = network(torch.float32).to(torch.bfloat16)
    penalty = EWC(model, PMatDiag).consolidate((task(torch.bfloat16),))
    moved(model)
    loss = penalty()
    loss.backward()
    assert loss.dtype == torch.float32
    assert model[0].weight.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", [PMatDiag, PMatKFAC])
def test_one_example_with_dead_units_and_a_zero_column_is_finite_in_float32(kind):
    model, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3)), torch.tensor([[1.0, 0.0, 2.0]])
    with torch.no_grad():
        model[0].bias[:2] = -100.0
    penalty = EWC(model, kind).consolidate((x,)).consolidate((x,))
    moved(model)
    loss = penalty()
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters())


def test_a_model_that_grows_keeps_the_terms_of_its_old_layers():
    model = nn.ModuleDict({"body": nn.Linear(3, 4), "head": nn.Linear(4, 3)}).double()
    x = task()
    penalty = EWC(model, PMatDiag, decay=None, function=lambda x: model["head"](model["body"](x)))
    penalty.consolidate((x,))
    old = copy.deepcopy(penalty)
    model["second"] = nn.Linear(4, 2).double()
    grown = EWC(model, PMatDiag, decay=None, function=lambda x: model["second"](model["body"](x)))
    grown.load_state_dict(penalty.state_dict())
    layers = LayerCollection.from_model(model, layers=["body", "second"])
    grown.layer_collection = layers
    grown.consolidate((x,))
    moved(model)
    old.model = model
    alone = grown.quadratic.terms[1](PVector.from_model(model, layers))
    assert_close(grown(), old() + alone)


@pytest.mark.parametrize("decay", [-0.1, 1.5, float("nan")])
def test_a_decay_that_is_none_is_refused(decay):
    with pytest.raises(ValueError, match="from 0 to 1"):
        EWC(network(), PMatDiag, decay=decay)


def test_a_state_of_something_else_is_refused():
    with pytest.raises(ValueError, match="not the state_dict of a Quadratic"):
        EWC(network(), PMatDiag).load_state_dict(network().state_dict())
