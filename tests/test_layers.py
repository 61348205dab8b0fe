"""Which parameters there are and in which order, the library's own modules, and rules for a user's layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector
from torch.testing import assert_close

import nngeo
from nngeo import FIM, LayerCollection, PMatDense, PMatKFAC, PVector, random_pvector, register_rule
from nngeo.generators.batches import Batch
from nngeo.generators.plans import Planner
from nngeo.layers import Affine1d, Cosine1d, WeightNorm1d, WeightNorm2d, conv, rule_for
from nngeo.layers.linear import LinearRule
from tests import networks, reference
from tests.cases import CASES

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
X = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
BATCH = (X, torch.arange(6) % 3)
EXACT = [PMatDense, nngeo.PMatLowRank, nngeo.PMatImplicit]
PMATS = [*EXACT, PMatKFAC, nngeo.PMatDiag, nngeo.PMatBlockDiag, nngeo.PMatEKFAC, nngeo.PMatQuasiDiag]


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4, bias=False), nn.RMSNorm(4))
    return nn.Sequential(body, nn.Linear(4, 3)).double()


@each_case
def test_coordinates_follow_named_parameters(case):
    model = case.make()
    expected = {name: p for name, p in model.named_parameters() if p.requires_grad}
    layers = LayerCollection.from_model(model)
    found = dict(layers.named_parameters(model))
    assert list(found) == list(expected) == layers.names
    assert [id(p) for p in found.values()] == [id(p) for p in expected.values()]
    assert_close(PVector.from_model(model).to_torch(), parameters_to_vector(expected.values()))
    assert layers.numel() == sum(p.numel() for p in expected.values())


@each_case
def test_a_flat_vector_is_split_into_layers_and_joined(case):
    layers = LayerCollection.from_model(case.make())
    flat = torch.randn(2, layers.numel())
    parts, last = layers.split(flat), list(layers)[-1]
    assert_close(layers.join(parts), flat)
    assert {name: flat[0].tolist().index(part[0, 0].item()) for name, part in parts.items()} == layers.p_pos
    assert {local: x.shape[1:] for local, x in layers.split_layer(last, parts[last]).items()} == layers[last].shapes


CHOICES = {
    "a name": ("1", ["1"]),
    "a module of layers": ("0", ["0.0", "0.2", "0.3"]),
    "a type": (nn.Linear, ["0.0", "0.2", "1"]),
    "a parent type": (nn.Module, ["0.0", "0.2", "0.3", "1"]),
    "both, in any order": ([nn.RMSNorm, "0.0"], ["0.0", "0.3"]),
    "a tuple": (("1", "0.2"), ["0.2", "1"]),
    "a predicate": (lambda name, module: getattr(module, "bias", None) is None, ["0.2", "0.3"]),
    "nothing": (None, ["0.0", "0.2", "0.3", "1"]),
}


@pytest.mark.parametrize(("layers", "expected"), CHOICES.values(), ids=CHOICES)
def test_layers_are_chosen_in_the_order_of_the_model(layers, expected, model):
    assert list(LayerCollection.from_model(model, layers)) == expected


WRONG_CHOICES = {
    "an unknown name": (ValueError, r"'0\.5'.*'0\.0' \(Linear\)", "0.5"),
    "a type that is not there": (ValueError, r"Conv2d.*'0\.0' \(Linear\)", nn.Conv2d),
    "a number among names": (TypeError, "`layers` holds 3", ["1", 3]),
    "a number": (TypeError, "`layers`", 3),
    "a module": (TypeError, "`layers`", nn.Linear(3, 4)),
    "a predicate of nothing": (ValueError, "`layers`", lambda name, module: False),
    "an empty list": (ValueError, "`layers`", []),
}


@pytest.mark.parametrize(("kind", "message", "layers"), WRONG_CHOICES.values(), ids=WRONG_CHOICES)
def test_a_choice_of_no_layers_is_refused(kind, message, layers, model):
    with pytest.raises(kind, match=message):
        LayerCollection.from_model(model, layers)


def test_frozen_parameters_are_left_out_unless_asked_for(model):
    model[0][0].requires_grad_(False)
    model[1].weight.requires_grad_(False)
    assert LayerCollection.from_model(model).names == ["0.2.weight", "0.3.weight", "1.bias"]
    assert LayerCollection.from_model(model, frozen=True).names == [name for name, _ in model.named_parameters()]


def test_parameters_of_a_module_with_children_are_a_layer():
    layers = LayerCollection.from_model(networks.VisionTransformer(), lambda name, module: not name)
    assert layers[""].shapes == {"class_token": (1, 1, 4), "positions": (1, 5, 4)}
    assert layers.names == ["class_token", "positions"]


def test_collections_are_compared_by_names_and_shapes(model):
    layers, part = LayerCollection.from_model(model), LayerCollection.from_model(model, "0")
    other = LayerCollection.from_model(nn.Sequential(nn.Sequential(nn.Linear(3, 4)), nn.Linear(4, 5)))
    assert layers == (again := LayerCollection.from_model(model)) and hash(layers) == hash(again)
    assert layers != part and layers.covers(part) and not part.covers(layers) and not layers.covers(other)
    assert list(layers.merge(other)) == ["0.0"] and layers.merge(part) == part


def test_layers_know_the_shapes_of_weight_and_bias(model):
    layers = LayerCollection.from_model(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2, bias=False)))
    assert [(layer.weight, layer.bias, layer.has_bias()) for layer in layers.layers.values()] == [
        ((4, 3), (4,), True),
        ((2, 4), None, False),
    ]


def test_a_layer_is_added_under_a_name(model):
    layers, every = LayerCollection(), LayerCollection.from_model(model)
    layers.add_layer("0.0", every["0.0"])
    layers.add_layer("head", every["1"])
    assert layers.names == ["0.0.weight", "0.0.bias", "head.weight", "head.bias"]
    with pytest.raises(ValueError, match="already is a layer 'head'"):
        layers.add_layer("head", every["1"])


def test_layers_can_be_added(model):
    layers = LayerCollection()
    layers.add_layer_from_model(model, model[1])
    layers.add_layer(LayerCollection.from_model(model)["0.0"])
    assert layers.names == ["1.weight", "1.bias", "0.0.weight", "0.0.bias"]
    with pytest.raises(ValueError, match="Tanh owns no parameters"):
        layers.add_layer_from_model(model, model[0][1])


@pytest.mark.parametrize("representation", PMATS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("chosen", [["0.2"], ["0.0", "1"]], ids="-".join)
def test_a_matrix_over_some_layers_acts_on_the_vectors_of_all(chosen, representation, model):
    layers, every = LayerCollection.from_model(model, chosen), LayerCollection.from_model(model)
    matrix, v = FIM(model, BATCH, representation, layer_collection=layers), random_pvector(every, dtype=X.dtype)
    part, dense = v.restrict(layers).to_torch(), matrix.to_torch()
    solution = torch.linalg.solve(dense + torch.eye(len(dense), dtype=X.dtype), part)
    assert_close(matrix.mv(v).to_torch(), PVector(layers, dense @ part).embed(every).to_torch())
    assert_close(matrix.vTMv(v), part @ dense @ part)
    assert_close(
        matrix.solve(v, 1.0).to_torch(), PVector(layers, solution).embed(every).to_torch(), rtol=1e-4, atol=1e-5
    )


def test_a_matrix_over_some_layers_is_a_block_of_the_whole(model):
    whole = FIM(model, BATCH, PMatDense)
    part = FIM(model, BATCH, PMatDense, layer_collection=LayerCollection.from_model(model, "1"))
    start = whole.layer_collection.p_pos["1"]
    assert_close(part.to_torch(), whole.to_torch()[start:, start:])


def unit(x: Tensor) -> Tensor:
    return x / (x.flatten(1).square().sum(1) + 1e-5).sqrt().view(-1, *[1] * (x.ndim - 1))


IMAGES = torch.randn(6, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
WIDE = {"stride": 2, "padding": 1, "groups": 3}
MODULES = {
    "Affine1d": (lambda: Affine1d(3), X, lambda m, x: x * m.weight + m.bias),
    "Affine1d on positions": (lambda: Affine1d(4), IMAGES, lambda m, x: x * m.weight + m.bias),
    "Affine1d without bias": (lambda: Affine1d(3, bias=False), X, lambda m, x: x * m.weight),
    "WeightNorm1d": (lambda: WeightNorm1d(3, 4), X, lambda m, x: x @ unit(m.weight).T),
    "Cosine1d": (lambda: Cosine1d(3, 4), X, lambda m, x: unit(x) @ unit(m.weight).T),
    "WeightNorm2d": (lambda: WeightNorm2d(3, 4, 2), IMAGES, lambda m, x: F.conv2d(x, unit(m.weight))),
    "wide": (lambda: WeightNorm2d(3, 6, 2, **WIDE), IMAGES, lambda m, x: F.conv2d(x, unit(m.weight), **WIDE)),
}
each_module = pytest.mark.parametrize(("make", "x", "formula"), MODULES.values(), ids=MODULES)
each_exact = pytest.mark.parametrize("representation", EXACT, ids=lambda kind: kind.__name__)


def made(make: Any) -> nn.Module:
    torch.manual_seed(0)
    module = make().double()
    nn.init.normal_(module.weight)
    return module


@each_module
def test_a_module_is_its_formula(make, x, formula):
    module = made(make)
    assert_close(module(x), formula(module, x))


@each_module
@each_exact
def test_matrices_of_a_module_are_exact(representation, make, x, formula):
    model, expected = made(make), reference.fisher(made(make), (x[:2], x[:2]), "regression")
    assert_close(FIM(model, (x[:2],), representation, "regression").to_torch(), expected)


class Flipped(nn.Linear):
    """A user's layer: a linear map of the features in reverse order."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.flip(-1), self.weight, self.bias)


