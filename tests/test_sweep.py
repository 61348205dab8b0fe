"""The sweep over data and its accounting, and what is made of it directly: Jacobians, kernels, GGN, Hessian."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

import nngeo
from nngeo import (
    GGN,
    NTK,
    FVector,
    Hessian,
    Jacobian,
    LayerCollection,
    PFMapImplicit,
    PMatBlockDiag,
    PMatDense,
    PMatDiag,
    PMatImplicit,
    PMatKFAC,
    PVector,
)
from nngeo.generators import accounting, plans, sizing
from nngeo.generators.batches import Batch
from nngeo.generators.sources import Source, candidates
from nngeo.linalg import outer
from nngeo.representations import quasidiag
from tests import networks, reference
from tests.cases import CASES, Case
from tests.contracts import (
    PMATS,
    cases_of,
    cases_with,
    converted,
    each_case,
    each_of,
    each_pair,
    loader,
    matrix,
    setting,
    unused_is_known,
)

pytestmark = unused_is_known

EXACT = {"rtol": 1e-8, "atol": 1e-10}


def sources(case: Case, dtype: torch.dtype = torch.float64) -> dict[str, Source]:
    """{layer name: the source that the accounting chose}."""
    model, batch = case.make().to(dtype), converted(case.batch(), dtype)
    layers = LayerCollection.from_model(model)
    return plans.Planner(model, case.function(model), layers, True).plan(Batch.of(batch)).sources


def rows(model: nn.Module, examples: Any, function: Any = None, **options: Any) -> Tensor:
    return Jacobian(model, examples, function, **options).to_torch()


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ------------------------------------------------------------------------------------------ Jacobians


@each_case
def test_jacobian_rows_are_autograd_rows(case):
    at = setting(case)
    found = Jacobian(at.model, at.batch, at.function)
    assert_close(found.to_torch(), at.jacobian, **EXACT)
    assert found.n_examples == case.n and found.size() == at.jacobian.shape


@each_case
def test_jacobian_rows_of_unequal_batches_are_autograd_rows(case):
    at = setting(case)
    assert_close(rows(at.model, at.batches, at.function), at.jacobian, **EXACT)


@each_case
def test_jacobian_rows_of_one_example_are_autograd_rows(case):
    at = setting(case)
    (*_, last) = reference.examples(at.batch)
    assert_close(rows(at.model, last, at.function), at.jacobian[:, -1:], **EXACT)


@each_case
def test_a_plan_made_on_one_batch_serves_batches_of_other_sizes(case):
    model, at = case.make(), setting(case)
    function = case.function(model)
    rows(model, reference.examples(at.batch)[0], function)
    assert_close(rows(model, at.batch, function), at.jacobian, **EXACT)


@each_case
def test_the_model_comes_back_as_it_was(case):
    model = case.make()
    parameters = list(model.parameters())
    parameters[0].grad = torch.ones_like(parameters[0])
    before = state(model)
    random = torch.get_rng_state()
    rows(model, case.batches(), case.function(model))
    nngeo.FIM(model, case.batches(), PMatImplicit, case.variant, function=case.function(model)).mv(
        setting(case).vector()
    )
    assert_close(state(model), before, rtol=0.0, atol=0.0)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True))


def state(model: nn.Module) -> dict[str, Any]:
    """Everything that a sweep might touch, as tensors and numbers."""
    found: dict[str, Any] = {f"tensor {name}": t.detach().clone() for name, t in model.state_dict().items()}
    for name, p in model.named_parameters():
        found[f"flag {name}"] = p.requires_grad
        found[f"grad {name}"] = torch.zeros(0) if p.grad is None else p.grad.clone()
    for name, module in model.named_modules():
        hooks = [module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks]
        found[f"module {name}"] = (module.training, *(len(hook) for hook in hooks), len(vars(module)))
    return found


# ------------------------------------------------------------------------------------------ rules


def forced(monkeypatch: pytest.MonkeyPatch, keep: Callable[[Source], bool]) -> None:
    """Let the accounting choose among some of the sources only."""
    monkeypatch.setattr(accounting, "candidates", lambda *args: (s for s in candidates(*args) if keep(s)))


@each_case
def test_fast_rules_equal_the_generic_rule(case, monkeypatch):
    forced(monkeypatch, lambda source: not source.fast)
    assert not any(source.fast for source in sources(case).values())
    model = case.make()
    assert_close(rows(model, case.batches(), case.function(model)), setting(case).jacobian, **EXACT)


@each_case
def test_the_whole_function_run_again_gives_the_same(case, monkeypatch):
    forced(monkeypatch, lambda source: not source.hosts)
    assert not any(source.hosts for source in sources(case).values())
    model = case.make()
    assert_close(rows(model, case.batches(), case.function(model)), setting(case).jacobian, **EXACT)


UNUSUAL = {"hidden", "layout", "no_batch_axis", "attention", "recurrent", "own_parameters", "generic", "differentiates"}


@each_of([case for case in CASES if not case.tags & UNUSUAL])
def test_rules_are_trusted_without_a_check_where_every_use_is_a_call(case):
    model = case.make()
    found = rows(model, case.batches(), case.function(model), check=False)
    assert_close(found, setting(case).jacobian, **EXACT)


FAST = [
    case
    for case in CASES
    if case.kronecker or ("norm" in case.tags and "attention" not in case.tags) or case.tags & {"tied", "frozen"}
]


@each_of(FAST)
def test_linear_maps_and_norms_are_served_by_fast_rules(case):
    slow = [name for name, source in sources(case).items() if not source.fast]
    assert slow == []


# ------------------------------------------------------------------------------------------ the accounting


def test_a_weight_used_by_its_parent_moves_the_layer_to_the_parent():
    found = sources(*cases_of("parent_uses_child"))
    assert found["inner"] == Source(("",)) and found["head"] == Source(("head",), fast=True)


def test_a_weight_used_by_the_function_moves_the_layer_to_the_function():
    found = sources(*cases_of("hidden_use"))
    assert found["inner"] == Source(()) and found["head"] == Source(("head",), fast=True)


def test_tied_weights_add_up_over_both_modules():
    found = sources(*cases_of("tied_linears"))
    assert found["0"] == Source(("0", "2"), fast=True)


def test_a_module_called_twice_keeps_its_fast_rule():
    found = sources(*cases_of("called_twice"))
    assert found["shared"] == Source(("shared",), fast=True)


def test_examples_folded_into_the_batch_keep_their_fast_rule():
    found = sources(*cases_of("folded_first"))
    assert found["body.0"] == Source(("body.0",), fast=True, position_major=True)
    assert sources(*cases_of("folded"))["body.0"] == Source(("body.0",), fast=True)


def test_a_layer_whose_output_is_broadcast_to_all_examples_keeps_its_fast_rule():
    found = sources(*cases_of("position_embedding"))
    assert found["pos"] == Source(("pos",), fast=True, added=True)


@each_of(cases_of("linear", "conv2d_groups", "layer_norm", "attention"))
def test_a_second_use_hidden_in_a_function_is_found_for_every_layer(case):
    """The penalty uses all parameters, so no layer's calls explain its gradient."""
    model = case.make()

    def function(x: Tensor, y: Tensor) -> Tensor:
        return model(x) * sum(p.square().sum() for p in model.parameters())

    assert_close(rows(model, case.batches(), function), reference.jacobian(model, case.batch(), function), **EXACT)


