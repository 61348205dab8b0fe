"""`nngeo.descent.backward` and `mtl_backward`: a pass of Jacobian descent, in the styles that users of TorchJD know."""

from __future__ import annotations

import doctest
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import nngeo.descent as torchjd
from nngeo.descent import aggregation
from nngeo.descent.aggregation.base import GramianWeightedAggregator, GramianWeighting
from nngeo.descent.aggregation.mean import Mean
from nngeo.descent.autojac import combine, onepass
from nngeo.descent.backward import KEPT_ROWS
from tests.cases import CASES, Case
from tests.reference import outputs


class Ranked(GramianWeighting):
    """Weights that tell every entry of a Gramian apart: a softmax of G (1, 2, ..., m) / tr G."""

    def weights(self, gramian: Tensor) -> Tensor:
        return (gramian @ torch.arange(1.0, len(gramian) + 1).to(gramian) / gramian.trace()).softmax(0)


class Largest:
    """Not an Aggregator but a function of the Jacobian: in every coordinate its largest entry."""

    def __call__(self, matrix: Tensor) -> Tensor:
        return matrix.amax(0)


AGGREGATORS: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
    "ranked": lambda: GramianWeightedAggregator(Ranked()),
    "mean": Mean,
    "function": Largest,
}


class Tied(nn.Module):
    """A weight used three times, also by its parent, and a layer without influence."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.other = nn.Linear(4, 4)
        self.other.weight = self.layer.weight
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.other(torch.tanh(self.layer(x)))) @ self.layer.weight[:, :1]


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)),
    "tied": Tied,
}


def losses_of(model: nn.Module, m: int = 12) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(m, 4, dtype=torch.float64, generator=generator)
    return nn.functional.mse_loss(model(x), x.sum(1, keepdim=True), reduction="none")[:, 0]


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    return NETWORKS[name]().double()


def matrix_of(losses: Tensor, parameters: list[Tensor]) -> Tensor:
    """The Jacobian (m, n), row by row; the graph is kept."""
    options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    found = [torch.autograd.grad(loss, parameters, **options) for loss in losses.flatten()]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in found])


def grads(parameters) -> Tensor:
    return torch.cat([p.grad.flatten() for p in parameters])


@pytest.fixture(autouse=True)
def no_jacobian_is_small(monkeypatch):
    """Networks of a test's size take the ways that are for large ones."""
    monkeypatch.setattr(combine, "SMALL", 0)


@pytest.fixture
def model() -> nn.Module:
    return network("mlp")


@pytest.mark.parametrize("chunk", [None, 1, 5, 100])
@pytest.mark.parametrize("m", [1, 2, KEPT_ROWS, KEPT_ROWS + 1, 12])
@pytest.mark.parametrize("aggregator", AGGREGATORS)
@pytest.mark.parametrize("name", NETWORKS)
def test_grad_is_the_aggregated_jacobian(name, aggregator, m, chunk):
    model = network(name)
    losses, parameters = losses_of(model, m), list(model.parameters())
    A = AGGREGATORS[aggregator]()
    matrix = matrix_of(losses, parameters)
    weights = torchjd.backward(losses, parameters, A, parallel_chunk_size=chunk)
    assert_close(grads(parameters), A(matrix), rtol=1e-9, atol=1e-12)
    assert weights is None if aggregator == "function" else torch.allclose(weights, A.weighting(matrix))


@pytest.mark.parametrize("m", [2, 12])
@pytest.mark.parametrize("aggregator", AGGREGATORS)
@pytest.mark.parametrize("name", NETWORKS)
def test_small_jacobians_are_joined_for_every_aggregator(name, aggregator, m, monkeypatch):
    monkeypatch.setattr(combine, "SMALL", 2**20)
    test_grad_is_the_aggregated_jacobian(name, aggregator, m, None)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_the_gramian_of_every_network_is_that_of_its_jacobian(case: Case):
    model = case.make()
    part = outputs(model, case.batch(), case.function(model)).flatten()[: KEPT_ROWS + 2]
    parameters = [p for p in model.parameters() if p.requires_grad]
    matrix = matrix_of(part, parameters)
    A = GramianWeightedAggregator(Ranked())
    assert_close(torchjd.backward(part, parameters, A), Ranked()(matrix @ matrix.T), rtol=1e-8, atol=1e-10)
    assert_close(grads(parameters), A(matrix), rtol=1e-8, atol=1e-10)


