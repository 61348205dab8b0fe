"""The classes of nngeo.nn: all of torch.nn's under their names, and those that torch does not have."""

from __future__ import annotations

import copy
import io
import pickle
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import nngeo.nn as nnj
from nngeo import FIM, PMatKFAC
from tests.jacobians import randn, rows, seeded

B = 3
NAMES = [name for name, kind in vars(nn).items() if isinstance(kind, type) and issubclass(kind, nn.Module)]


@pytest.mark.parametrize("name", NAMES)
def test_every_class_of_torch_is_there_under_its_name(name):
    kind = getattr(nnj, name)
    assert issubclass(kind, getattr(nn, name)) and issubclass(kind, nnj.AbstractJacobian)
    assert kind.__name__ == kind.__qualname__ == name in dir(nnj)
    assert pickle.loads(pickle.dumps(kind)) is kind


@pytest.mark.parametrize("name", NAMES)
def test_classes_inherit_as_those_of_torch_do(name):
    parents = [other for other in NAMES if issubclass(getattr(nn, name), getattr(nn, other))]
    assert "Module" in parents
    assert all(issubclass(getattr(nnj, name), getattr(nnj, parent)) for parent in parents)


LAYERS = {
    "Conv1d": (lambda: nnj.Conv1d(2, 2, 2, stride=2, padding=1, groups=2), (2, 4)),
    "Conv3d": (lambda: nnj.Conv3d(1, 1, 2), (1, 2, 3, 2)),
    "ConvTranspose2d": (lambda: nnj.ConvTranspose2d(1, 2, 2, stride=2, output_padding=1, dilation=2), (1, 2, 2)),
    "AvgPool2d": (lambda: nnj.AvgPool2d(2, stride=1), (1, 3, 3)),
    "AdaptiveAvgPool1d": (lambda: nnj.AdaptiveAvgPool1d(2), (1, 5)),
    "LPPool1d": (lambda: nnj.LPPool1d(2, 2), (1, 4)),
    "BatchNorm1d": (lambda: nnj.BatchNorm1d(3).eval(), (3,)),
    "GroupNorm": (lambda: nnj.GroupNorm(2, 4), (4, 2)),
    "InstanceNorm1d": (lambda: nnj.InstanceNorm1d(2, affine=True), (2, 3)),
    "RMSNorm": (lambda: nnj.RMSNorm(4), (4,)),
    "LogSoftmax": (lambda: nnj.LogSoftmax(-1), (4,)),
    "GLU": (nnj.GLU, (4,)),
    "PReLU": (nnj.PReLU, (4,)),
    "Dropout": (lambda: nnj.Dropout().eval(), (4,)),
    "Identity": (nnj.Identity, (4,)),
    "PixelShuffle": (lambda: nnj.PixelShuffle(2), (4, 2, 2)),
    "ReflectionPad1d": (lambda: nnj.ReflectionPad1d(1), (1, 3)),
    "Unfold": (lambda: nnj.Unfold(2), (1, 3, 3)),
    "LocalResponseNorm": (lambda: nnj.LocalResponseNorm(2), (3, 2)),
}


@pytest.mark.parametrize("wrt", ["input", "weight"])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_that_nnj_did_not_have(name, wrt):
    make, shape = LAYERS[name]
    model, x = seeded(make), randn(B, *shape)
    expected = None if wrt == "weight" and not model._n_params else rows(model, x, wrt)
    assert_close(model.jacobian(x, wrt=wrt), expected, rtol=1e-9, atol=1e-11)


def test_layers_of_token_ids_have_products_by_their_weights():
    model, x = seeded(lambda: nnj.Embedding(5, 2)), torch.tensor([[0, 1], [2, 2], [4, 0]])
    found = model.jacobian(x, wrt="weight")
    one_hot = nn.functional.one_hot(x, 5).double()
    assert_close(found, torch.einsum("btv,de->btdve", one_hot, torch.eye(2).double()).reshape(3, 4, 10))
    with pytest.raises(TypeError, match="int64"):
        model.jacobian(x, wrt="input")