def test_a_weight_used_by_a_forward_hook_is_found():
    model = networks.mlp().double().eval()
    model[0].register_forward_hook(lambda module, args, out: out + F.linear(args[0], module.weight).square())
    batch = (drawn(5, 3), torch.zeros(5))
    assert_close(rows(model, batch), reference.jacobian(model, batch), **EXACT)


def test_a_hook_added_after_the_first_sweep_is_found():
    model, batch = networks.mlp().double().eval(), (drawn(5, 3), torch.zeros(5))
    rows(model, batch)
    model[0].register_forward_hook(lambda module, args, out: out + F.linear(args[0], module.weight).square())
    assert_close(rows(model, batch), reference.jacobian(model, batch), **EXACT)


def test_weights_tied_after_the_first_sweep_are_found():
    model, batch = networks.deep_linear().double(), (drawn(5, 3), drawn(5, 2))
    model[1] = nn.Linear(4, 3, bias=False).double()
    rows(model, batch)
    model[2].weight = nn.Parameter(model[2].weight.detach().clone())
    model[0].weight = nn.Parameter(model[0].weight.detach()[:, :3].clone())
    model[1].weight = nn.Parameter(model[0].weight.detach().T.clone())
    assert_close(rows(model, batch), reference.jacobian(model, batch), **EXACT)
    square = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    rows(square, batch)
    square[2].weight = square[0].weight
    assert_close(rows(square, batch), reference.jacobian(square, batch), **EXACT)