EVERY: list[aggregation.Aggregator] = [
    aggregation.AlignedMTL(),
    aggregation.CAGrad(c=0.5),
    aggregation.ConFIG(),
    aggregation.Constant(torch.linspace(-1, 2, 10)),
    aggregation.DualProj(),
    aggregation.ExcessMTL(),
    aggregation.FairGrad(alpha=1.0),
    aggregation.GradDrop(),
    aggregation.GradVac(),
    aggregation.IMTLG(),
    aggregation.Krum(n_byzantine=1, n_selected=3),
    aggregation.MGDA(),
    aggregation.NashMTL(n_tasks=10),
    aggregation.PCD(),
    aggregation.PCGrad(),
    aggregation.Random(),
    aggregation.Sum(),
    aggregation.TrimmedMean(trim_number=2),
    aggregation.UPGrad(),
    aggregation.UPGrad(strict=True),
]


@pytest.mark.parametrize("two_steps", [False, True])
@pytest.mark.parametrize("A", EVERY, ids=lambda A: type(A).__name__)
def test_every_aggregator_gets_what_it_needs(model, A, two_steps):
    losses, parameters = losses_of(model, 10), list(model.parameters())
    matrix = matrix_of(losses, parameters)
    torch.manual_seed(0)
    expected = deepcopy(A)(matrix)
    torch.manual_seed(0)
    A = deepcopy(A)  # some remember their calls
    if two_steps:
        torchjd.backward(losses)
        torchjd.jac_to_grad(parameters, A)
    else:
        torchjd.backward(losses, parameters, A)
    assert_close(grads(parameters), expected, rtol=1e-6, atol=1e-9)


STYLES: dict[str, Callable[[Tensor, list[Tensor], object], object]] = {
    "tensors, inputs, A": lambda losses, ps, A: torchjd.backward(losses, iter(ps), A),
    "A=": lambda losses, ps, A: torchjd.backward(losses, ps, A=A),
    "inputs=, A=": lambda losses, ps, A: torchjd.backward(losses, inputs=ps, A=A),
    "aggregator=": lambda losses, ps, A: torchjd.backward(losses, inputs=ps, aggregator=A),
    "tensors, A": lambda losses, ps, A: torchjd.backward(losses, A),
    "tensors, A, inputs": lambda losses, ps, A: torchjd.backward(losses, A, ps),
    "tensors, A, inputs=": lambda losses, ps, A: torchjd.backward(losses, aggregator=A, inputs=ps),
    "list of scalars": lambda losses, ps, A: torchjd.backward(list(losses.unbind()), ps, A),
    "retain_graph by position": lambda losses, ps, A: torchjd.backward(losses, ps, A, True, 4),
    "two steps": lambda losses, ps, A: (torchjd.backward(losses), torchjd.autojac.jac_to_grad(ps, A)),
    "two steps, inputs": lambda losses, ps, A: (
        torchjd.backward(losses, inputs=ps),
        torchjd.autojac.jac_to_grad(ps, A),
    ),
}


@pytest.mark.parametrize("style", STYLES)
def test_every_style_of_calling_does_the_same(model, style):
    A = GramianWeightedAggregator(Ranked())
    parameters = list(model.parameters())
    losses = losses_of(model)
    expected = A(matrix_of(losses, parameters))
    STYLES[style](losses, parameters, A)
    assert_close(grads(parameters), expected)
    assert not any(hasattr(p, "jac") for p in parameters)