def test_several_inputs_go_by_name():
    model, a, b = seeded(lambda: nnj.Bilinear(2, 3, 2)), randn(B, 2), randn(B, 3)
    found = model.jacobian((a, b), None, "input2")
    assert_close(found, torch.einsum("bi,oij->boj", a, model.weight))
    with pytest.raises(ValueError, match="input1"):
        model.jacobian((a, b))
    target = randn(B, 2)
    loss = nnj.MSELoss(reduction="none")
    assert_close(loss.vjp((a, target), None, torch.ones(B, 2).double(), "input"), 2 * (a - target))


def test_layers_that_return_tuples_name_their_output_by_a_function():
    model, x = seeded(lambda: nnj.GRU(2, 2, batch_first=True)), randn(B, 3, 2)
    found = model.jacobian(x, None, function=lambda x: model(x)[0])
    assert_close(found, rows(nnj.convert_to_nnj([FirstOf(model)]), x))


class FirstOf(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x)[0]


def test_a_lazy_layer_becomes_one_with_products():
    model = nnj.Sequential(nnj.LazyConv2d(2, 3), nnj.Flatten(), nnj.LazyLinear(2))
    model(torch.zeros(1, 1, 4, 4))
    assert [type(layer) for layer in model] == [nnj.Conv2d, nnj.Flatten, nnj.Linear]
    assert model.jacobian(torch.zeros(1, 1, 4, 4), wrt="weight").shape == (1, 2, 20 + 18)


def test_a_network_of_ones_own_derives_from_module():
    class Net(nnj.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 2), nnj.Linear(2, 3)

        def forward(self, x):
            return x + self.b(self.a(x).tanh())

    model, x = seeded(Net), randn(B, 3)
    assert_close(model.jacobian(x, wrt="weight"), rows(model, x, "weight"))
    assert isinstance(model.b, nnj.Module)


# Layers that torch does not have


def test_skip_concatenates_on_axis_1():
    model, x = seeded(lambda: nnj.SkipConnection(nnj.Conv2d(2, 1, 3, padding=1), nnj.Tanh())), randn(B, 2, 3, 3)
    assert_close(model(x), torch.cat([x, model._F(x)], 1))
    assert isinstance(model._F, nnj.Sequential)
    inner = rows(model._F, x)
    eye = torch.eye(18, dtype=x.dtype).expand(B, 18, 18)
    assert_close(model.jacobian(x), torch.cat([eye, inner], 1))
    assert_close(model.jacobian(x, wrt="weight")[:, :18], torch.zeros(B, 18, 19, dtype=x.dtype))


def test_residual_adds():
    model, x = seeded(lambda: nnj.Residual(nnj.Linear(3, 3), nnj.Tanh())), randn(B, 3)
    assert_close(model(x), x + model._F(x))


def test_truncexp_is_the_exponential_with_a_clamped_derivative():
    x = torch.tensor([[-50.0, -1.0, 3.0, 20.0]], dtype=torch.float64)
    assert_close(nnj.TruncExp()(x), x.exp())
    expected = x.clamp(-15, 15).exp()
    assert_close(nnj.TruncExp().jacobian(x, diag=True), expected)
    assert_close(nnj.TruncExp().jvp(x, None, torch.ones_like(x)), expected)
    leaf = x.clone().requires_grad_()
    nnj.TruncExp()(leaf).sum().backward()
    assert_close(leaf.grad, expected)


def test_truncexp_has_a_second_derivative():
    leaf = torch.tensor([[-50.0, 3.0]], dtype=torch.float64, requires_grad=True)
    (g,) = torch.autograd.grad(nnj.TruncExp()(leaf).sum(), leaf, create_graph=True)
    (found,) = torch.autograd.grad(g.sum(), leaf)
    assert_close(found[0], torch.stack([torch.zeros(()).double(), torch.full((), 3.0).double().exp()]))