def test_a_forward_replaced_after_the_first_sweep_is_found():
    model, batch = networks.mlp().double().eval(), (drawn(5, 3), torch.zeros(5))
    rows(model, batch)
    first = model[0]
    first.forward = lambda x: F.linear(x, first.weight.square(), first.bias)
    assert_close(rows(model, batch), reference.jacobian(model, batch), **EXACT)


def test_a_function_that_changes_is_looked_at_again():
    model, batch = networks.hidden_use().double(), (drawn(5, 3), torch.zeros(5))
    rows(model, batch, lambda x, y: model(x))

    def function(x: Tensor, y: Tensor) -> Tensor:
        return F.linear(model(x).tanh(), model.inner.weight)

    assert_close(rows(model, batch, function), reference.jacobian(model, batch, function), **EXACT)


def test_parameters_frozen_after_the_first_sweep_leave_the_others_as_they_are():
    model, batch = networks.mlp().double().eval(), (drawn(5, 3), torch.zeros(5))
    rows(model, batch)
    model[0].weight.requires_grad_(False)
    assert_close(rows(model, batch), reference.jacobian(model, batch), **EXACT)


def test_a_parameter_that_stops_gradients_by_no_grad_is_no_trap_for_products():
    """Forward-mode tangents pass torch.no_grad, gradients do not."""

    def run(net: networks.Net, x: Tensor) -> Tensor:
        with torch.no_grad():
            stopped = net.probe(x)
        return net.head(net.body(x).tanh() + stopped + net.probe(x).sin())

    net = networks.Net(run, body=nn.Linear(3, 3), probe=nn.Linear(3, 3), head=nn.Linear(3, 2)).double()
    batch = (drawn(5, 3), drawn(5, 2))
    fisher = reference.fisher(net, batch, "regression")
    implicit = nngeo.FIM(net, batch, PMatImplicit, "regression")
    assert_close(implicit.to_torch(), fisher, **EXACT)
    implicit = nngeo.FIM(net, batch, PMatImplicit, "regression")
    implicit.mv(torch.zeros(len(fisher), dtype=torch.float64))
    v = drawn(len(fisher))
    assert_close(implicit.mv(v), fisher @ v, **EXACT)


def test_sizes_asked_before_products_change_nothing():
    def run(net: networks.Net, x: Tensor) -> Tensor:
        with torch.no_grad():
            stopped = net.body(x)
        return net.head(net.body(x).tanh() + stopped)

    net = networks.Net(run, body=nn.Linear(3, 3), head=nn.Linear(3, 2)).double()
    batch = (drawn(5, 3), drawn(5, 2))
    found = Jacobian(net, batch, representation=PFMapImplicit)
    j = reference.jacobian(net, batch)
    assert found.size() == j.shape
    v = drawn(j.shape[-1])
    layers = LayerCollection.from_model(net)
    assert_close(found.jvp(PVector(layers, vector_repr=v)).to_torch(), j @ v, **EXACT)


