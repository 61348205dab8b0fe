"""What goes on inside of Jacobian products: plans, facts that are remembered, fallbacks, estimates."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from nngeo import LayerCollection
from nngeo.products import Dense, Diagonal, Factor, Softmax, jacobian, jmjTp, jTmjp, jvp
from nngeo.products.differential import unit_vectors
from nngeo.products.evaluation import Evaluation
from nngeo.products.metric import Identity
from nngeo.products.opening import differential
from nngeo.products.planner import cheapest
from nngeo.products.weights import WeightDifferential
from tests import networks

DECODER = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 64)).double()
ENCODER = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 2)).double()


def reals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Plans


def test_a_decoder_is_differentiated_by_columns():
    with differential(DECODER, reals(3, 2), "input") as at:
        assert at.by_columns and cheapest(at, Identity(), "dense", False).way == "whole"


def test_an_encoder_is_differentiated_by_rows():
    with differential(ENCODER, reals(3, 64), "input") as at:
        assert not at.by_columns


def test_a_metric_of_rank_one_is_pulled_back_by_its_factor():
    with differential(DECODER, reals(3, 2), "input") as at:
        assert cheapest(at, Factor(reals(64, 1)), "dense", False).way == "factor"


def test_a_weight_diagonal_is_a_sum_of_squares():
    with differential(ENCODER, reals(3, 64), "weight") as at:
        plan = cheapest(at, Identity(), "diag", False)
        assert plan.way == "factor" and plan.elements < at.domain.d


@pytest.mark.parametrize("wrt", ["input", "weight"])
@pytest.mark.parametrize("result", ["dense", "diag", "trace"])
@pytest.mark.parametrize("reduce", [None, "mean"])
def test_a_small_budget_changes_nothing(wrt, result, reduce):
    x, metric = reals(5, 64), Softmax(reals(5, 2))
    whole = jTmjp(ENCODER, x, metric, wrt, result=result, reduce=reduce)
    assert_close(jTmjp(ENCODER, x, metric, wrt, result=result, reduce=reduce, budget=50), whole)


def test_factors_of_all_examples_stand_side_by_side():
    x = reals(3, 64)
    factor = jTmjp(ENCODER, x, None, result="factor", reduce="mean")
    assert_close(factor @ factor.mT, jTmjp(ENCODER, x, reduce="mean"))


def test_results_that_can_not_fit_are_refused():
    with pytest.raises(MemoryError, match=r"takes .* GiB .*result='blocks', 'diag', 'factor' or 'trace'"):
        jTmjp(nn.Linear(3000, 3000), torch.zeros(4, 3000), None, "weight")


# Sums over the gradients of a layer


class First(nn.Module):
    """The first of several tensors."""

    def forward(self, x: tuple[Tensor, ...]) -> Tensor:
        return x[0]


RECORDED = {
    "linear": (lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), reals(4, 3)),
    "positions": (lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2, bias=False)), reals(4, 5, 3)),
    "long": (lambda: nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1)), reals(4, 30, 2)),
    "convolution": (lambda: nn.Sequential(nn.Conv2d(2, 4, 2, groups=2), nn.Tanh()), reals(4, 2, 3, 3)),
    "transposed": (networks.conv_transpose2d, reals(4, 2, 2, 3)),
    "normalized": (networks.layer_norm, reals(4, 4, 3)),
    "recurrent": (
        lambda: networks.Net(lambda net, x: net.rnn(x)[0], rnn=nn.GRU(3, 2, batch_first=True)),
        reals(4, 2, 3),
    ),
    "embedding": (networks.token_mlp, torch.arange(12).reshape(4, 3) % 5),
}


@pytest.fixture(params=RECORDED)
def recorded(request):
    build, x = RECORDED[request.param]
    torch.manual_seed(1)
    model = build().double().eval()
    evaluation = Evaluation.of(model, x, None)
    return WeightDifferential(evaluation, LayerCollection.from_model(model), 2**24)


def test_squares_norms_and_kernels_are_those_of_the_rows(recorded):
    c = unit_vectors(recorded.codomain, 0, recorded.codomain.d)
    rows = recorded.pull(c)
    assert_close(recorded.squares(c), rows.square().sum(0))
    assert_close(recorded.total_squares(c), rows.square().sum((0, 1)))
    assert_close(recorded.norms(c), rows.square().sum(-1))
    assert_close(recorded.kernel(recorded), torch.einsum("kbn,lbn->bkl", rows, rows))


def test_kernels_of_two_batches_are_those_of_the_rows(recorded):
    evaluation = recorded.evaluation
    shifted = Evaluation.of(evaluation.model, evaluation.batch.tensors()[0].flip(0), None)
    other = WeightDifferential(shifted, recorded.layers, 2**24)
    c = unit_vectors(recorded.codomain, 0, recorded.codomain.d)
    assert_close(recorded.kernel(other), torch.einsum("kbn,lbn->bkl", recorded.pull(c), other.pull(c)))


# Ways to push tangents


class OnlyGradient(torch.autograd.Function):
    """Squares, with a gradient that has no derivative, and no forward-mode one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * g


