"""Log likelihoods: values, gradients and Gauss-Newton matrices against autograd's, and at large logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

import nngeo.nn as nnj
from tests.jacobians import randn, rows, seeded

B = 4
MODELS = {
    "chain": (lambda: nnj.Sequential(nnj.Linear(3, 2), nnj.Tanh(), nnj.Linear(2, 3)), (3,)),
    "lone": (lambda: nnj.Linear(3, 3), (3,)),
    "torch": (lambda: nn.Sequential(nn.Linear(3, 4), nn.SiLU(), nn.Linear(4, 3)), (3,)),
    "tokens": (lambda: nnj.Sequential(nnj.Linear(2, 3), nnj.Tanh(), nnj.Linear(3, 3)), (2, 2)),
}
KINDS = [nnj.LogGaussian, nnj.LogBernoulli, nnj.LogBinaryBernoulli]


def targets(kind: type, val: Tensor) -> Tensor:
    if kind is nnj.LogBernoulli:
        return F.one_hot(randn(*val.shape, seed=5).argmax(-1), val.shape[-1]).double()
    return randn(*val.shape, seed=5).sigmoid()


def log_density(kind: type, val: Tensor, target: Tensor) -> Tensor:
    """By its definition, for one example."""
    if kind is nnj.LogGaussian:
        return -0.5 * ((val - target) ** 2).sum()
    if kind is nnj.LogBernoulli:
        p = val.exp() / val.exp().sum(-1, keepdim=True)
        return (target * p.log()).sum()
    p = 1 / (1 + (-val).exp())
    return (target * p.log() + (1 - target) * (1 - p).log()).sum()


def hessian(kind: type, val: Tensor, target: Tensor) -> Tensor:
    """(o, o), of one example, by autograd."""
    return torch.autograd.functional.hessian(
        lambda v: log_density(kind, v.reshape(val.shape), target), val.detach().reshape(-1)
    )


def aggregated(x, aggregate):
    if isinstance(x, list):
        return [aggregated(part, aggregate) for part in x]
    return {"sum": lambda: x.sum(0), "average": lambda: x.mean(0)}.get(aggregate, lambda: x)()


@pytest.fixture(params=[(model, kind) for model in MODELS for kind in KINDS], ids=lambda p: f"{p[0]}-{p[1].__name__}")
def case(request):
    name, kind = request.param
    make, shape = MODELS[name]
    model, x = seeded(make), randn(B, *shape)
    return kind, model, x, targets(kind, model(x))


def check(found, expected) -> None:
    assert_close(found, expected, rtol=1e-8, atol=1e-11)


AGGREGATES = ["return all", None, "sum", "average"]


@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_the_value_is_the_log_likelihood(case, aggregate):
    kind, model, x, target = case
    expected = torch.stack([log_density(kind, v, t) for v, t in zip(model(x), target, strict=True)]).detach()
    check(kind(aggregate_batch=aggregate).forward(x, model, target), aggregated(expected, aggregate))
    check(kind(aggregate)(x, model, target), aggregated(expected, aggregate))


@pytest.mark.parametrize("wrt", ["weight", "input"])
@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_the_gradient_is_autograds_and_ascends(case, aggregate, wrt):
    kind, model, x, target = case
    expected = []
    for e in range(B):
        leaf = x[e].clone().requires_grad_()
        by = [leaf] if wrt == "input" else list(model.parameters())
        grads = torch.autograd.grad(log_density(kind, model(leaf[None])[0], target[e]), by)
        expected.append(torch.cat([g.flatten() for g in grads]))
    found = kind(aggregate_batch=aggregate).gradient(x, model, target, wrt=wrt)
    check(found, aggregated(torch.stack(expected), aggregate))


@pytest.mark.parametrize("wrt", ["weight", "input"])
@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("shape", ["diag", "full"])
def test_the_gauss_newton_matrix_is_negative_semidefinite(case, shape, aggregate, wrt):
    kind, model, x, target = case
    j = rows(model, x, wrt)
    h = torch.stack([hessian(kind, v, t) for v, t in zip(model(x), target, strict=True)])
    expected = j.mT @ h @ j
    found = kind(aggregate, metric_shape=shape).ggn(x, model, wrt=wrt)
    if shape == "diag":
        check(found, aggregated(expected.diagonal(dim1=1, dim2=2), aggregate))
        assert (found <= 0).all()
    elif isinstance(found, list):
        sizes = [sum(p.numel() for p in layer.parameters()) for layer in model if list(layer.parameters())]
        blocks = [part.mT @ h @ part for part in j.split(sizes, -1)]
        check(found, aggregated(blocks, aggregate))
    else:
        check(found, aggregated(expected, aggregate))
    assert isinstance(found, list) == (shape == "full" and wrt == "weight" and isinstance(model, nn.Sequential))


def test_the_target_does_not_enter_the_gauss_newton_matrix(case):
    kind, model, x, target = case
    check(kind().ggn(x, model, target), kind().ggn(x, model))


@pytest.mark.parametrize("kind", KINDS)
def test_the_approximation_is_exact_for_a_lone_layer_and_a_diagonal_metric(kind):
    model, x = seeded(lambda: nnj.Sequential(nnj.Linear(3, 2), nnj.Tanh(), nnj.Linear(2, 3))), randn(B, 3)
    found = kind("sum", metric_backprop="approx").ggn(x, model)
    h = torch.stack([hessian(kind, v, t) for v, t in zip(model(x), targets(kind, model(x)), strict=True)])
    j = rows(model, x, "weight")
    expected = (j.mT @ torch.diag_embed(h.diagonal(dim1=1, dim2=2)) @ j).diagonal(dim1=1, dim2=2).sum(0)
    check(found, expected)


@pytest.mark.parametrize("logit", [100.0, 1000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", [nnj.LogBernoulli, nnj.LogBinaryBernoulli])
def test_large_logits_are_no_harm(kind, dtype, logit):
    val = torch.tensor([[logit, -logit, 0.0], [-logit, -logit, logit]], dtype=dtype)
    target = torch.tensor([[0, 1, 0], [0, 0, 1]], dtype=dtype)
    model = nn.Identity()
    value = kind().forward(val, model, target)
    expected = [-2 * logit, 0.0] if kind is nnj.LogBernoulli else [-2 * logit - torch.log(torch.tensor(2.0)), 0.0]
    assert_close(value, torch.tensor(expected, dtype=dtype), atol=1e-5, rtol=1e-6)
    gradient = kind().gradient(val, model, target, wrt="input")
    exact = target - (val.softmax(-1) if kind is nnj.LogBernoulli else val.sigmoid())
    assert_close(gradient, exact)
    for options in ({}, {"metric_shape": "full"}, {"metric_backprop": "approx"}):
        assert torch.isfinite(kind(**options).ggn(val, model, wrt="input")).all()


def test_integer_targets_are_classes():
    model, x = seeded(lambda: nnj.Linear(3, 3)), randn(B, 3)
    classes = torch.tensor([0, 2, 1, 1])
    one_hot = F.one_hot(classes, 3).double()
    check(nnj.LogBernoulli().gradient(x, model, classes), nnj.LogBernoulli().gradient(x, model, one_hot))


def test_soft_targets_that_do_not_sum_to_one_have_their_own_gradient():
    val, target = randn(2, 3), torch.tensor([[0.2, 0.1, 0.4], [1.0, 1.0, 0.0]], dtype=torch.float64)
    leaf = val.clone().requires_grad_()
    (expected,) = torch.autograd.grad((target * leaf.log_softmax(-1)).sum(), leaf)
    check(nnj.LogBernoulli().gradient(val, nn.Identity(), target, wrt="input"), expected)


@pytest.mark.parametrize("method", ["forward", "gradient"])
def test_a_missing_target_is_asked_for(method):
    with pytest.raises(ValueError, match="`target` is missing"):
        getattr(nnj.LogGaussian(), method)(torch.zeros(2, 3), nnj.Linear(3, 2))


def test_a_target_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(2, 2\)"):
        nnj.LogGaussian().forward(torch.zeros(2, 3), nnj.Linear(3, 2), torch.zeros(2, 3))


@pytest.mark.parametrize(
    "options",
    [
        {"aggregate_batch": "mean"},
        {"metric_shape": "block"},
        {"metric_backprop": "rough"},
        {"metric_shape": "full", "metric_backprop": "approx"},
    ],
)
def test_unknown_options_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        nnj.LogGaussian(**options)


def test_models_without_weights_have_no_weight_derivatives():
    x = torch.zeros(2, 3)
    assert nnj.LogGaussian().gradient(x, nnj.Tanh(), x) is None
    assert nnj.LogGaussian().ggn(x, nnj.Tanh()) is None


def test_an_ascent_on_the_log_likelihood_learns():
    model, x = seeded(lambda: nnj.Sequential(nnj.Linear(2, 8), nnj.Tanh(), nnj.Linear(8, 2))), randn(30, 2)
    target = F.one_hot((x[:, 0] > x[:, 1]).long(), 2)
    likelihood = nnj.LogBernoulli("average")
    before = likelihood(x, model, target)
    for _ in range(60):
        model.set_weight(model.get_weight() + likelihood.gradient(x, model, target))
    assert likelihood(x, model, target) > 0.3 * before


def test_the_base_class_is_where_nnj_has_it():
    assert nnj.log_likelihoods.LogLikelihood is nnj.LogLikelihood