def sine(x: Tensor) -> Tensor:
    """sin, by a function that has a backward, but no forward-mode derivative."""

    class Sine(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x.sin()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return g * ctx.saved_tensors[0].cos()

    return Sine.apply(x)


def with_custom_function() -> nn.Module:
    parts = {"body": nn.Linear(3, 4), "head": nn.Linear(4, 2)}
    return networks.Net(lambda net, x: net.head(sine(net.body(x))), **parts)


def with_backward_hook() -> nn.Module:
    model = networks.mlp()
    model[0].register_full_backward_hook(lambda module, grad_input, grad_output: None)
    return model


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # of torch, whose inputs need no gradients
@pytest.mark.parametrize("build", [with_custom_function, with_backward_hook], ids=lambda build: build.__name__)
def test_functions_without_a_forward_mode_derivative_have_all_products(build):
    model, batch = build().double().eval(), (drawn(5, 3), torch.zeros(5))
    j, layers = reference.jacobian(model, batch), LayerCollection.from_model(model)
    assert_close(rows(model, batch), j, **EXACT)
    v = drawn(layers.numel())
    implicit = Jacobian(model, batch, representation=PFMapImplicit)
    assert_close(implicit.jvp(PVector(layers, vector_repr=v)).to_torch(), j @ v, **EXACT)


# Batches that are unlike the first one: right, or refused, but never silently wrong.


def test_positions_folded_in_front_are_found_after_a_batch_with_one_position():
    """With a single position both ways to fold are the same."""
    model = networks.folded("positions").double()
    batches = [(drawn(2, 1, 3), torch.zeros(2)), (drawn(3, 4, 3), torch.zeros(3))]
    expected = torch.cat([reference.jacobian(model, batch) for batch in batches], 1)
    assert_close(rows(model, batches), expected, **EXACT)
    assert_close(rows(model, batches[::-1]), torch.cat(expected.split([2, 3], 1)[::-1], 1), **EXACT)


def routed(net: networks.Net, x: Tensor) -> Tensor:
    """(b, t, 3) to (b, 2): each position goes through one of two experts."""
    flat = x.flatten(0, 1)
    first, out = flat[:, 0] > 0, flat.new_zeros(len(flat), 2)
    out[first], out[~first] = net.first(flat[first]), net.second(flat[~first])
    return out.unflatten(0, x.shape[:2]).tanh().sum(1)


ROUTES = {
    "one position each, then all": [[1, -1], [1, -1], [1, 1], [-1, -1]],
    "an expert that the first batch does not use": [[1, 1], [1, 1], [1, -1], [-1, 1]],
    "unequal numbers": [[1, -1], [1, -1], [1, 1], [1, -1]],
    "as many as examples, of others": [[1, -1], [1, -1], [1, -1], [-1, 1], [1, 1], [-1, -1]],
}


@pytest.mark.parametrize("route", ROUTES)
def test_experts_that_see_some_of_the_positions_are_right_or_refused(route):
    net = networks.Net(routed, first=nn.Linear(3, 2), second=nn.Linear(3, 2)).double()
    n = len(ROUTES[route])
    x = drawn(n, 2, 3)
    x[:, :, 0] = x[:, :, 0].abs() * torch.tensor(ROUTES[route], dtype=torch.float64)
    batches = [(x[:2], torch.zeros(2)), (x[2:], torch.zeros(n - 2))]
    try:
        found = rows(net, batches)
    except (ValueError, NotImplementedError) as error:
        assert "first" in str(error) or "second" in str(error)
        return
    assert_close(found, reference.jacobian(net, (x, torch.zeros(n))), **EXACT)


def test_a_layer_that_only_later_batches_use_is_right_or_refused_by_name():
    def run(net: networks.Net, x: Tensor) -> Tensor:
        return net.head(net.body(x) if float(x.sum()) > 0 else net.other(x))

    net = networks.Net(run, body=nn.Linear(3, 3), other=nn.Linear(3, 3), head=nn.Linear(3, 2)).double()
    batches = [(drawn(3, 3).abs(), torch.zeros(3)), (-drawn(3, 3).abs(), torch.zeros(3))]
    try:
        found = rows(net, batches)
    except (ValueError, NotImplementedError) as error:
        # Small batches are run together, where the sum is that of all examples.
        assert "'other'" in str(error) or "influence each other" in str(error)
        return
    assert_close(found, torch.cat([reference.jacobian(net, batch) for batch in batches], 1), **EXACT)


def test_a_function_kept_as_an_attribute_may_change():
    model, batch = networks.hidden_use().double(), (drawn(5, 3), torch.zeros(5))
    rows(model, batch)
    model.run = lambda net, x: F.linear(net.inner(x).tanh(), net.inner.weight)
    assert_close(rows(model, batch), reference.jacobian(model, batch), **EXACT)


class Unhashable:
    """A callable with equality but no hash, and without weak references."""

    __slots__ = ("model",)
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, model: nn.Module):
        self.model = model

    def __eq__(self, other: object) -> bool:
        return self is other

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        return 2.0 * self.model(x)


def test_any_callable_is_a_function():
    model, batch = networks.mlp().double().eval(), (drawn(5, 3), torch.zeros(5))
    assert_close(rows(model, batch, Unhashable(model)), 2.0 * reference.jacobian(model, batch), **EXACT)


