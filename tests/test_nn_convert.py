"""convert_to_nnj and invert_block_diagonal."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.testing import assert_close

import nngeo.nn as nnj
from tests.jacobians import randn, rows, seeded

B = 3


class Net(nn.Module):
    """An arbitrary module: a forward of its own, children in a dict, a buffer, a method kept as an attribute."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Sequential(nn.Tanh(), nn.Linear(4, 2))})
        self.register_buffer("shift", torch.ones(4))
        self.scale = nn.Parameter(torch.full((), 0.5))
        self.act = self.bent

    def bent(self, x):
        return x if self.training else x.sin()

    def forward(self, x):
        return self.parts["b"](self.act(self.parts["a"](x + self.shift))) * self.scale


def old_weight_norm():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(nn.Linear(4, 3))


def tied():
    layer = nn.Linear(4, 4)
    other = nn.Linear(4, 4)
    other.weight = layer.weight
    return nn.Sequential(layer, nn.Tanh(), layer, other)


MODELS = {
    "linear_without_bias": (lambda: nn.Linear(4, 3, bias=False), (4,)),
    "conv_options": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, stride=2, padding=2, dilation=1, groups=2, padding_mode="circular"), nn.ReLU()
        ),
        (2, 5, 5),
    ),
    "pool_options": (lambda: nn.MaxPool2d(3, stride=1, padding=1, dilation=1, ceil_mode=True), (1, 4, 4)),
    "softplus_options": (lambda: nn.Softplus(beta=3, threshold=0.7), (4,)),
    "flatten_from_2": (lambda: nn.Flatten(2), (2, 2, 2)),
    "upsample": (lambda: nn.Upsample(scale_factor=2, mode="bilinear"), (1, 2, 2)),
    "avgpool": (lambda: nn.AvgPool2d(2, stride=1), (1, 3, 3)),
    "nested": (
        lambda: nn.Sequential(nn.Linear(4, 3), nn.Sequential(nn.Tanh(), nn.Sequential(nn.Linear(3, 2))), nn.GELU()),
        (4,),
    ),
    "attention": (
        lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(4, 2, dim_feedforward=3, dropout=0.0, batch_first=True),
            2,
            enable_nested_tensor=False,
        ),
        (2, 4),
    ),
    "arbitrary": (Net, (4,)),
    "tied": (tied, (4,)),
    "parametrized": (lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 3)), nn.Tanh()), (4,)),
    "old_weight_norm": (old_weight_norm, (4,)),
}


@pytest.fixture(params=MODELS)
def case(request):
    make, shape = MODELS[request.param]
    model = seeded(make).eval()
    return model, nnj.convert_to_nnj(model), randn(B, *shape)


def test_the_function_and_its_derivatives_are_the_same(case):
    model, converted, x = case
    assert_close(converted(x), model(x), rtol=0, atol=0)
    assert_close(converted.jacobian(x), rows(model, x), rtol=1e-9, atol=1e-11)
    if converted._n_params:
        assert_close(converted.jacobian(x, wrt="weight"), rows(model, x, "weight"), rtol=1e-9, atol=1e-11)


def test_parameters_and_buffers_are_shared(case):
    model, converted, _ = case
    pairs = zip(model.named_parameters(), converted.named_parameters(), strict=True)
    assert all(name == other and p is q for (name, p), (other, q) in pairs)
    assert all(p is q for p, q in zip(model.buffers(), converted.buffers(), strict=True))
    assert list(model.state_dict()) == list(converted.state_dict())


def test_every_module_carries_products_and_keeps_its_type_and_options(case):
    model, converted, _ = case
    pairs = list(zip(model.modules(), converted.modules(), strict=True))
    assert all(isinstance(new, nnj.AbstractJacobian) and isinstance(new, type(old)) for old, new in pairs)
    assert all(new.extra_repr() == old.extra_repr() for old, new in pairs)
    assert all(new is not old and not isinstance(old, nnj.AbstractJacobian) for old, new in pairs)


def test_containers_of_torch_become_those_of_nnj(case):
    model, converted, _ = case
    for old, new in zip(model.modules(), converted.modules(), strict=True):
        exported = type(old).__module__.startswith("torch.nn.modules") and getattr(nn, type(old).__name__, None)
        assert not exported or type(new) is getattr(nnj, type(old).__name__)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "old_weight_norm"])  # torch can't copy it
def test_a_copy_of_the_converted_stands_alone(name):
    make, shape = MODELS[name]
    model, x = seeded(make).eval(), randn(B, *shape)
    converted = nnj.convert_to_nnj(model)
    expected = model(x)
    other = copy.deepcopy(converted)
    with torch.no_grad():
        [p.zero_() for p in other.parameters()]
    assert_close(converted(x), expected, rtol=0, atol=0)
    assert type(other) is type(converted)


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("parametrized", "old_weight_norm")])
def test_the_converted_can_be_pickled(name):
    make, shape = MODELS[name]
    converted, x = nnj.convert_to_nnj(seeded(make).eval()), randn(B, *shape)
    other = pickle.loads(pickle.dumps(converted))
    assert_close(other(x), converted(x), rtol=0, atol=0)
    assert [type(m) for m in other.modules()] == [type(m) for m in converted.modules()]