class Kept(Flipped):
    """A subclass that computes the same."""


class Doubled(Flipped):
    """A subclass that computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Mistaken(Doubled):
    """To be registered with a rule that does not fit."""


class ByName(nn.Linear):
    """To be registered by its name."""

    forward = Flipped.forward


class FlippedRule(LinearRule):
    def inputs(self, module: nn.Module, x: Tensor) -> Tensor:
        return super().inputs(module, x.flip(-1))


register_rule(Flipped, Mistaken, f"{__name__}.ByName")(FlippedRule)


def own_net(layer: type[nn.Linear]) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(layer(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()


@pytest.mark.parametrize("layer", [Flipped, Kept, ByName, Doubled, Mistaken], ids=lambda kind: kind.__name__)
@each_exact
def test_matrices_are_exact_whatever_rule_is_registered(representation, layer):
    model = own_net(layer)
    assert_close(FIM(model, BATCH, representation).to_torch(), reference.fisher(model, BATCH, "classif_logits"))


@pytest.mark.parametrize("layer", [Flipped, Kept, ByName], ids=lambda kind: kind.__name__)
def test_a_registered_rule_brings_kronecker_factors(layer):
    expected = FIM(own_net(nn.Linear), (X.flip(-1), BATCH[1]), PMatKFAC).to_torch()
    assert_close(FIM(own_net(layer), BATCH, PMatKFAC).to_torch(), expected)


@pytest.mark.parametrize("layer", [Doubled, Mistaken, networks.CosineLinear], ids=lambda kind: kind.__name__)
def test_a_layer_without_a_rule_that_fits_has_no_factors(layer):
    with pytest.raises(NotImplementedError, match=rf"'0' \({layer.__name__}\).*PMatMixed"):
        FIM(own_net(layer), BATCH, PMatKFAC)


def test_a_subclass_is_served_where_it_keeps_forward():
    assert isinstance(rule_for(Kept(3, 4)), FlippedRule) and rule_for(Doubled(3, 4)) is None
    assert rule_for(networks.CosineLinear(3, 3)) is None
    assert isinstance(rule_for(nn.modules.linear.NonDynamicallyQuantizableLinear(3, 3)), LinearRule)


# Used outside of the calls of their modules: by a parent, by a function, or in a vectorised or differentiated forward.
ELSEWHERE = {
    "attention": {"0.attend.out_proj"},
    "attention_first": {"0.attend.out_proj"},
    "attention_cross": {"attend.out_proj"},
    "encoder_layer": {"layer.self_attn.out_proj"},
    "vision_transformer": {"attend.attend.out_proj"},
    "parent_uses_child": {"inner"},
    "parent_replaces_child": {"inner"},
    "hidden_use": {"inner"},
    "mapped": {"1.body", "1.head"},
    "force_field": {"body", "head"},
}


@each_case
@pytest.mark.filterwarnings("ignore:The outputs do not depend on")
def test_each_registered_rule_is_right_so_that_it_is_the_one_in_the_plan(case):
    """A wrong rule would be passed over in silence, for the generic one: right, but slow and without factors."""
    model = case.make()
    layers = LayerCollection.from_model(model)
    plan = Planner(model, case.function(model), layers, check=True).plan(Batch.of(case.batch()))
    ruled = {name for name in layers if all(rule_for(model.get_submodule(host)) for host in plan.uses[name])}
    assert {name for name in ruled if not plan.sources[name].fast} == ELSEWHERE.get(case.id, set())


# ------------------------------------------------------------------------------------------ patches


@pytest.mark.parametrize("short", [0, conv.SHORT, 1000], ids=["views", "as it is", "copies"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("space", [(17,), (9, 30), (30, 9), (6, 7, 8)], ids=str)
def test_patches_are_the_windows_of_each_position(space, stride, dilation, short, monkeypatch):
    monkeypatch.setattr(conv, "SHORT", short)
    kernel = (2, 1, 3)[-len(space) :]
    x = torch.randn(2, 3, *space, dtype=torch.float64)
    found = conv.patches(x, kernel, (stride,) * len(space), (dilation,) * len(space))
    weight = torch.randn(4, 3, *kernel, dtype=torch.float64)
    expected = torch.convolution(x, weight, None, [stride] * len(space), [0] * len(space), [dilation] * len(space),
                                 False, [0] * len(space), 1)  # fmt: skip
    axes = [1, *range(2 + len(space), 2 + 2 * len(space))]
    products = torch.tensordot(found, weight, dims=(axes, list(range(1, 2 + len(kernel)))))
    assert_close(products.movedim(-1, 1), expected)