@each_of(cases_with("hidden", "layout", "no_batch_axis", "attention", "tied", "reused", "own_parameters"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_accounting_chooses_the_same_in_low_precision(case, dtype):
    assert sources(case, dtype) == sources(case)


def test_products_of_a_bfloat16_model_are_float32():
    (case,) = cases_of("linear")
    at, model = setting(case), case.make().bfloat16()
    batch = converted(case.batch(), torch.bfloat16)
    v = PVector(at.layers, vector_repr=at.vector().float())
    implicit, whole = (Jacobian(model, batch, representation=r) for r in (PFMapImplicit, nngeo.PFMapDense))
    pushed = implicit.jvp(v).to_torch()
    assert pushed.dtype == whole.jvp(v).to_torch().dtype == implicit.vjp(FVector(pushed.float())).dtype == torch.float32
    assert_close(pushed, whole.jvp(v).to_torch(), rtol=0.05, atol=0.05)


def test_examples_that_influence_each_other_are_refused():
    model = networks.mlp().double().eval()
    with pytest.raises((ValueError, NotImplementedError), match="influence each other|layer '0'"):
        rows(model, (drawn(5, 3), torch.zeros(5)), lambda x, y: model(x) - model(x).mean(0))


def test_a_model_that_draws_random_numbers_is_refused():
    model = networks.mlp().double().eval()
    with pytest.raises(ValueError, match="depend on random numbers"):
        rows(model, (drawn(5, 3), torch.zeros(5)), lambda x, y: F.dropout(model(x), training=True))


def test_parameters_without_influence_are_named_in_a_warning():
    model, batch = networks.unused_layer().double(), (drawn(5, 3), torch.zeros(5))
    with pytest.warns(UserWarning, match="The outputs do not depend on unused.weight, unused.bias"):
        rows(model, batch)


# ------------------------------------------------------------------------------------------ chunks


def tiny_budgets(monkeypatch: pytest.MonkeyPatch) -> None:
    """One cotangent at a time, one example at a time."""
    monkeypatch.setattr(sizing, "BUDGET", 1)
    monkeypatch.setattr(outer, "BUDGET", 1)
    monkeypatch.setattr(quasidiag, "BUDGET", 1)


@each_case
def test_chunks_of_cotangents_give_the_same_jacobian_and_kernel(case, monkeypatch):
    tiny_budgets(monkeypatch)
    at = setting(case)
    assert_close(rows(at.model, at.batches, at.function), at.jacobian, **EXACT)
    found = NTK(at.model, at.batches, function=at.function).to_torch()
    assert_close(found, torch.einsum("kbp,lcp->kblc", at.jacobian, at.jacobian), **EXACT)


@each_pair(cases_of("linear", "conv2d_groups", "tokens_ignore", "tied_linears", "layer_norm", "attention"))
def test_chunks_of_cotangents_give_the_same_matrices(pmat, case, monkeypatch):
    at, expected = setting(case), matrix(pmat, case)
    tiny_budgets(monkeypatch)
    assert_close(pmat.build(at).mv(at.vector()), expected.mv(at.vector()), **EXACT)
    assert_close(pmat.build(at).get_diag(), expected.get_diag(), **EXACT)


@each_pair(cases_of("linear", "conv2d_groups", "tokens_ignore"), [p for p in PMATS if p.id.startswith("ekfac")])
def test_chunks_of_cotangents_give_the_same_scalings(pmat, case, monkeypatch):
    at = setting(case)
    expected, found = pmat.build(at), pmat.build(at)
    expected.update_diag(at.batches)
    tiny_budgets(monkeypatch)
    found.update_diag(at.batches)
    assert_close(found.to_torch(), expected.to_torch(), **EXACT)
    assert found.n_examples == expected.n_examples == case.n


# ------------------------------------------------------------------------------------------ kernels


@each_case
def test_the_kernel_is_j_j_transposed(case):
    at = setting(case)
    expected = torch.einsum("kbp,lcp->kblc", at.jacobian, at.jacobian)
    assert_close(NTK(at.model, at.batch, function=at.function).to_torch(), expected, **EXACT)
    of_batches = NTK(at.model, at.batches, function=at.function)
    assert_close(of_batches.to_torch(), expected, **EXACT)
    assert_close(of_batches.trace(), at.jacobian.square().sum(), **EXACT)
    assert of_batches.size() == expected.shape and of_batches.n_examples == case.n


@each_case
def test_the_cross_kernel_is_j_times_that_of_other_examples(case):
    at = setting(case)
    other = case.batch(seed=1)
    expected = reference.ntk(at.model, at.batch, other, at.function)
    found = NTK(at.model, at.batch, case.batches(seed=1), function=at.function)
    assert_close(found.to_torch(), expected, **EXACT)


@each_of(cases_of("linear", "conv2d_groups", "tokens", "layer_norm", "attention"))
def test_a_kernel_of_a_shuffling_loader_is_symmetric_with_the_right_spectrum(case):
    at = setting(case)
    kernel = NTK(at.model, loader(case, shuffle=True), function=at.function).to_matrix()
    expected = at.jacobian.flatten(0, 1) @ at.jacobian.flatten(0, 1).T
    assert_close(kernel, kernel.T, **EXACT)
    assert_close(torch.linalg.eigvalsh(kernel), torch.linalg.eigvalsh(expected), rtol=1e-8, atol=1e-8)


@each_of(cases_of("linear", "conv2d_groups", "tokens"))
def test_a_kernel_of_a_shuffling_loader_is_that_of_the_order_drawn(case):
    at = setting(case)
    seen = loader(case, shuffle=True)
    order = torch.cat([x for x, _ in seen])
    kernel = NTK(at.model, loader(case, shuffle=True)).to_torch()
    expected = reference.ntk(at.model, (order, order))
    assert_close(kernel, expected, **EXACT)


def test_kernels_add_up_over_layers():
    at = setting(*cases_of("tied_linears"))
    subs = [LayerCollection([layer]) for layer in at.layers.layers.values()]
    parts = [NTK(at.model, at.batch, layer_collection=sub).to_torch() for sub in subs]
    assert_close(sum(parts), NTK(at.model, at.batch).to_torch(), **EXACT)


def test_batches_with_different_numbers_of_outputs_have_no_kernel():
    at = setting(*cases_of("tokens_regression"))
    with pytest.raises(ValueError, match="different numbers of outputs"):
        NTK(at.model, [(drawn(2, 4, 3),), (drawn(2, 3, 3),)])


# ------------------------------------------------------------------------------------------ implicit maps


@each_case
@pytest.mark.parametrize("split", ["one_batch", "unequal"])
def test_the_implicit_jacobian_has_the_products_of_the_dense_one(case, split):
    at = setting(case)
    examples = at.batch if split == "one_batch" else at.batches
    found = Jacobian(at.model, examples, at.function, PFMapImplicit)
    v, u = at.vector(), drawn(*at.jacobian.shape[:2])
    assert_close(found.jvp(PVector(at.layers, vector_repr=v)).to_torch(), at.jacobian @ v, **EXACT)
    assert_close(found.vjp(FVector(u)).to_torch(), torch.einsum("kn,knp->p", u, at.jacobian), **EXACT)
    assert_close((2 * found @ PVector(at.layers, vector_repr=v)).to_torch(), 2 * at.jacobian @ v, **EXACT)
    assert found.size() == at.jacobian.shape


# ------------------------------------------------------------------------------------------ GGN


def log_cosh(outputs: Tensor, target: Tensor) -> Tensor:
    """Smooth and convex, of outputs and a target of any one shape."""
    x = outputs - target
    return (x + F.softplus(-2 * x)).sum() + 0.1 * x.flatten(1).sum(1).square().sum()


def coupled(outputs: Tensor, target: Tensor) -> Tensor:
    """Smooth and convex in the outputs, whatever the target: with a Hessian that is full and depends on them."""
    return outputs.flatten(1).logsumexp(1).square().sum() + outputs.exp().sum()


def tokens(reduction: str) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda outputs, target: F.cross_entropy(outputs.flatten(0, 1), target.flatten(), reduction=reduction)


GGNS = {
    "mse_mean": (nn.MSELoss(), ("linear_deep", "tokens_regression", "scalar")),
    "mse_sum": (nn.MSELoss(reduction="sum"), ("linear_deep", "tokens_regression", "scalar")),
    "log_cosh": (log_cosh, ("linear_deep", "tokens_regression", "counts")),
    "cross_entropy": (nn.CrossEntropyLoss(), ("linear", "conv1d", "layer_norm", "lstm", "tied_linears", "dict_batch")),
    "cross_entropy_sum": (nn.CrossEntropyLoss(reduction="sum"), ("linear", "segmentation", "segmentation_ignore")),
    "smoothed": (nn.CrossEntropyLoss(label_smoothing=0.2), ("linear", "encoder_layer")),
    "weighted": (
        nn.CrossEntropyLoss(weight=torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64), reduction="sum"),
        ("linear", "segmentation_ignore"),
    ),
    "tokens": (tokens("sum"), ("tokens", "tokens_ignore", "attention", "gpt2")),
    "tokens_mean": (tokens("mean"), ("tokens", "attention_tokens")),
    "binary": (nn.BCEWithLogitsLoss(), ("binary_labels",)),
    "poisson": (nn.PoissonNLLLoss(reduction="sum"), ("counts",)),
    "coupled": (coupled, ("linear", "conv2d_groups", "vision_transformer", "position_embedding")),
}
each_ggn = pytest.mark.parametrize(
    "loss, case",
    [pytest.param(loss, case, id=f"{name}-{case.id}") for name, (loss, ids) in GGNS.items() for case in cases_of(*ids)],
)


@each_ggn
def test_the_ggn_of_a_loss_is_the_pulled_back_hessian_of_each_example(loss, case):
    at = setting(case)
    expected = reference.ggn(at.model, at.batch, loss, at.function)
    found = GGN(at.model, at.batches, PMatDense, loss, function=at.function)
    assert_close(found.to_torch(), expected, **EXACT)
    assert found.n_examples == case.n
    diagonal = GGN(at.model, at.batches, PMatDiag, loss, function=at.function)
    assert_close(diagonal.get_diag(), expected.diagonal(), **EXACT)
    implicit = GGN(at.model, at.batches, PMatImplicit, loss, function=at.function)
    assert_close(implicit.mv(at.vector()), expected @ at.vector(), **EXACT)


@each_of(cases_of("linear", "conv1d", "embedding_padding"))
def test_kfac_of_the_ggn_of_cross_entropy_is_that_of_the_fisher(case):
    at = setting(case)
    found = GGN(at.model, at.batches, PMatKFAC, nn.CrossEntropyLoss())
    assert_close(found.to_torch(), at.fim(PMatKFAC).to_torch(), **EXACT)


def test_a_loss_that_is_not_convex_has_an_implicit_ggn_only():
    at = setting(*cases_of("linear_deep"))

    def loss(outputs: Tensor, target: Tensor) -> Tensor:
        return (outputs - target).cos().sum()

    with pytest.raises(ValueError, match="not convex in the outputs"):
        GGN(at.model, at.batch, PMatDense, loss)
    implicit = GGN(at.model, at.batch, PMatImplicit, loss)
    expected = reference.ggn(at.model, at.batch, loss)
    assert_close(implicit.mv(at.vector()), expected @ at.vector(), **EXACT)


# ------------------------------------------------------------------------------------------ Hessians


def summed(case: Case) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss of a batch, as a sum over its examples."""
    if case.variant == "classif_logits":
        return nn.CrossEntropyLoss(reduction="sum")
    return lambda outputs, target: sum(
        reference.negative_log_likelihood(case.variant, f, y) for f, y in zip(outputs, target, strict=True)
    )


HESSIANS = cases_of(
    *("linear", "scalar", "counts", "log_softmax", "tokens_ignore", "conv1d", "conv2d_circular", "conv_transpose1d"),
    *("embedding_padding", "batch_norm1d", "instance_norm", "layer_norm", "rms_norm", "group_norm", "attention"),
    *("attention_first", "encoder_layer", "vision_transformer", "lstm", "gru_bidirectional", "prelu"),
    *("tied_embedding", "parent_uses_child", "unused_layer", "frozen_weights", "inplace", "checkpointed"),
    *("dead_layer", "dict_batch", "linear_root"),
)


@each_of(HESSIANS)
def test_the_hessian_is_that_of_double_backward_summed_over_batches(case):
    at = setting(case)
    expected = reference.hessian(at.model, at.batch, summed(case))
    found = Hessian(at.model, at.batches, PMatDense, summed(case))
    assert_close(found.to_torch(), expected, **EXACT)
    assert found.n_examples == case.n
    implicit = Hessian(at.model, at.batches, PMatImplicit, summed(case))
    assert_close(implicit.mv(at.vector()), expected @ at.vector(), **EXACT)


@each_of(cases_of("linear", "layer_norm", "attention", "dead_layer"))
def test_representations_of_the_hessian_are_parts_of_it(case):
    at = setting(case)
    expected = reference.hessian(at.model, at.batch, summed(case))
    diagonal = Hessian(at.model, at.batches, PMatDiag, summed(case))
    assert_close(diagonal.get_diag(), expected.diagonal(), **EXACT)
    blocks = Hessian(at.model, at.batches, PMatBlockDiag, summed(case))
    assert_close(blocks.to_torch(), reference.block_diagonal(expected, at.slices), **EXACT)
    implicit = Hessian(at.model, at.batches, PMatImplicit, summed(case))
    assert_close(implicit.get_diag(), expected.diagonal(), **EXACT)
    assert_close(implicit.trace(), expected.trace(), **EXACT)
    assert_close(implicit.to_torch(), expected, **EXACT)


@each_of(cases_of("layer_norm", "attention", "batch_norm1d", "encoder_layer", "lstm", "weight_norm", "weight_norm_old"))
def test_the_hessian_is_that_of_finite_differences(case):
    """Also with weight norm, whose fused kernel has wrong second derivatives in torch 2.13 (so has the reference)."""
    at = setting(case)
    # It writes to the parameters, and the models of settings are shared by all tests.
    expected = reference.hessian_by_differences(case.make(), at.batch, summed(case))
    found = Hessian(at.model, at.batches, PMatDense, summed(case)).to_torch()
    assert_close(found, expected, rtol=1e-6, atol=1e-7)


@each_of(cases_of("linear", "layer_norm", "attention"))
def test_the_mean_hessian_is_the_sum_divided_by_the_examples(case):
    at = setting(case)
    expected = reference.hessian(at.model, at.batch, summed(case)) / case.n
    found = Hessian(at.model, at.batches, PMatDense, summed(case), reduction="mean")
    assert_close(found.to_torch(), expected, **EXACT)
    implicit = Hessian(at.model, at.batches, PMatImplicit, summed(case), reduction="mean")
    assert_close(implicit.mv(at.vector()), expected @ at.vector(), **EXACT)
    blocks = Hessian(at.model, at.batches, PMatBlockDiag, summed(case), reduction="mean")
    assert_close(blocks.trace(), expected.trace(), **EXACT)


def test_a_loss_that_averages_over_a_batch_is_summed_over_batches():
    at = setting(*cases_of("linear"))
    found = Hessian(at.model, at.batches, PMatDense, F.cross_entropy).to_torch()
    expected = sum(reference.hessian(at.model, batch, F.cross_entropy) for batch in at.batches)
    assert_close(found, expected, **EXACT)


@each_of(cases_of("linear", "layer_norm", "attention"))
def test_an_indefinite_hessian_is_solved(case):
    at = setting(case)
    found = Hessian(at.model, at.batches, PMatDense, summed(case))
    regul = 0.37
    damped = found.to_torch() + regul * torch.eye(at.size, dtype=torch.float64)
    assert float(torch.linalg.eigvalsh(found.to_torch())[0]) < 0
    assert_close(damped @ found.solve(at.vector(), regul=regul), at.vector(), rtol=1e-7, atol=1e-8)


def test_the_hessian_has_no_gradients_of_examples():
    at = setting(*cases_of("linear"))
    with pytest.raises(NotImplementedError, match="Hessian"):
        Hessian(at.model, at.batches, PMatKFAC, F.cross_entropy)
    with pytest.raises(NotImplementedError, match="Hessian"):
        Hessian(at.model, at.batches, nngeo.PMatLowRank, F.cross_entropy)


def test_a_hessian_needs_its_loss():
    at = setting(*cases_of("linear"))
    with pytest.raises(ValueError, match="Hessian needs `function`, the loss"):
        Hessian(at.model, at.batches, PMatDense)
    with pytest.raises(ValueError, match="should return one number; it returned shape"):
        Hessian(at.model, at.batches, PMatDense, nn.CrossEntropyLoss(reduction="none"))
    with pytest.raises(ValueError, match="Unknown reduction='none'; known are 'sum', 'mean'"):
        Hessian(at.model, at.batches, PMatDense, F.cross_entropy, reduction="none")


@each_of(cases_with("frozen"))
def test_a_hessian_over_some_layers_is_a_block_of_that_over_all(case):
    at = setting(case)
    name = list(at.layers)[-1]
    s, sub = at.slices[name], LayerCollection([at.layers[name]])
    expected = reference.hessian(at.model, at.batch, summed(case))[s, s]
    found = Hessian(at.model, at.batches, PMatDense, summed(case), layer_collection=sub)
    assert_close(found.to_torch(), expected, **EXACT)