def test_writing_weights_reaches_the_model():
    model = seeded(MODELS["nested"][0])
    converted = nnj.utils.convert_to_nnj(model)
    converted.set_weight(torch.zeros(converted._n_params))
    assert all(not p.any() for p in model.parameters())


def test_children_of_nested_containers_are_blocks_of_nested_lists():
    converted = nnj.convert_to_nnj(seeded(MODELS["nested"][0]))
    found = converted.jTmjp(randn(B, 4), None, None, wrt="weight")
    assert found[0].shape == (B, 15, 15)
    assert found[1][0][0].shape == (B, 8, 8)


def test_tied_modules_stay_tied():
    converted = nnj.convert_to_nnj(seeded(tied))
    assert converted[0] is converted[2]
    assert converted[3].weight is converted[0].weight
    assert converted._n_params == len(converted.get_weight()) == 24


@pytest.mark.parametrize("training", [True, False])
def test_the_training_flag_is_kept_and_of_its_own(training):
    model = seeded(Net).train(training)
    converted = nnj.convert_to_nnj(model)
    assert all(module.training == training for module in converted.modules())
    converted.train(not training)
    assert all(module.training == training for module in model.modules())


def test_a_method_kept_as_an_attribute_is_of_the_new_object():
    model = seeded(Net).train()
    converted, x = nnj.convert_to_nnj(model).eval(), randn(B, 4)
    assert_close(converted(x), model.eval()(x), rtol=0, atol=0)


def test_hooks_are_kept_and_new_ones_are_of_one_model_only():
    model, seen = nn.Sequential(nn.Linear(2, 2)), []
    model[0].register_forward_hook(lambda module, args, out: seen.append("old"))
    converted = nnj.convert_to_nnj(model)
    converted[0].register_forward_hook(lambda module, args, out: seen.append("new"))
    model(torch.zeros(1, 2))
    assert seen == ["old"]
    converted(torch.zeros(1, 2))
    assert seen == ["old", "old", "new"]


def test_the_model_stays_as_it_is(case):
    model, converted, _ = case
    assert not any(isinstance(module, nnj.AbstractJacobian) for module in model.modules())
    converted.extra = nnj.Linear(2, 2)
    assert "extra" not in dict(model.named_modules())


def test_layers_in_a_list_become_a_sequential():
    layers = [nn.Linear(3, 2), nn.Tanh()]
    converted = nnj.convert_to_nnj(layers)
    assert isinstance(converted, nnj.Sequential)
    assert converted[0].weight is layers[0].weight


def test_what_has_products_already_can_be_converted():
    model = nnj.Sequential(nnj.SkipConnection(nn.Linear(2, 2)))
    converted = nnj.convert_to_nnj(model)
    assert type(converted[0]) is nnj.SkipConnection
    assert type(converted[0]._F[0]) is nnj.Linear


def test_scripted_modules_are_refused():
    class Scripted(torch.jit.ScriptModule):
        pass

    with pytest.raises(NotImplementedError, match="scripted"):
        nnj.convert_to_nnj(nn.Sequential(Scripted()))


# Inverses of blocks


def spd(p: int, *lead: int) -> torch.Tensor:
    a = randn(*lead, p, p)
    return a @ a.mT + torch.eye(p, dtype=a.dtype)


def test_blocks_are_inverted_in_nested_lists():
    blocks = [spd(3, B), [spd(2, B), [spd(1, B)]]]
    found = nnj.invert_block_diagonal(blocks)
    for one, other in ((blocks[0], found[0]), (blocks[1][0], found[1][0]), (blocks[1][1][0], found[1][1][0])):
        assert_close(one @ other, torch.eye(one.shape[-1], dtype=one.dtype).expand_as(one))


def test_a_tensor_is_inverted_and_damping_is_added_first():
    m = spd(3)
    assert_close(nnj.utils.invert_block_diagonal(m), torch.linalg.inv(m))
    damped = nnj.invert_block_diagonal(m, damping=0.3)
    assert_close(damped, torch.linalg.inv(m + 0.3 * torch.eye(3, dtype=m.dtype)))


def test_the_inverse_of_a_gauss_newton_metric_needs_damping():
    model, x = seeded(lambda: nnj.Sequential(nnj.Linear(3, 2), nnj.Tanh(), nnj.Linear(2, 1))), randn(B, 3)
    blocks = model.jTmjp(x, None, None, wrt="weight")
    with pytest.raises(ValueError, match="damping"):
        nnj.invert_block_diagonal([-block for block in blocks])
    inverse = nnj.invert_block_diagonal(blocks, damping=1.0)
    predictive = model.jmjTp(x, None, inverse, wrt="weight")
    parts = rows(model, x, "weight").split([8, 3], -1)
    expected = sum(j @ torch.linalg.inv(j.mT @ j + torch.eye(j.shape[-1], dtype=j.dtype)) @ j.mT for j in parts)
    assert_close(predictive, expected)


@pytest.mark.parametrize(("matrix", "error"), [(torch.ones(2, 3), ValueError), ([None], TypeError)])
def test_what_is_no_block_is_refused(matrix, error):
    with pytest.raises(error):
        nnj.invert_block_diagonal(matrix)