def test_grad_accumulates_in_place(model):
    torchjd.backward(losses_of(model), model.parameters(), Mean())
    once, held = grads(model.parameters()), [p.grad for p in model.parameters()]
    torchjd.backward(losses_of(model), model.parameters(), Mean())
    assert_close(grads(model.parameters()), 2 * once)
    assert all(p.grad is grad for p, grad in zip(model.parameters(), held, strict=True))


@pytest.mark.parametrize("m", [2, 12])
@pytest.mark.parametrize("aggregator", AGGREGATORS)
def test_the_graph_is_freed_unless_it_is_retained(model, aggregator, m):
    losses, A = losses_of(model, m), AGGREGATORS[aggregator]()
    torchjd.backward(losses, model.parameters(), A, retain_graph=True)
    torchjd.backward(losses, model.parameters(), A)
    with pytest.raises(RuntimeError, match="second time"):
        torchjd.backward(losses, model.parameters(), A)


def test_some_inputs_only_get_gradients_and_weights_from_them_alone(model):
    losses = losses_of(model)
    part = list(model[0].parameters())
    matrix = matrix_of(losses, part)
    weights = torchjd.backward(losses, part, GramianWeightedAggregator(Ranked()))
    assert_close(weights, Ranked()(matrix @ matrix.T))
    assert all(p.grad is None for p in model[2].parameters())


@pytest.mark.parametrize("m", [3, 12])
def test_intermediate_tensors_and_what_lies_below_them_are_inputs_together(model, m):
    h = model[0](torch.randn(m, 4, dtype=torch.float64))
    h.retain_grad()
    losses = model[1:](h).square()[:, 0]
    parameters = [h, *model[0].parameters()]
    matrix = matrix_of(losses, parameters)
    h.grad = None
    weights = torchjd.backward(losses, parameters, GramianWeightedAggregator(Ranked()))
    assert_close(weights, Ranked()(matrix @ matrix.T))
    assert_close(grads(parameters), weights @ matrix)


def test_cotangents_may_be_given(model):
    losses = losses_of(model)
    mix = torch.randn(11, 12, dtype=torch.float64)
    expected = GramianWeightedAggregator(Ranked())(mix @ matrix_of(losses, list(model.parameters())))
    torchjd.backward(losses, model.parameters(), GramianWeightedAggregator(Ranked()), jac_tensors=mix)
    assert_close(grads(model.parameters()), expected)


def test_what_needs_the_gramian_only_never_joins_the_jacobian(model, monkeypatch):
    def joins(*args: object, **options: object) -> Tensor:
        raise AssertionError("the Jacobian was joined")

    monkeypatch.setattr(torch, "cat", joins)
    for m in (3, 12):
        torchjd.backward(losses_of(model, m), model.parameters(), GramianWeightedAggregator(Ranked()))
        torchjd.backward(losses_of(model, m), model.parameters(), Mean())
    with pytest.raises(AssertionError, match="joined"):
        torchjd.backward(losses_of(model), model.parameters(), Largest())


def test_one_parameter_at_a_time_is_held(model, monkeypatch):
    sizes: list[int] = []

    def products(jacobian: Tensor) -> Tensor:
        sizes.append(jacobian.numel())
        return combine.products(jacobian)

    monkeypatch.setattr(onepass, "products", products)
    torchjd.backward(losses_of(model), model.parameters(), GramianWeightedAggregator(Ranked()))
    assert sorted(sizes) == sorted(12 * p.numel() for p in model.parameters())


def test_a_mean_is_one_plain_backward(model, monkeypatch):
    expected = torch.autograd.grad(losses_of(model).mean(), list(model.parameters()))
    monkeypatch.delattr(torch.func, "vmap")
    torchjd.backward(losses_of(model), model.parameters(), Mean())
    assert_close([p.grad for p in model.parameters()], list(expected))


def test_hooks_of_the_user_stay_and_ours_go(model):
    seen: list[Tensor] = []
    model[0].weight.register_hook(lambda gradient: seen.append(gradient))
    torchjd.backward(losses_of(model), model.parameters(), GramianWeightedAggregator(Ranked()))
    assert len(model[0].weight._backward_hooks) == 1
    assert not model[0].bias._backward_hooks
    assert seen


