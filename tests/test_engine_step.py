"""A step of the engine leaves in `.grad` what the losses' backward pass with the same weights would."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from nngeo.descent.aggregation import Constant, ExcessMTL, ExcessMTLWeighting, GradDrop, Mean, MeanWeighting, Sum
from nngeo.descent.aggregation.base import Aggregator, GramianWeightedAggregator, GramianWeighting
from nngeo.descent.autogram import Engine
from tests import reference
from tests.engines import (
    EXACT,
    each_case,
    grads,
    jacobian,
    losses,
    mlp,
    scores,
    slow_accepted,
    weights,
    whole_losses,
)


class ByTrace(GramianWeighting):
    """Weights that depend on the Gramian."""

    def weights(self, gramian: Tensor) -> Tensor:
        return gramian.diagonal() / gramian.trace()


class ByTraceAggregator(GramianWeightedAggregator, of=ByTrace):
    """Its aggregator."""


class Largest(Aggregator):
    """No sum of gradients with weights."""

    def forward(self, matrix: Tensor) -> Tensor:
        return matrix.max(0).values


def by_backward(found: Tensor, parameters: list[nn.Parameter], w: Tensor) -> Tensor:
    """(P,), what `found.backward(w)` would add."""
    return w @ jacobian(found, parameters)


@each_case
@pytest.mark.parametrize("k", [0, 3])
def test_a_step_is_the_weighted_backward_pass(case, k):
    model = case.make()
    engine, parameters = Engine(model, batch_dim=0), reference.trainable(model)
    found = losses(case, model, k)
    w = weights(found.numel())
    expected = by_backward(found, parameters, w)
    with slow_accepted():
        assert_close(engine.step(found, lambda gramian: w), w)
    assert_close(grads(parameters), expected, **EXACT)


@each_case
def test_a_step_of_losses_of_the_batch_is_the_weighted_backward_pass(case):
    model = case.make()
    engine, parameters = Engine(model, batch_dim=None), reference.trainable(model)
    found, w = whole_losses(case, model), weights(3)
    expected = by_backward(found, parameters, w)
    engine.step(found, lambda gramian: w)
    assert_close(grads(parameters), expected, **EXACT)


@each_case
def test_a_step_in_blocks_is_the_same(case):
    model = case.make()
    engine, parameters = Engine(model, batch_dim=0), reference.trainable(model)
    found = losses(case, model, 2)
    w = weights(found.numel())
    expected = by_backward(found, parameters, w)
    with slow_accepted():
        engine.step(found, lambda gramian: w, block=4)
    assert_close(grads(parameters), expected, **EXACT)


@pytest.mark.parametrize("weighting", [ByTrace(), ByTraceAggregator(), lambda g: g.diagonal() / g.trace()])
def test_weights_come_from_the_gramian(weighting):
    model = mlp(3, 4, 2)
    engine, parameters = Engine(model, batch_dim=0), reference.trainable(model)
    found = scores(model(torch.randn(5, 3).double()))[:, 0]
    rows = jacobian(found, parameters)
    w = engine.step(found, weighting)
    assert_close(w, rows.square().sum(1) / rows.square().sum(), **EXACT)
    assert_close(grads(parameters), w @ rows, **EXACT)


def test_gradients_accumulate():
    model = mlp(3, 4, 2)
    engine, parameters = Engine(model, batch_dim=0), reference.trainable(model)
    total = torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float64)
    for _ in range(3):
        found, w = scores(model(torch.randn(5, 3).double()))[:, 0], weights(5)
        total += by_backward(found, parameters, w)
        engine.step(found, lambda gramian, w=w: w)
    assert_close(grads(parameters), total, **EXACT)


def test_no_two_gradients_share_memory():
    model = nn.Module()
    model.left, model.right = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    engine = Engine(model, batch_dim=None)
    for _ in range(2):
        engine.step((model.left + model.right).square(), lambda gramian: torch.ones(3))
    assert_close(model.left.grad, torch.full((3,), 8.0))
    assert_close(model.right.grad, torch.full((3,), 8.0))


def test_tensors_outside_of_the_modules_get_the_gradient_of_the_weighted_sum():
    model = mlp(3, 4, 2)
    engine, trunk = Engine(model[2], batch_dim=0), list(model[0].parameters())
    found, w = scores(model(torch.randn(5, 3).double()))[:, 0], weights(5)
    expected = by_backward(found, reference.trainable(model), w)
    engine.step(found, lambda gramian: w, others=trunk)
    assert_close(grads(reference.trainable(model)), expected, **EXACT)


def test_parameters_that_are_not_used_keep_no_gradient():
    model = nn.ModuleDict({"used": mlp(3, 2), "unused": mlp(3, 2)})
    engine = Engine(model, batch_dim=0)
    engine.step(model["used"](torch.randn(4, 3).double())[:, 0], lambda gramian: weights(4))
    assert all(p.grad is None for p in model["unused"].parameters())
    assert all(p.grad is not None for p in model["used"].parameters())


def test_sparse_gradients_stay_sparse():
    model = nn.Sequential(nn.Embedding(6, 3, sparse=True), nn.Flatten(), nn.Linear(6, 2)).double()
    engine, parameters = Engine(model, batch_dim=0), reference.trainable(model)
    found, w = scores(model(torch.randint(6, (4, 2))))[:, 0], weights(4)
    (expected,) = torch.autograd.grad(found, [model[0].weight], w, retain_graph=True)
    engine.step(found, lambda gramian: w)
    assert parameters[0].grad.is_sparse
    assert_close(parameters[0].grad.to_dense(), expected.to_dense(), **EXACT)


def test_a_graph_that_is_retained_can_be_used_again():
    model = mlp(3, 4, 2)
    engine, parameters = Engine(model, batch_dim=0), reference.trainable(model)
    found, w = scores(model(torch.randn(5, 3).double()))[:, 0], weights(5)
    rows = jacobian(found, parameters)
    engine.step(found, lambda gramian: w, retain_graph=True)
    assert_close(engine.compute_gramian(found), rows @ rows.T, **EXACT)
    found.backward(w)
    assert_close(grads(parameters), 2 * w @ rows, **EXACT)


def test_a_graph_that_is_not_retained_is_freed():
    model = mlp(3, 4, 2)
    engine = Engine(model, batch_dim=0)
    found = scores(model(torch.randn(5, 3).double()))[:, 0]
    engine.step(found, lambda gramian: weights(5))
    with pytest.raises(RuntimeError, match="second time"):
        found.sum().backward()


def test_what_is_no_weighting_of_gramians_is_refused():
    model = mlp(3, 4, 2)
    engine = Engine(model, batch_dim=0)
    found = scores(model(torch.randn(5, 3).double()))[:, 0]
    with pytest.raises(TypeError, match="nngeo.descent.backward"):
        engine.step(found, Largest(), retain_graph=True)
    with pytest.raises(ValueError, match="should give 5 weights for a Gramian of that size, found \\(4,\\)"):
        engine.step(found, lambda gramian: weights(4), retain_graph=True)
    assert all(p.grad is None for p in model.parameters())


WRONG = {
    "a class": ({"weighting": MeanWeighting}, r"the class MeanWeighting; make one of it, MeanWeighting\(\)"),
    "a list": ({"weighting": [0.5, 0.5]}, "should be a weighting, such as UPGradWeighting.*found list"),
    "others that are numbers": ({"others": [1.0]}, r"others\[0\] should be a tensor, found float"),
    "a block of a word": ({"block": "2"}, "`block` should be a whole number; got '2'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_arguments_of_a_step_are_checked(case):
    options, words = WRONG[case]
    model = nn.Linear(3, 2)
    losses = model(torch.randn(5, 3)).square().sum(1)
    with pytest.raises(TypeError, match=words):
        Engine(model, batch_dim=0).step(losses, **{"weighting": MeanWeighting(), **options})


def test_one_tensor_is_taken_for_others():
    model, scale = nn.Linear(3, 2), torch.ones(5, requires_grad=True)
    losses = model(torch.randn(5, 3)).square().sum(1)
    Engine(model, batch_dim=0).step(losses * scale, MeanWeighting(), others=scale)
    assert_close(scale.grad, losses.detach() / 5)


@pytest.mark.parametrize("weighting", [ExcessMTL(), ExcessMTLWeighting(), GradDrop()], ids=lambda w: type(w).__name__)
def test_what_needs_the_jacobian_is_refused(weighting):
    model = nn.Linear(3, 2)
    losses = model(torch.randn(5, 3)).square().sum(1)
    with pytest.raises(TypeError, match=f"{type(weighting).__name__}.*nngeo.descent.backward"):
        Engine(model, batch_dim=0).step(losses, weighting)


@pytest.mark.parametrize("aggregator", [Constant(torch.arange(5.0)), Mean(), Sum()], ids=lambda a: type(a).__name__)
def test_weights_that_read_no_values_are_those_of_the_aggregator(aggregator):
    model, x = nn.Linear(3, 2), torch.randn(5, 3)
    found = Engine(model, batch_dim=0).step(model(x).square().sum(1), aggregator)
    assert_close(found, aggregator.weighting(torch.ones(5, 4)))
