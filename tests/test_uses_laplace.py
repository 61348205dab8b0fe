"""Laplace approximations against closed forms: Bayesian linear regression, kernels, and dense matrices."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.distributions import MultivariateNormal
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

from nngeo import (
    FIM,
    NTK,
    FVector,
    Jacobian,
    LayerCollection,
    PMatDense,
    PMatDiag,
    PMatEKFAC,
    PMatKFAC,
    PMatLowRank,
    PVector,
)
from nngeo.uses import Laplace

each_kind = pytest.mark.parametrize("kind", [PMatDense, PMatDiag, PMatKFAC, PMatEKFAC, PMatLowRank])
NOISE, PRIOR, N = 0.3, 2.0, 20


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def classifier(dtype: torch.dtype = torch.float64) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).to(dtype)


def examples(n: int = N, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 3, dtype=dtype), torch.randint(3, (n,))


def linear_regression() -> tuple[nn.Module, Tensor, Tensor]:
    """A linear model with two outputs at the mean of its posterior."""
    model, x, y = nn.Linear(3, 2).double(), torch.randn(N, 3).double(), torch.randn(N, 2).double()
    F = FIM(model, (x,), PMatDense, variant="regression")
    (N / NOISE * F + PRIOR).solve(Jacobian(model, x).T @ FVector(y.T / NOISE), regul=0).to_model(model)
    return model, x, y


def with_ones(x: Tensor) -> Tensor:
    return nn.functional.pad(x, (0, 1), value=1.0)


def dense_precision(la: Laplace, scale: float) -> Tensor:
    return scale * la.F.to_torch() + PRIOR * torch.eye(la.F.size(0)).to(la.F.to_torch())


# ------------------------------------------------------------------------------------------ closed forms


@pytest.mark.parametrize("kind", [PMatDense, PMatKFAC, PMatLowRank])
def test_the_evidence_is_that_of_bayesian_linear_regression(kind):
    model, x, y = linear_regression()
    la = Laplace.fit(model, [(x[:7], y[:7]), (x[7:], y[7:])], kind, "regression", PRIOR, NOISE)
    phi = with_ones(x)
    marginal = MultivariateNormal(torch.zeros(N).to(x), phi @ phi.T / PRIOR + NOISE * torch.eye(N).to(x))
    assert_close(la.log_evidence(), marginal.log_prob(y.T).sum(), rtol=1e-10, atol=0)


@pytest.mark.parametrize("kind", [PMatDense, PMatKFAC, PMatLowRank])
def test_variances_are_those_of_bayesian_linear_regression(kind):
    model, x, y = linear_regression()
    la = Laplace.fit(model, (x, y), kind, "regression", PRIOR, NOISE)
    phi, new = with_ones(x), torch.randn(5, 3).double()
    covariance = torch.linalg.inv(phi.T @ phi / NOISE + PRIOR * torch.eye(4).to(x))
    joint = with_ones(new) @ covariance @ with_ones(new).T
    assert_close(la.variance(new), joint.diagonal()[:, None].expand(5, 2), rtol=1e-10, atol=0)
    expected = torch.einsum("bc,op->bocp", joint, torch.eye(2).to(x))
    assert_close(la.covariance(new), expected, rtol=1e-10, atol=1e-14)
    mean, variance = la.predict(new)
    assert_close(mean, model(new).detach())
    assert_close(variance, la.variance(new) + NOISE)


def test_the_predictive_of_a_network_is_the_posterior_of_its_kernel():
    model, x = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2)).double(), torch.randn(N, 3).double()
    la = Laplace.fit(model, (x, torch.randn(N, 2).double()), PMatDense, "regression", PRIOR, NOISE)
    new = torch.randn(5, 3).double()
    K, cross = NTK(model, x).to_matrix(), NTK(model, new, x).to_matrix()
    explained = cross @ torch.linalg.solve(K + NOISE * PRIOR * torch.eye(len(K)).to(K), cross.T)
    posterior = (NTK(model, new).to_matrix() - explained) / PRIOR
    assert_close(la.covariance(new).permute(1, 0, 3, 2).reshape(10, 10), posterior, rtol=1e-9, atol=1e-12)


# ------------------------------------------------------------------------------------------ the evidence


@each_kind
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_evidence_of_a_classifier_is_its_definition(kind, temperature):
    model, (x, y) = classifier(), examples()
    la = Laplace.fit(model, (x, y), kind, prior_precision=PRIOR, temperature=temperature)
    w = PVector.from_model(model).to_torch().detach()
    H = dense_precision(la, N / temperature)
    prior = -PRIOR / 2 * w @ w + len(w) / 2 * math.log(PRIOR)
    expected = -cross_entropy(model(x), y, reduction="sum") / temperature + prior - torch.logdet(H) / 2
    assert_close(la.log_evidence(), expected.detach(), rtol=1e-10, atol=0)


@each_kind
def test_priors_by_layer_and_by_weight_are_as_one_number_where_they_are_equal(kind):
    la = Laplace.fit(classifier(), examples(), kind)
    expected = la.log_evidence(PRIOR)
    assert_close(la.log_evidence(torch.full((2,), PRIOR)), expected)
    assert_close(la.log_evidence(torch.full((31,), PRIOR)), expected)


@each_kind
def test_a_prior_by_layer_is_the_diagonal_that_it_stands_for(kind):
    la = Laplace.fit(classifier(), examples(), kind)
    by_layer = torch.tensor([0.5, 3.0], dtype=torch.float64)
    by_weight = by_layer.repeat_interleave(torch.tensor([16, 15]))
    assert_close(la.log_evidence(by_layer), la.log_evidence(by_weight))


@each_kind
@pytest.mark.parametrize("shape", [(), (2,), (31,)], ids=["number", "by layer", "by weight"])
def test_the_evidence_is_differentiable_in_the_prior(kind, shape):
    la = Laplace.fit(classifier(), examples(), kind)
    prior = (torch.rand(shape, dtype=torch.float64) + 0.5).requires_grad_()
    assert torch.autograd.gradcheck(la.log_evidence, (prior,))


def test_the_evidence_is_differentiable_in_the_noise():
    model, x, y = linear_regression()
    la = Laplace.fit(model, (x, y), PMatKFAC, "regression", PRIOR)
    noise = torch.tensor(NOISE, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda noise: la.log_evidence(None, noise), (noise,))


@each_kind
def test_tuning_ends_where_the_evidence_is_flat(kind):
    la = Laplace.fit(classifier(), examples(), kind)
    before = la.log_evidence()
    la.tune()
    log = la.prior_precision.log().requires_grad_()
    evidence = la.log_evidence(log.exp())
    (slope,) = torch.autograd.grad(evidence, log)
    assert evidence > before
    assert slope.abs() < 1e-3


def test_tuning_a_regression_finds_prior_and_noise_together():
    model, x, y = linear_regression()
    la = Laplace.fit(model, (x, 0.3 * y + model(x).detach()), PMatKFAC, "regression").tune()
    logs = [la.prior_precision.log().requires_grad_(), la.noise.log().requires_grad_()]
    slopes = torch.autograd.grad(la.log_evidence(*[x.exp() for x in logs]), logs)
    assert all(slope.abs() < 1e-3 for slope in slopes)


# ------------------------------------------------------------------------------------------ predictions


@each_kind
def test_variances_of_a_classifier_are_those_of_the_linearized_network(kind):
    model, (x, y) = classifier(), examples()
    la, new = Laplace.fit(model, (x, y), kind, prior_precision=PRIOR), torch.randn(5, 3).double()
    J = Jacobian(model, new).data  # (k, b, P)
    expected = torch.einsum("kbp,pq,kbq->bk", J, torch.linalg.inv(dense_precision(la, N)), J)
    assert_close(la.variance(new), expected)
    scaled = model(new).detach() / (1 + math.pi / 8 * expected).sqrt()
    assert_close(la.predict(new), scaled.softmax(1))


def test_the_bridge_is_a_dirichlet_of_logits_that_sum_to_zero():
    model, (x, y) = classifier(), examples()
    la, new = Laplace.fit(model, (x, y), PMatDense), torch.randn(1, 3).double()
    S, f, one = la.covariance(new)[0, :, 0], model(new)[0].detach(), torch.ones(3, 1).double()
    gain = S @ one / (one.T @ S @ one)
    f, S = f - gain[:, 0] * f.sum(), S - gain @ one.T @ S
    alpha = (1 - 2 / 3 + f.exp() / 9 * (-f).exp().sum()) / S.diagonal()
    assert_close(la.predict(new, link="bridge")[0], alpha / alpha.sum())


def test_draws_of_logits_are_normal_with_the_covariances_of_the_linearized_network():
    model, (x, y) = classifier(), examples()
    la, new = Laplace.fit(model, (x, y), PMatKFAC), torch.randn(4, 3).double()
    found = la.predict(new, link="mc", samples=40_000, generator=torch.Generator().manual_seed(0))
    covariances = la.covariance(new)
    normal = MultivariateNormal(model(new).detach(), torch.stack([covariances[b, :, b] for b in range(4)]))
    assert_close(found, normal.sample((40_000,)).softmax(-1).mean(0), rtol=0, atol=0.01)


def test_draws_of_weights_are_networks_and_the_model_comes_back():
    model, (x, y) = classifier(), examples()
    la, before = Laplace.fit(model, (x, y), PMatKFAC), [(p, p.clone(), p._version) for p in model.parameters()]
    found = la.predict(x, link="samples", samples=3, generator=torch.Generator().manual_seed(0))
    assert all(torch.equal(p, value) and p._version == version for p, value, version in before)
    other, outputs = classifier(), []
    for draw in la.sample(3, torch.Generator().manual_seed(0)):
        PVector(la.F.layer_collection, draw).to_model(other)
        outputs.append(other(x).softmax(-1).detach())
    assert_close(found, torch.stack(outputs).mean(0))


@each_kind
def test_weights_have_the_mean_and_covariance_of_the_posterior(kind):
    la = Laplace.fit(classifier(), examples(), kind, prior_precision=PRIOR)
    draws = la.sample(40_000, torch.Generator().manual_seed(0))
    covariance = torch.linalg.inv(dense_precision(la, N))
    assert_close(draws.mean(0), la.mean.to_torch(), rtol=0, atol=0.02)
    assert_close(draws.T.cov(), covariance, rtol=0, atol=0.02)


@pytest.mark.parametrize("kind", [PMatDense, PMatKFAC])
def test_of_the_last_layer_alone_the_features_are_certain(kind):
    model, (x, y) = classifier(), examples()
    last = LayerCollection.from_model(model, layers="2")
    la = Laplace.fit(model, (x, y), kind, prior_precision=PRIOR, layer_collection=last)
    alone = Laplace.fit(model[2], (model[:2](x).detach(), y), kind, prior_precision=PRIOR)
    assert_close(la.predict(x), alone.predict(model[:2](x).detach()))
    assert_close(la.log_evidence(), alone.log_evidence())


def test_binary_outputs_take_the_probit_of_mackay():
    model, x = nn.Linear(3, 1).double(), torch.randn(N, 3).double()
    y = torch.randint(2, (N, 1)).double()
    la = Laplace.fit(model, (x, y), PMatDense, "classif_binary_logits")
    kappa = 1 / (1 + math.pi / 8 * la.variance(x)).sqrt()
    assert_close(la.predict(x), (kappa * model(x)).sigmoid().detach())
    with pytest.raises(ValueError, match="bridge"):
        la.predict(x, link="bridge")


def test_tokens_that_do_not_count_are_left_out_of_the_evidence():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3)).double()
    x, y = torch.randint(5, (6, 7)), torch.randint(3, (6, 7))
    y[:, 4:] = -100
    la = Laplace.fit(model, (x, y), PMatDiag, "token_logits")
    cut = Laplace.fit(model, (x[:, :4], y[:, :4]), PMatDiag, "token_logits")
    assert_close(la.log_evidence(), cut.log_evidence())
    assert la.predict(x).shape == (6, 7, 3)


# ------------------------------------------------------------------------------------------ more examples, and state


@each_kind
def test_further_examples_join_as_if_all_had_been_there(kind):
    model, (x, y) = classifier(), examples()
    la = Laplace.fit(model, (x[:15], y[:15]), kind)
    la.log_evidence()
    la.update((x[15:], y[15:]))
    assert la.F.n_examples == N
    if kind is not PMatEKFAC:  # which stays in the eigenbasis of the first examples
        assert_close(la.log_evidence(), Laplace.fit(model, (x, y), kind).log_evidence())


@each_kind
def test_a_state_of_tensors_goes_through_safetensors_and_on(kind):
    model, (x, y) = classifier(), examples()
    first = Laplace.fit(model, (x[:15], y[:15]), kind).tune()
    second = Laplace.fit(model, (x[:3], y[:3]), kind)
    second.load_state_dict(load(save(first.state_dict())))
    assert second.log_evidence() == first.log_evidence()
    assert torch.equal(second.predict(x), first.predict(x))
    first.update((x[15:], y[15:])), second.update((x[15:], y[15:]))
    assert second.log_evidence() == first.log_evidence()


def test_a_matrix_that_was_estimated_elsewhere_serves_predictions():
    model, (x, y) = classifier(), examples()
    la = Laplace(model, FIM(model, (x,), PMatKFAC), "classif_logits", PRIOR)
    assert_close(la.predict(x), Laplace.fit(model, (x, y), PMatKFAC, prior_precision=PRIOR).predict(x))
    with pytest.raises(ValueError, match=r"Laplace\.fit"):
        la.log_evidence()


def test_dict_batches_with_a_function_are_as_tuples():
    model, (x, y) = classifier(), examples()
    plain = Laplace.fit(model, (x, y), PMatKFAC)
    batch = {"x": x, "labels": y}
    named = Laplace.fit(model, batch, PMatKFAC, function=lambda batch: model(batch["x"]))
    assert_close(named.log_evidence(), plain.log_evidence())
    assert_close(named.predict({"x": x}), plain.predict(x))


@pytest.mark.parametrize("kind", [PMatDense, PMatDiag, PMatKFAC, PMatEKFAC])
def test_one_example_with_dead_units_and_a_zero_column_is_finite_in_float32(kind):
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3))
    with torch.no_grad():
        model[0].bias[:2] = -100.0
    x, y = torch.tensor([[1.0, 0.0, 2.0]]), torch.tensor([1])
    la = Laplace.fit(model, (x, y), kind).tune()
    assert la.log_evidence().isfinite() and la.predict(x).isfinite().all() and la.sample(2).isfinite().all()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"likelihood": "normal"}, "Unknown likelihood"),
        ({"prior_precision": torch.ones(3)}, "prior_precision"),
        ({"prior_precision": -1.0}, "positive"),
    ],
)
def test_what_can_not_be_is_refused(change, match):
    with pytest.raises(ValueError, match=match):
        Laplace.fit(classifier(), examples(), PMatDiag, **change)


def test_an_unknown_link_and_a_state_of_something_else_are_refused():
    la = Laplace.fit(classifier(), examples(), PMatDiag)
    with pytest.raises(ValueError, match="Unknown link"):
        la.predict(examples()[0], link="logit")
    with pytest.raises(ValueError, match="not the state_dict"):
        la.load_state_dict(classifier().state_dict())
    other = Laplace.fit(nn.Linear(3, 1), (torch.randn(4, 3), torch.randn(4, 1)), PMatDiag, "regression")
    with pytest.raises(ValueError, match="regression"):
        la.load_state_dict(other.state_dict())