def test_l2norm_divides_by_the_norm_of_an_example_plus_eps():
    x = randn(B, 2, 3)
    norm = x.flatten(1).norm(dim=1)[:, None, None]
    assert_close(nnj.L2Norm(eps=0.3)(x), x / (norm + 0.3))
    assert torch.isfinite(nnj.L2Norm().jacobian(torch.zeros(1, 2))).all()


def test_reshape_takes_dims_without_the_batch():
    assert nnj.Reshape(2, -1)(torch.zeros(B, 6)).shape == (B, 2, 3)
    assert repr(nnj.Reshape(2, -1)) == "Reshape(2, -1)"


# Containers as torch's


def chain() -> nnj.Sequential:
    return nnj.Sequential(OrderedDict(first=nnj.Linear(3, 4), act=nnj.Tanh(), last=nnj.Linear(4, 2)))


def edited(edit) -> nnj.Sequential:
    model = nnj.Sequential(nnj.Linear(3, 3), nnj.Tanh())
    edit(model)
    return model


EDITS = {
    "named": chain,
    "append": lambda: edited(lambda model: model.append(nnj.Linear(3, 2))),
    "insert": lambda: edited(lambda model: model.insert(1, nnj.Linear(3, 3))),
    "extend": lambda: edited(lambda model: model.extend([nnj.Linear(3, 3), nnj.ReLU()])),
    "set": lambda: edited(lambda model: model.__setitem__(1, nn.GELU())),
    "delete": lambda: edited(lambda model: model.__delitem__(1)),
    "slice": lambda: chain()[:2],
    "add": lambda: nnj.Sequential(nnj.Linear(3, 3)) + nn.Sequential(nn.Linear(3, 2)),
    "times": lambda: nnj.Sequential(nnj.Linear(3, 3), nnj.Tanh()) * 2,
    "times_in_front": lambda: 2 * nnj.Sequential(nnj.Linear(3, 3), nnj.Tanh()),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_chain_has_the_products_of_what_it_is(edit):
    model, x = seeded(EDITS[edit]), randn(B, 3)
    assert type(model) is nnj.Sequential
    assert_close(model.jacobian(x, model(x)), rows(model, x))
    assert_close(model.jacobian(x, model(x), "weight"), rows(model, x, "weight"))


def test_children_keep_their_names():
    assert list(chain().state_dict()) == ["first.weight", "first.bias", "last.weight", "last.bias"]


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": lambda model: _through_torch(model),
}


def _through_torch(model):
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


@pytest.mark.parametrize("how", COPIES)
def test_copies_have_products_of_their_own(how):
    model, x = seeded(lambda: nnj.Sequential(chain(), nnj.Residual(nnj.Linear(2, 2)), nnj.Reshape(2, 1))), randn(B, 3)
    model.vjp(x, model(x), torch.ones(B, 2).double())
    other = COPIES[how](model)
    other.set_weight(other.get_weight() * 1.5)
    assert_close(other.jacobian(x, other(x), "weight"), rows(other, x, "weight"))
    assert_close(model.jacobian(x, model(x), "weight"), rows(model, x, "weight"))


def test_state_dicts_go_to_torch_and_back():
    model = nnj.Sequential(nnj.Linear(3, 2), nnj.BatchNorm1d(2))
    plain = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    plain.load_state_dict(model.state_dict())
    model.load_state_dict(plain.state_dict())
    assert_close(plain[0].weight, model[0].weight)


def test_the_fast_rules_serve_the_twins_of_torchs_layers():
    model, x = seeded(chain), randn(6, 3)
    plain = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    plain.load_state_dict(dict(zip(plain.state_dict(), model.state_dict().values(), strict=True)))
    found, expected = (FIM(m, x, PMatKFAC, variant="regression").to_torch() for m in (model, plain))
    assert_close(found, expected)