class Fails(GramianWeighting):
    def weights(self, gramian: Tensor) -> Tensor:
        raise ZeroDivisionError


@pytest.mark.parametrize("m", [3, 12])
def test_an_aggregator_that_raises_leaves_everything(model, m):
    with pytest.raises(ZeroDivisionError):
        torchjd.backward(losses_of(model, m), model.parameters(), GramianWeightedAggregator(Fails()))
    assert all(p.grad is None and not hasattr(p, "jac") for p in model.parameters())
    assert not any(p._backward_hooks for p in model.parameters())


def test_losses_that_are_not_finite_leave_everything(model):
    with pytest.raises(ValueError, match="NaN or infinite"):
        torchjd.backward(losses_of(model) * torch.inf, model.parameters(), GramianWeightedAggregator(Ranked()))
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    "call, kind, message",
    [
        (
            lambda m, A: torchjd.backward(losses_of(m), m, A),
            TypeError,
            r"inputs should be tensors.*model.parameters\(\)",
        ),
        (lambda m, A: torchjd.backward(losses_of(m), [], A), ValueError, "inputs is empty"),
        (lambda m, A: torchjd.backward(losses_of(m), m.parameters(), "UPGrad"), TypeError, "A should be an aggregator"),
        (
            lambda m, A: torchjd.backward(losses_of(m), m.parameters(), Mean),
            TypeError,
            r"A is the class Mean; .* Mean\(\)",
        ),
        (lambda m, A: torchjd.backward(losses_of(m), Mean), TypeError, r"A is the class Mean; .* Mean\(\)"),
        (lambda m, A: torchjd.backward(losses_of(m), aggregator=Mean), TypeError, "aggregator is the class Mean"),
        (
            lambda m, A: torchjd.backward(losses_of(m), lambda j: [1.0]),
            TypeError,
            "inputs should be a tensor or several",
        ),
        (lambda m, A: torchjd.backward(losses_of(m), A=lambda j: [1.0]), TypeError, "returned list; it should return"),
        (
            lambda m, A: torchjd.mtl_backward(losses_of(m).sum(), m[0].weight * 1, Mean),
            TypeError,
            "A is the class Mean",
        ),
        (lambda m, A: torchjd.backward(losses_of(m), A, aggregator=A), TypeError, "the same argument"),
        (lambda m, A: torchjd.backward([], m.parameters(), A), ValueError, "tensors is empty"),
        (lambda m, A: torchjd.backward(losses_of(m), m.parameters(), A, False, 0), ValueError, "parallel_chunk_size"),
        (lambda m, A: torchjd.backward(losses_of(m), [m[0].weight * 1], A), ValueError, r"inputs\[0\].*retain_grad"),
        (lambda m, A: torchjd.backward(losses_of(m).detach(), A), ValueError, r"tensors\[0\] does not require grad"),
        (
            lambda m, A: torchjd.mtl_backward(losses_of(m).sum(), m[0].weight * 1, 3),
            TypeError,
            "A should be an aggregator",
        ),
    ],
)
def test_an_error_names_the_argument(model, call, kind, message):
    with pytest.raises(kind, match=message):
        call(model, Mean())


@pytest.mark.parametrize("form", ["tensor", "list"])
def test_one_loss_is_said_to_leave_nothing_to_aggregate(model, form):
    loss = losses_of(model).mean()
    expected = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    with pytest.warns(UserWarning, match='one loss.*reduction="none"'):
        torchjd.backward(loss if form == "tensor" else [loss], model.parameters(), Mean())
    assert_close([p.grad for p in model.parameters()], list(expected))


@pytest.mark.parametrize("m", [3, 12])
def test_autocast_changes_nothing(model, m):
    losses = losses_of(model, m).float()
    expected = torchjd.backward(losses, model.parameters(), GramianWeightedAggregator(Ranked()), True)
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torchjd.backward(losses, model.parameters(), GramianWeightedAggregator(Ranked()))
    assert_close((found, [p.grad for p in model.parameters()]), (expected, gradients), rtol=0, atol=0)