class NoForwardMode(torch.autograd.Function):
    """Squares, without a forward-mode derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * g


def stopped(net: nn.Module, x: Tensor) -> Tensor:
    """Tangents pass torch.no_grad, gradients do not."""
    with torch.no_grad():
        scale = x.sum(1, keepdim=True)
    return net.body(x) * scale


WAYS = {
    "vectorized": lambda net, x: net.body(x),
    "looped": lambda net, x: net.body(x) if x.sum().item() > -100 else x,
    "reverse": lambda net, x: net.body(NoForwardMode.apply(x)),
    "none": lambda net, x: net.body(OnlyGradient.apply(x)),
    "stopped": stopped,
}


@pytest.mark.parametrize("wrt", ["input", "weight"])
@pytest.mark.parametrize("name", WAYS)
def test_tangents_agree_with_gradients(name, wrt):
    model, x = networks.Net(WAYS[name], body=nn.Linear(3, 4)).double(), reals(2, 3)
    J = jacobian(model, x, wrt)
    v = reals(2, J.shape[-1])
    assert_close(jvp(model, x, v, wrt), torch.einsum("bon,bn->bo", J, v))
    assert_close(jvp(model, x, v[0], wrt), J @ v[0])


@pytest.mark.parametrize("name", ["vectorized", "reverse", "none"])
def test_the_way_is_the_cheapest_that_agrees(name):
    model, x = networks.Net(WAYS[name], body=nn.Linear(3, 4)).double(), reals(2, 3)
    with differential(model, x, "input") as at:
        at.push(x[None])
        assert at.facts.way == name


def stopped_by_data(net: nn.Module, x: Tensor) -> Tensor:
    """Gradients stop for large data."""
    with torch.set_grad_enabled(bool((x < 100).all())):
        scale = net.body(x).tanh()
    return net.body(x) * scale


class Stopped(nn.Module):
    """Gradients stop if asked; the operations are the same."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3, 3).double()

    def forward(self, x: Tensor, stop: bool) -> Tensor:
        with torch.set_grad_enabled(not stop):
            scale = self.body(x).tanh()
        return self.body(x) * scale


@pytest.mark.parametrize("wrt", ["x", "weight"])
@pytest.mark.parametrize("order", [(False, True), (True, False)], ids=["on_first", "off_first"])
def test_tangents_agree_with_gradients_for_the_value_of_an_argument(order, wrt):
    model, x, v = Stopped(), reals(2, 3), reals(3 if wrt == "x" else 12, seed=1)
    found = [jvp(model, (x, stop), v, wrt) for stop in order]
    assert_close(found, [model_rows(partial(model, stop=stop), list(model.parameters()), x, wrt) @ v for stop in order])


@pytest.mark.parametrize("wrt", ["input", "weight"])
def test_tangents_agree_with_gradients_where_the_data_decide(wrt):
    model = networks.Net(stopped_by_data, body=nn.Linear(3, 3)).double()
    few = [reals(2, 3), 1 + 100 * reals(2, 3).abs(), reals(2, 3, seed=3)]
    v = reals(3 if wrt == "input" else 12, seed=1)
    found = [jvp(model, x, v, wrt) for x in few]
    rows = [model_rows(model, list(model.parameters()), x, wrt) for x in few]
    assert_close(found, [J @ v for J in rows])


