"""Models that keep what they compute from a parameter, as attention biases are kept in eval mode."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import nngeo
from nngeo import FIM, NTK, Hessian, Jacobian
from nngeo.products import jacobian, jvp
from tests import reference

EXACT = {"rtol": 1e-8, "atol": 1e-10}
X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.randn(5, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class Biased(nn.Module):
    """A bias of which a table is the parameter; `kept` says how the bias is kept from call to call."""

    def __init__(self, kept: Callable[[Biased], Tensor]):
        super().__init__()
        self.kept = kept
        self.body, self.head = nn.Linear(4, 6), nn.Linear(6, 2)
        self.table = nn.Parameter(torch.randn(3))
        self.by_device: dict[str, Tensor] = {}
        self.by_order: list[Tensor] = []
        self.value: Tensor | None = None
        self.register_buffer("buffer", None, persistent=False)
        self.register_buffer("index", torch.tensor([0, 1, 2, 2, 1, 0]), persistent=False)
        self.register_buffer("scale", torch.tensor(2.0), persistent=False)

    def bias(self) -> Tensor:
        return self.scale * self.table[self.index]

    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias() if self.training else self.kept(self)
        return self.head((self.body(x) + bias).tanh())


def by_device(net: Biased) -> Tensor:
    key = str(net.table.device)
    if key not in net.by_device:
        net.by_device[key] = net.bias()
    return net.by_device[key]


def by_order(net: Biased) -> Tensor:
    if not net.by_order:
        net.by_order.append(net.bias())
    return net.by_order[0]


def by_value(net: Biased) -> Tensor:
    if net.value is None:
        net.value = net.bias()
    return net.value


def by_buffer(net: Biased) -> Tensor:
    if net.buffer is None:
        net.buffer = net.bias()
    return net.buffer


def by_presence(net: Biased) -> Tensor:
    if not hasattr(net, "present"):
        net.present = net.bias()
    return net.present


def fresh(model: nn.Module) -> None:
    """Not run before."""


def without_gradients(model: nn.Module) -> None:
    with torch.no_grad():
        model(X)


def with_gradients(model: nn.Module) -> None:
    model(X)


each_kind = pytest.mark.parametrize("kept", [by_device, by_order, by_value, by_buffer, by_presence])
each_past = pytest.mark.parametrize("past", [fresh, without_gradients, with_gradients])


def made(kept: Callable[[Biased], Tensor], past: Callable[[nn.Module], None]) -> tuple[nn.Module, nn.Module]:
    """The model in eval mode, and the same without a cache."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Biased(kept).double()
    plain = copy.deepcopy(model).train()
    past(model.eval())
    return model, plain


def state(model: nn.Module) -> dict[str, Any]:
    parts: dict[str, Any] = {**vars(model), **model._buffers}
    found = {name: parts.get(name) for name in ("by_device", "by_order", "value", "buffer", "present")}
    return {name: value.copy() if isinstance(value, dict | list) else value for name, value in found.items()}


@each_kind
@each_past
def test_gradients_reach_the_parameter_behind_a_cache(kept, past):
    model, plain = made(kept, past)
    rows = reference.jacobian(plain, (X, Y))
    assert rows[..., :3].abs().sum() > 0
    assert_close(Jacobian(model, X).to_torch(), rows, **EXACT)
    assert_close(NTK(model, X).to_torch(), torch.einsum("knp,lmp->knlm", rows, rows), **EXACT)
    assert_close(jacobian(model, X, "weight", create_graph=True).detach(), rows.transpose(0, 1), **EXACT)


@each_kind
@each_past
def test_products_do_as_well(kept, past):
    model, plain = made(kept, past)
    rows, v = reference.jacobian(plain, (X, Y)), torch.linspace(-1, 1, 47).double()
    assert_close(jvp(model, X, v, "weight"), (rows @ v).T, **EXACT)
    matrix = FIM(model, X, nngeo.PMatImplicit, variant="regression")
    assert_close(matrix.mv(v), rows.flatten(0, 1).mT @ (rows @ v).flatten() / 5, **EXACT)

    def loss(outputs: Tensor, target: Tensor) -> Tensor:
        return (outputs - target).square().sum()

    expected = Hessian(plain, (X, Y), nngeo.PMatDense, loss).mv(v)
    assert_close(Hessian(model, (X, Y), nngeo.PMatImplicit, loss).mv(v), expected, **EXACT)


@each_kind
@each_past
@pytest.mark.parametrize("wrt", ["weight", "input"])
def test_caches_hold_afterwards_what_they_held(kept, past, wrt):
    model, _ = made(kept, past)
    before = state(model)
    jacobian(model, X, wrt)
    FIM(model, X, nngeo.PMatDiag, variant="regression")
    after = state(model)
    for name, value in before.items():
        same = after[name] is value if not isinstance(value, dict | list) else after[name] == value
        assert same, name


def test_a_first_sweep_without_checks_takes_them_too():
    model, plain = made(by_value, fresh)
    options = {"variant": "regression", "check": False}
    expected = FIM(plain, (X, Y), nngeo.PMatDense, variant="regression").to_torch()
    for _ in range(2):
        assert_close(FIM(model, (X, Y), nngeo.PMatDense, **options).to_torch(), expected, **EXACT)


@each_kind
def test_what_was_computed_from_other_parameters_is_told(kept):
    model, _ = made(kept, fresh)
    jacobian(model, X, "weight")
    without_gradients(model)
    model.table.data += 1.0
    with pytest.raises(ValueError, match=f"{kept.__name__.replace('by_', '')[:4]}.*other values than the model comput"):
        jacobian(model, X, "weight")


@each_kind
def test_what_was_computed_from_other_parameters_before_is_a_constant(kept):
    """As it is for autograd: the outputs are those of the model as it stands."""
    model, plain = made(kept, without_gradients)
    held = next(iter(state(model)["by_device"].values()), None) if kept is by_device else kept(model)
    model.table.data += 1.0
    plain.bias = lambda: held
    found = jacobian(model, X, "weight")
    assert_close(found, reference.jacobian(plain, (X, Y)).transpose(0, 1), **EXACT)
    assert found[..., :3].abs().sum() == 0


def test_a_value_of_the_users_is_not_passed_over():
    """A mask that is made from no parameter where there is none."""

    def masked(net: Biased) -> Tensor:
        if net.value is None:
            net.value = torch.ones(6).double()
        return net.bias() * net.value

    model, plain = made(masked, fresh)
    jacobian(model, X, "weight")
    model.value = torch.tensor([0.0, 1, 1, 0, 1, 0]).double()
    plain.bias = lambda: Biased.bias(plain) * model.value
    assert_close(jacobian(model, X, "weight"), reference.jacobian(plain, (X, Y)).transpose(0, 1), **EXACT)


def test_a_tensor_that_is_needed_is_no_cache():
    """Buffers and dicts of constants, with which alone the model runs."""
    model, plain = made(lambda net: net.bias() + net.constants["shift"], fresh)
    model.constants, plain.constants = ({"shift": torch.tensor(3.0).double()} for _ in range(2))
    plain.bias = lambda: model.bias() + 3.0
    assert_close(Jacobian(model, X).to_torch(), reference.jacobian(model, (X, Y)), **EXACT)
    assert model.constants["shift"] == 3.0
