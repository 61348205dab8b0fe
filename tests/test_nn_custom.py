"""Layers of one's own that define forward and jacobian: everything else follows, in every container."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import nngeo.nn as nnj
from nngeo import FIM, LayerCollection, PMatDense
from tests.jacobians import diagonal, randn, rows, seeded

B = 3


class Square(nnj.AbstractJacobian, nn.Module):
    """(W x)^2, by numpy: autograd sees nothing of it."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs))

    def forward(self, x):
        return torch.from_numpy((x.detach().numpy() @ self.weight.detach().numpy().T) ** 2)

    def jacobian(self, x, val, wrt="input"):
        h = x @ self.weight.T
        if wrt == "input":
            return 2 * h[:, :, None] * self.weight
        outputs, inputs = self.weight.shape
        j = torch.zeros(len(x), outputs, outputs * inputs, dtype=x.dtype)
        for k in range(outputs):
            assert h[:, k].isfinite().all()  # control flow that depends on the data
            j[:, k, k * inputs : (k + 1) * inputs] = 2 * h[:, k, None] * x
        return j


class SquareTwin(nn.Module):
    """The same, for autograd."""

    def __init__(self, of: Square):
        super().__init__()
        self.weight = of.weight

    def forward(self, x):
        return (x @ self.weight.T) ** 2


class Sine(nn.Module, nnj.AbstractJacobian):
    """Without weights, with the bases the other way round, and with an attribute that NNJ asks for."""

    def __init__(self):
        super().__init__()
        self._n_params = 0

    def forward(self, x):
        return x.detach().sin()

    def jacobian(self, x, val, wrt="input"):
        return torch.diag_embed(x.cos()) if wrt == "input" else None


class Diagonal(nnj.AbstractDiagonalJacobian, nn.Module):
    """Its Jacobian comes as a diagonal, and from the output."""

    def forward(self, x):
        return x.detach().tanh()

    def jacobian(self, x, val, wrt="input", diag=True):
        if wrt != "input":
            return None
        return 1 - val**2 if diag else torch.diag_embed(1 - val**2)


class Doubled(nnj.Linear):
    """A subclass of a layer with a fast rule, whose derivative is said to be twice what it is."""

    def jacobian(self, x, val=None, wrt="input"):
        return 2 * super().jacobian(x, val, wrt)


class Block(nnj.AbstractJacobian, nn.Module):
    """Holds children, and composes their Jacobians."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nnj.Linear(3, 2), nnj.Linear(2, 3)

    def forward(self, x):
        with torch.no_grad():
            return self.second(self.first(x))

    def jacobian(self, x, val, wrt="input"):
        hidden = self.first(x)
        after = self.second.jacobian(hidden, val, "input")
        if wrt == "input":
            return after @ self.first.jacobian(x, hidden, "input")
        parts = [after @ self.first.jacobian(x, hidden, "weight"), self.second.jacobian(hidden, val, "weight")]
        return torch.cat(parts, -1)


class Parent(nn.Module):
    """An arbitrary module around a layer."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.before, self.inner = nn.Linear(3, 3), inner

    def forward(self, x):
        return x + self.inner(self.before(x)).cos()


def twin(model: nn.Module) -> nn.Module:
    """The model for autograd, with the same parameters."""
    replaced = {
        Square: SquareTwin,
        Sine: lambda _: nnj.Sinusoidal(),
        Diagonal: lambda _: nn.Tanh(),
        Block: lambda block: nn.Sequential(block.first, block.second),
    }
    if type(model) in replaced:
        return replaced[type(model)](model)
    found = copy.copy(model)
    found._modules = {name: twin(child) for name, child in model._modules.items()}
    return found