def test_frozen_parameters_are_named_with_the_fix(model):
    model[0].requires_grad_(False)
    with pytest.raises(ValueError, match=r"inputs\[0\], of shape \(5, 4\), does not require grad.*if p.requires_grad"):
        torchjd.backward(losses_of(model), model.parameters(), Mean())


def test_the_snippet_of_torchjd_runs_with_another_import():
    from torch.nn import Linear, MSELoss, ReLU, Sequential
    from torch.optim import SGD

    from nngeo.descent.aggregation import UPGrad

    torch.manual_seed(0)
    model = Sequential(Linear(10, 5), ReLU(), Linear(5, 1))
    optimizer = SGD(model.parameters(), lr=0.1)
    A = UPGrad()
    input = torch.randn(16, 10)
    target = input.sum(dim=1, keepdim=True)
    loss_fn = MSELoss(reduction="none")
    output = model(input)
    losses = loss_fn(output, target)
    optimizer.zero_grad()
    torchjd.backward(losses, model.parameters(), A)
    optimizer.step()
    assert loss_fn(model(input), target).mean() < losses.mean()


@pytest.mark.parametrize("name", ["backward", "mtl_backward", "jac", "jac_to_grad", "Engine", "autojac", "autogram"])
def test_the_names_are_there(name):
    assert name in torchjd.__all__ and hasattr(torchjd, name)


def test_the_examples_of_the_page_run():
    page = Path(__file__).parent.parent / "docs" / "descent.rst"
    found = doctest.testfile(str(page), module_relative=False, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert found.attempted > 30
    assert found.failed == 0


def test_the_scale_of_mixed_precision_divides_out(model):
    A = GramianWeightedAggregator(Ranked())
    torchjd.backward(losses_of(model), model.parameters(), A)
    expected = grads(model.parameters()).clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer.zero_grad()
    scaler = torch.amp.GradScaler("cpu")
    torchjd.backward(scaler.scale(losses_of(model)), model.parameters(), A)
    scaler.unscale_(optimizer)
    assert_close(grads(model.parameters()), expected)


# Several tasks


class Trunk(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(4, 3)
        self.heads = nn.ModuleList([nn.Linear(3, 1) for _ in range(3)])

    def losses(self) -> tuple[list[Tensor], Tensor]:
        features = torch.tanh(self.trunk(torch.linspace(-1, 1, 8, dtype=torch.float64).view(2, 4)))
        return [head(features).square().mean() for head in self.heads], features


@pytest.mark.parametrize("aggregator", AGGREGATORS)
@pytest.mark.parametrize("style", ["A by position", "aggregator=", "A=", "two steps"])
def test_mtl_backward_aggregates_the_trunk(style, aggregator):
    torch.manual_seed(0)
    tasks = Trunk().double()
    losses, features = tasks.losses()
    A = AGGREGATORS[aggregator]()
    matrix = matrix_of(torch.stack(losses), list(tasks.trunk.parameters()))
    own = matrix_of(sum(losses), list(tasks.heads.parameters()))[0]
    if style == "two steps":
        torchjd.mtl_backward(losses, features)
        torchjd.autojac.jac_to_grad(tasks.trunk.parameters(), A)
    elif style == "A by position":
        torchjd.mtl_backward(losses, [features], A)
    else:
        torchjd.mtl_backward(losses, features, **{style[:-1]: A})
    assert_close(grads(tasks.trunk.parameters()), A(matrix))
    assert_close(grads(tasks.heads.parameters()), own)


def test_mtl_backward_without_shared_parameters_has_nothing_to_aggregate():
    losses, features = Trunk().double().losses()
    with pytest.raises(ValueError, match="shared_params is empty"):
        torchjd.mtl_backward(losses, features, Mean(), shared_params=[])