def test_tangents_agree_with_gradients_where_padding_comes_later():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(4, 3, padding_idx=0), nn.Flatten(), nn.Linear(6, 5)).double()
    v = reals(47)
    for tokens in (torch.tensor([[1, 2], [3, 1]]), torch.tensor([[0, 2], [3, 0]])):
        J = jTmjp(model, tokens, None, "weight", result="factor").mT
        assert_close(jvp(model, tokens, v, "weight"), J @ v)


def model_rows(run: Callable[[Tensor], Tensor], parameters: list[Tensor], x: Tensor, wrt: str) -> Tensor:
    """J (b, o, n), by autograd, row by row."""
    leaf = x.clone().requires_grad_()
    at = parameters if wrt == "weight" else [leaf]
    out = run(leaf)

    def row(e: int, j: int) -> Tensor:
        grads = torch.autograd.grad(out[e, j], at, retain_graph=True)
        return torch.cat([g.flatten() for g in grads]) if wrt == "weight" else grads[0][e]

    return torch.stack([torch.stack([row(e, j) for j in range(out.shape[1])]) for e in range(len(x))])


# What is remembered


class Counting(nn.Module):
    """Counts its calls where nobody looks."""

    calls: list[int] = []  # noqa: RUF012 (of the class, so that models with other counts are the same)

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3, 2).double()

    def forward(self, x: Tensor) -> Tensor:
        Counting.calls.append(1)
        return self.body(x)


@pytest.mark.parametrize("wrt", ["input", "weight"])
@pytest.mark.parametrize("result", ["diag", "dense"])
def test_a_model_that_is_known_is_run_once(wrt, result):
    model, x = Counting(), reals(4, 3)
    jTmjp(model, x, None, wrt, result=result)
    Counting.calls.clear()
    jTmjp(model, x + 1, None, wrt, result=result)
    assert len(Counting.calls) == 1


def test_outputs_whose_shape_depends_on_the_data_are_refused():
    def run(net: nn.Module, x: Tensor) -> Tensor:
        return net.body(x)[:, : 2 if bool((x > 0).all()) else 3]

    model = networks.Net(run, body=nn.Linear(3, 4)).double()
    jacobian(model, reals(2, 3).abs())
    with pytest.raises(NotImplementedError, match=r"had|of the same shape"):
        jacobian(model, -reals(2, 3).abs())


def test_layers_in_place_leave_the_input_as_it_was():
    x = reals(2, 3)
    before = x.clone()
    J = jacobian(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 2).double()), x)
    assert_close(x, before)
    assert J.shape == (2, 2, 3)


# Estimates


@pytest.mark.parametrize("reduce", [None, "sum"])
@pytest.mark.parametrize("wrt", ["input", "weight"])
@pytest.mark.parametrize("result", ["diag", "dense", "trace"])
@pytest.mark.parametrize("kind", [Softmax, lambda d: Diagonal(d.abs()), lambda d: Dense(torch.diag_embed(d))],
                         ids=["softmax", "diagonal", "indefinite"])  # fmt: skip
def test_estimates_are_within_their_errors(kind, result, wrt, reduce):
    model, x = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 4)).double(), reals(2, 3)
    metric, generator = kind(reals(2, 4, seed=1)), torch.Generator().manual_seed(2)
    options: dict[str, Any] = {"result": result, "reduce": reduce}
    found = jTmjp(model, x, metric, wrt, method="mc", samples=400, generator=generator, **options)
    exact = jTmjp(model, x, metric, wrt, **options)
    assert found.standard_error.max() > 0
    assert ((found.value - exact).abs() <= 6 * found.standard_error + 1e-9).all()


def test_estimates_leave_the_global_random_numbers_alone():
    state = torch.get_rng_state()
    jmjTp(ENCODER, reals(2, 64), None, "weight", method="mc", result="diag")
    assert torch.equal(torch.get_rng_state(), state)