MODELS = {
    "alone": lambda: Square(3, 2),
    "sine": Sine,
    "diagonal": Diagonal,
    "block": Block,
    "chain": lambda: nnj.Sequential(nnj.Linear(3, 4), Square(4, 3), nnj.Tanh(), Sine(), nnj.Linear(3, 2), Diagonal()),
    "nested": lambda: nnj.Sequential(nn.Sequential(Square(3, 3)), nnj.SkipConnection(Sine(), nnj.Linear(3, 2))),
    "residual": lambda: nnj.Residual(Block(), Sine()),
    "twice": lambda: (lambda layer: nnj.Sequential(layer, nnj.Sigmoid(), layer))(Square(3, 3)),
    "inside_another_module": lambda: nnj.Sequential(Parent(Square(3, 3)), nnj.Linear(3, 2)),
}
CASES = [(name, wrt) for name in MODELS for wrt in ("input", "weight") if (name, wrt) not in {("sine", "weight")}]
CASES.remove(("diagonal", "weight"))


def check(found, expected) -> None:
    assert_close(found, expected, rtol=1e-9, atol=1e-11)


@pytest.fixture(params=CASES, ids="-".join)
def case(request):
    name, wrt = request.param
    model, x = seeded(MODELS[name]), randn(B, 3)
    return model, x, wrt, rows(twin(model), x, wrt)


def test_the_jacobian_is_the_chain_of_their_own(case):
    model, x, wrt, j = case
    found = model.jacobian(x, model(x), wrt)
    check(torch.diag_embed(found) if found.ndim == 2 else found, j)


def test_vectors_are_carried_by_it(case):
    model, x, wrt, j = case
    v, w, columns, cotangents = (
        randn(B, j.shape[2]),
        randn(B, j.shape[1]),
        randn(B, j.shape[2], 4),
        randn(B, 4, j.shape[1]),
    )
    check(model.jvp(x, None, v, wrt), torch.einsum("bon,bn->bo", j, v))
    check(model.vjp(x, None, w, wrt), torch.einsum("bon,bo->bn", j, w))
    check(model.jmp(x, None, columns, wrt), j @ columns)
    check(model.mjp(x, None, cotangents, wrt), cotangents @ j)


def test_metrics_are_carried_by_it(case):
    model, x, wrt, j = case
    m, d = randn(B, j.shape[2], j.shape[2]), randn(B, j.shape[1])
    check(model.jmjTp(x, None, m, wrt), j @ m @ j.mT)
    check(model.jmjTp(x, None, None, wrt, to_diag=True), diagonal(j @ j.mT))
    check(model.jTmjp(x, None, d, wrt, from_diag=True, to_diag=True), diagonal(j.mT @ torch.diag_embed(d) @ j))


def test_the_full_weight_metric_has_a_block_for_each_child():
    model, x = seeded(MODELS["chain"]), randn(B, 3)
    j = rows(twin(model), x, "weight")
    sizes = [16, 12, 8]
    found = model.jTmjp(x, None, None, wrt="weight")
    expected = [part.mT @ part for part in j.split(sizes, -1)]
    check(found, expected)
    pushed = sum(part @ m @ part.mT for part, m in zip(j.split(sizes, -1), found, strict=True))
    check(model.jmjTp(x, None, found, wrt="weight"), pushed)


@pytest.mark.parametrize("wrt", ["input", "weight"])
def test_a_class_that_scales_its_parents_jacobian_is_believed(wrt):
    model, x = seeded(lambda: nnj.Sequential(nnj.Linear(3, 4), nnj.Tanh(), Doubled(4, 2))), randn(B, 3)
    j = rows(model, x, wrt)
    check(model.jacobian(x, None, wrt), 2 * j)
    check(model.jTmjp(x, None, None, wrt, to_diag=True), 4 * diagonal(j.mT @ j))


def test_only_products_use_it():
    model, x = seeded(lambda: nnj.Sequential(Doubled(3, 2))), randn(B, 3)
    kind = type(model[0])
    model.vjp(x, None, torch.ones(B, 2, dtype=x.dtype))
    assert type(model[0]) is kind is Doubled
    fisher = FIM(model=model, loader=x, representation=PMatDense, variant="regression")  # which is autograd's
    plain = rows(nn.Sequential(model[0]), x, "weight")
    check(fisher.to_torch(), (plain.mT @ plain).mean(0))


def test_the_model_has_its_own_classes_again_after_an_error():
    model, x = seeded(MODELS["chain"]), randn(B, 3)
    with pytest.raises(ValueError):
        model.vjp(x, None, randn(B, 5))
    assert [type(child) for child in model][1] is Square
    assert isinstance(pickle.loads(pickle.dumps(model))[1], Square)


def test_a_jacobian_of_the_wrong_shape_is_named():
    class Wrong(nnj.Tanh):
        def jacobian(self, x, val=None, wrt="input"):
            return torch.zeros(len(x), 2, 2)

    with pytest.raises(ValueError, match=r"Wrong.jacobian.*\(3, 2, 2\).*\(3, 4, 4\)"):
        nnj.Sequential(Wrong()).vjp(torch.zeros(3, 4), None, torch.zeros(3, 4))


def test_frozen_parameters_keep_their_column_in_the_own_jacobian():
    class Scaled(nnj.AbstractJacobian, nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.tensor(3.0))

        def forward(self, x):
            return (self.a * self.b * x).detach()

        def jacobian(self, x, val, wrt="input"):
            if wrt == "input":
                return torch.diag_embed(self.a * self.b * torch.ones_like(x))
            return torch.stack([self.b * x, self.a * x], -1)

    model, x = nnj.Sequential(Scaled().double(), Square(3, 3).double()), randn(B, 3)
    model[0].a.requires_grad_(False)
    j = model[1].jacobian(6 * x, None)
    check(model.jacobian(x, None, "weight")[..., :1], j @ (2 * x)[:, :, None])
    assert model._n_params == 1 + 9


def test_a_part_of_the_parameters_can_be_asked_for():
    model, x = seeded(lambda: nnj.Sequential(Block(), nnj.Tanh())), randn(B, 3)
    layers = LayerCollection.from_model(model, layers=["0.second"])
    expected = rows(twin(model), x, "weight")[..., 8:]
    check(model.jacobian(x, None, "weight", layer_collection=layers), expected)


def test_derivatives_of_products_go_through_it():
    class Cube(nnj.AbstractJacobian, nn.Module):
        def forward(self, x):
            return x.detach() ** 3

        def jacobian(self, x, val, wrt="input"):
            return torch.diag_embed(3 * x**2)

    x = randn(B, 2).requires_grad_()
    trace = nnj.Sequential(Cube()).jTmjp(x, None, None, to_diag=True, create_graph=True).sum()
    check(torch.autograd.grad(trace, x)[0], 36 * x.detach() ** 3)


def test_derivatives_of_products_reach_its_parameters():
    class Scale(nnj.AbstractJacobian, nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.arange(1.0, 4.0, dtype=torch.float64))

        def forward(self, x):
            return x * self.w

        def jacobian(self, x, val, wrt="input"):
            return torch.diag_embed(self.w.expand_as(x) if wrt == "input" else x)

    model, x = seeded(lambda: nnj.Sequential(nnj.Linear(3, 3), Scale())), randn(B, 3)
    total = model.vjp(x, None, torch.ones(B, 3, dtype=torch.float64), create_graph=True).sum()
    found = torch.autograd.grad(total, [model[1].w, model[0].weight], allow_unused=True)
    # vjp by inputs is W' w, whose sum over examples and inputs has these derivatives.
    check(found[0], B * model[0].weight.detach().sum(1))
    check(found[1], B * model[1].w.detach()[:, None].expand(3, 3))


def test_a_property_n_params_counts_what_there_is():
    model = Square(3, 2)
    assert model._n_params == 6
    model._n_params = 17  # layers written for NNJ set it
    assert model._n_params == 6
