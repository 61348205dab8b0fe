"""Vectors against the arithmetic of their flat tensors."""

from __future__ import annotations

import operator

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from nngeo.layers.collection import LayerCollection
from nngeo.vectors import FVector, PVector, grad, random_fvector, random_pvector, random_pvector_dict

MAKERS = {"flat": random_pvector, "by parameter": random_pvector_dict}
each_maker = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
each_other_maker = pytest.mark.parametrize("make_other", MAKERS.values(), ids=MAKERS)


def build_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv1d(2, 3, 2), nn.Flatten(), nn.LayerNorm(6), nn.Linear(6, 4, bias=False), nn.Tanh(), nn.Linear(4, 2)
    ).double()


@pytest.fixture
def model() -> nn.Module:
    return build_model()


@pytest.fixture
def layers(model) -> LayerCollection:
    return LayerCollection.from_model(model)


def positive(make, layers: LayerCollection, seed: int = 0) -> PVector:
    """Positive, so that every power is defined."""
    v = make(layers, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return v * v + 0.1


def flat_parameters(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# ------------------------------------------------------------ arithmetic

OPERATORS = [operator.add, operator.sub, operator.mul, operator.truediv, operator.pow]
IN_PLACE = [operator.iadd, operator.isub, operator.imul, operator.itruediv]
SCALARS = {
    "int": 3,
    "float": 0.5,
    "numpy": np.float64(0.5),
    "numpy float32": np.float32(0.5),
    "tensor": torch.tensor(0.5, dtype=torch.float64),
}
each_operator = pytest.mark.parametrize("op", OPERATORS, ids=lambda op: op.__name__)
each_in_place = pytest.mark.parametrize("op", IN_PLACE, ids=lambda op: op.__name__)
each_scalar = pytest.mark.parametrize("scalar", SCALARS.values(), ids=SCALARS)


@each_operator
@each_scalar
@each_maker
def test_arithmetic_with_a_scalar_is_elementwise_on_both_sides(make, scalar, op, layers):
    v = positive(make, layers)
    right, left = op(v, scalar), op(scalar, v)
    assert_close(right.to_torch(), op(v.to_torch(), scalar))
    assert_close(left.to_torch(), op(torch.as_tensor(scalar), v.to_torch()))
    assert (right.vector_repr is None) == (left.vector_repr is None) == (v.vector_repr is None)


@each_operator
@each_other_maker
@each_maker
def test_arithmetic_of_vectors_is_elementwise_and_stays_in_the_left_representation(make, make_other, op, layers):
    v, w = positive(make, layers), positive(make_other, layers, seed=1)
    assert_close(op(v, w).to_torch(), op(v.to_torch(), w.to_torch()))
    assert (op(v, w).vector_repr is None) == (v.vector_repr is None)


@each_in_place
@each_scalar
@each_maker
def test_in_place_arithmetic_with_a_scalar_changes_the_tensors(make, scalar, op, layers):
    v = positive(make, layers)
    first, expected = next(iter(v))[1], op(v.to_torch().clone(), scalar)
    same = v
    v = op(v, scalar)
    assert v is same
    assert_close(v.to_torch(), expected)
    assert_close(first.flatten(), expected[: first.numel()])


@each_in_place
@each_other_maker
@each_maker
def test_in_place_arithmetic_with_a_vector_changes_the_tensors(make, make_other, op, layers):
    v, w = positive(make, layers), positive(make_other, layers, seed=1)
    first, expected = next(iter(v))[1], op(v.to_torch().clone(), w.to_torch())
    before = w.to_torch().clone()
    same = v
    v = op(v, w)
    assert v is same
    assert_close(v.to_torch(), expected)
    assert_close(first.flatten(), expected[: first.numel()])
    assert_close(w.to_torch(), before, rtol=0, atol=0)


@each_other_maker
@each_maker
def test_dot_is_the_inner_product(make, make_other, layers):
    v, w = positive(make, layers), positive(make_other, layers, seed=1)
    expected = v.to_torch() @ w.to_torch()
    assert_close(v.dot(w), expected)
    assert_close(v @ w, expected)


@pytest.mark.parametrize("p", [0, 0.5, 1, 2, 3, float("inf"), -float("inf")])
@each_maker
def test_norm_is_that_of_the_flat_vector(make, p, layers):
    v = make(layers, dtype=torch.float64)
    assert_close(v.norm(p), torch.linalg.vector_norm(v.to_torch(), ord=p))


@each_maker
def test_sum_and_signs(make, layers):
    v = make(layers, dtype=torch.float64)
    assert_close(v.sum(), v.to_torch().sum())
    assert_close((-v).to_torch(), -v.to_torch())
    assert_close((+v).to_torch(), v.to_torch())


@each_maker
def test_mixed_dtypes_promote(make, layers):
    single, double = make(layers, dtype=torch.float32), make(layers, dtype=torch.float64)
    assert (single + double).dtype == torch.float64
    assert_close(single.dot(double), single.to_torch().double() @ double.to_torch())


# ------------------------------------------------------------ models


def test_from_model_aliases_the_parameters(model, layers):
    v = PVector.from_model(model)
    assert v.layer_collection == layers
    assert all(x is parameter for (_, x), parameter in zip(v, model.parameters(), strict=True))
    assert_close(v.to_torch().detach(), flat_parameters(model))


def test_the_distance_to_an_anchor_is_differentiable_in_the_model(model):
    anchor = PVector.from_model(model).clone().detach()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    distance = PVector.from_model(model) - anchor
    distance.dot(distance).backward()
    assert all(torch.equal(p.grad, torch.full_like(p, 2.0)) for p in model.parameters())


def test_from_model_takes_some_layers(model):
    some = LayerCollection.from_model(model, nn.Linear)
    v = PVector.from_model(model, some)
    assert [name for name, _ in v] == ["3.weight", "5.weight", "5.bias"]


def test_from_model_grad_holds_the_gradients(model):
    model(torch.randn(3, 2, 3).double()).square().sum().backward()
    v = PVector.from_model_grad(model)
    assert_close(v.to_torch(), torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert not v.to_torch().requires_grad


def test_a_missing_gradient_is_an_error_that_names_the_parameter_or_zero(model):
    model[0](torch.randn(3, 2, 3).double()).sum().backward()
    with pytest.raises(ValueError, match=r"No gradient for '2.weight', '2.bias', .*missing='zero'"):
        PVector.from_model_grad(model)
    v = PVector.from_model_grad(model, missing="zero")
    assert_close(v["0.weight"], model[0].weight.grad)
    assert (v.to_torch_layer("5") == 0).all()
    with pytest.raises(ValueError, match="Unknown missing='ignore'; known are 'error', 'zero'"):
        PVector.from_model_grad(model, missing="ignore")


def test_sparse_gradients_become_dense():
    model = nn.Embedding(5, 2, sparse=True)
    model(torch.tensor([1, 1, 3])).sum().backward()
    assert_close(PVector.from_model_grad(model)["weight"], torch.tensor([0.0, 2, 0, 1, 0])[:, None].expand(5, 2))


@each_maker
@pytest.mark.parametrize("method", ["to_model", "copy_to_model"])
def test_to_model_copies_the_coordinates(make, method, model, layers):
    v, parameters = make(layers, dtype=torch.float64), list(model.parameters())
    getattr(v, method)(model)
    assert_close(flat_parameters(model), v.to_torch())
    assert all(p is q and p.requires_grad for p, q in zip(parameters, model.parameters(), strict=True))


@each_maker
def test_add_to_model_adds_the_coordinates(make, model, layers):
    v, before = make(layers, dtype=torch.float32), flat_parameters(model)
    v.add_to_model(model)
    assert_close(flat_parameters(model), before + v.to_torch().double())


def test_another_model_is_refused(layers):
    with pytest.raises(ValueError, match="of another model: parameter '0.weight'"):
        random_pvector(layers).to_model(nn.Sequential(nn.Linear(3, 2)))


# ------------------------------------------------------------ representations


@each_maker
def test_dict_and_flat_are_the_same_vector(make, layers):
    v = make(layers, dtype=torch.float64)
    again = PVector.from_dict(layers, v.to_dict())
    assert_close(PVector(layers, again.to_torch()).to_torch(), v.to_torch(), rtol=0, atol=0)
    assert [x.shape for tensors in v.to_dict().values() for x in tensors] == [
        shape for layer in layers.layers.values() for shape in layer.shapes.values()
    ]


@each_maker
def test_from_dict_takes_parameters_by_name(make, layers):
    v = make(layers)
    shuffled = dict(reversed(list(v)))
    assert torch.equal(PVector.from_dict(layers, shuffled).to_torch(), v.to_torch())


@each_maker
def test_layers_and_parameters_are_found_by_name(make, layers):
    v = make(layers)
    weight, bias = v["5"]
    assert torch.equal(v["5.weight"], weight) and torch.equal(v["5.bias"], bias)
    assert torch.equal(v.to_torch_layer("5"), torch.cat([weight.flatten(), bias]))
    assert torch.equal(v.to_torch_layer("5"), v.to_torch()[-10:])
    with pytest.raises(KeyError, match="No layer or parameter '4'; the layers are '0', '2', '3', '5'"):
        v["4"]
    with pytest.raises(KeyError, match="No layer '5.weight'; the layers are '0'"):
        v.to_torch_layer("5.weight")


@each_maker
def test_iteration_gives_names_and_tensors_in_order(make, layers):
    v = make(layers)
    assert [name for name, _ in v] == layers.names
    assert torch.equal(torch.cat([x.flatten() for _, x in v]), v.to_torch())


def test_flat_vectors_are_not_copied(layers):
    v = random_pvector(layers)
    v["5.weight"].zero_()
    assert v.to_torch() is v.vector_repr
    assert (v.to_torch_layer("5")[:8] == 0).all()


@each_maker
def test_clone_copies_and_detach_does_not(make, layers):
    v = make(layers)
    copy, same, before = v.clone(), v.detach(), v.to_torch().clone()
    v += 1
    assert_close(copy.to_torch(), before, rtol=0, atol=0)
    assert_close(same.to_torch(), v.to_torch(), rtol=0, atol=0)


@each_maker
def test_size_dtype_device_and_to(make, layers):
    v = make(layers)
    assert v.size() == (layers.numel(),)
    assert (v.dtype, v.device) == (torch.get_default_dtype(), torch.device("cpu"))
    assert v.to(torch.float16).dtype == torch.float16
    assert v.to("meta").device == torch.device("meta")


def test_repr_says_size_representation_dtype_and_device(layers):
    assert repr(random_pvector(layers)) == "PVector(61 coordinates of 4 layers, flat, torch.float32, cpu)"
    assert repr(random_pvector_dict(layers)) == "PVector(61 coordinates of 4 layers, by parameter, torch.float32, cpu)"
    assert repr(random_fvector(3, 2)) == "FVector(2 outputs of 3 examples, torch.float32, cpu)"


@each_maker
def test_restrict_takes_layers_and_embed_puts_them_back(make, model, layers):
    v, some = make(layers), LayerCollection.from_model(model, nn.Linear)
    restricted = v.restrict(some)
    assert restricted.layer_collection == some
    assert torch.equal(restricted.to_torch(), v.to_torch()[-34:])
    embedded = restricted.embed(layers)
    assert torch.equal(embedded.to_torch()[-34:], v.to_torch()[-34:]) and (embedded.to_torch()[:-34] == 0).all()
    assert (restricted.vector_repr is None) == (embedded.vector_repr is None) == (v.vector_repr is None)
    assert v.restrict(layers) is v and v.embed(layers) is v


@each_maker
def test_restrict_reorders_layers(make, layers):
    v, reversed_layers = make(layers), LayerCollection(list(layers.layers.values())[::-1])
    again = v.restrict(reversed_layers).restrict(layers)
    assert torch.equal(again.to_torch(), v.to_torch())
    with pytest.raises(ValueError, match=r"same layers in different orders.*\.restrict\(collection\)"):
        v + v.restrict(reversed_layers)


# ------------------------------------------------------------ gradients


def chain(v: PVector, constant: PVector) -> Tensor:
    w = 2 * v + constant / 3 - v * v
    return (w**2).dot(1 / (v * v + 1)) + w.norm(3) + v.sum()


@each_maker
def test_vectors_are_differentiable(make, layers):
    v, constant = make(layers, dtype=torch.float64), make(layers, dtype=torch.float64)
    for x in v._tensors():
        x.requires_grad_()
    flat = v.to_torch().detach().clone().requires_grad_()
    gradient = grad(chain(v, constant), v)
    expected = torch.autograd.grad(chain(PVector(layers, flat), constant), flat)[0]
    assert_close(gradient.to_torch(), expected)
    assert (gradient.vector_repr is None) == (v.vector_repr is None)


@each_maker
def test_restriction_and_embedding_are_differentiable(make, model, layers):
    v, some = make(layers, dtype=torch.float64), LayerCollection.from_model(model, ["5"])
    for x in v._tensors():
        x.requires_grad_()
    loss = (v.restrict(some).embed(layers) ** 2).sum()
    expected = torch.where(torch.arange(61) < 51, 0, 2 * v.to_torch())
    assert_close(grad(loss, v, allow_unused=True).to_torch(), expected)


def test_grad_of_a_model_is_that_of_backward(model):
    x, w = torch.randn(3, 2, 3).double(), PVector.from_model(model)
    gradient = grad(model(x).square().sum(), w)
    model(x).square().sum().backward()
    assert_close(gradient.to_torch(), PVector.from_model_grad(model).to_torch())


def test_grad_of_grad_is_a_hessian_vector_product(model):
    w, x = PVector.from_model(model), torch.randn(3, 2, 3).double()
    v = random_pvector(w.layer_collection, dtype=torch.float64)
    product = grad(grad(model(x).square().sum(), w, create_graph=True) @ v.detach(), w)
    step = 1e-6
    (step * v).add_to_model(model)
    above = grad(model(x).square().sum(), w)
    (-2 * step * v).add_to_model(model)
    assert_close(
        product.to_torch(), (above - grad(model(x).square().sum(), w)).to_torch() / (2 * step), rtol=1e-5, atol=1e-5
    )


@each_maker
def test_grad_of_intermediate_vectors(make, layers):
    w = make(layers, dtype=torch.float64)
    for x in w._tensors():
        x.requires_grad_()
    v = 3 * w
    assert_close(grad(v.dot(v), v).to_torch(), 2 * v.to_torch())


def test_unused_parameters_get_zeros_only_when_allowed(model):
    w = PVector.from_model(model)
    model[0].weight.requires_grad_(False)
    loss = model[5].weight.sum()
    with pytest.raises(ValueError, match=r"does not depend on 0.weight, 0.bias.*allow_unused=True"):
        grad(loss, w)
    gradient = grad(loss, w, allow_unused=True)
    assert (gradient["5.weight"] == 1).all() and gradient.sum() == 8


@pytest.mark.parametrize("allow_unused", [True, False])
def test_grad_of_what_needs_no_gradient_is_refused(allow_unused, layers, model):
    with pytest.raises(ValueError, match="none of its tensors requires a gradient"):
        v = random_pvector(layers)
        grad(v.sum(), v, allow_unused=allow_unused)
    with pytest.raises(ValueError, match="it has no graph"):
        grad(torch.tensor(1.0), PVector.from_model(model), allow_unused=allow_unused)


# ------------------------------------------------------------ random vectors


@pytest.mark.parametrize("make", [*MAKERS.values(), lambda layers, **options: random_fvector(4, 3, **options)])
def test_random_vectors_take_dtype_device_and_generator(make, layers):
    state = torch.get_rng_state()
    first = make(layers, dtype=torch.float64, device="cpu", generator=torch.Generator().manual_seed(1))
    again = make(layers, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.to_torch(), again.to_torch()) and first.dtype == torch.float64
    assert make(layers).dtype == torch.get_default_dtype()


def test_random_fvector_has_outputs_by_examples():
    assert random_fvector(5).size() == (1, 5)
    assert random_fvector(5, 2).to_torch().shape == (2, 5)


def test_fvectors_have_the_same_arithmetic():
    f, g = random_fvector(5, 2), random_fvector(5, 2)
    assert_close((2 * f - g / 3 + 1).to_torch(), 2 * f.to_torch() - g.to_torch() / 3 + 1)
    assert_close(f @ g, (f.to_torch() * g.to_torch()).sum())
    assert_close(f.norm(), f.to_torch().norm())
    before = f.to_torch().clone()
    f -= g
    assert_close(f.to_torch(), before - g.to_torch())


# ------------------------------------------------------------ errors

LAYERS = LayerCollection.from_model(build_model())
OTHER = LayerCollection.from_model(nn.Sequential(nn.Conv1d(2, 3, 2), nn.Linear(3, 1)))
SAME_NAMES = LayerCollection.from_model(nn.Sequential(nn.Conv1d(2, 3, 3)))
FIRST = LayerCollection([LAYERS["0"]])

ERRORS = {
    "both": (lambda: PVector(LAYERS, torch.zeros(61), {}), ValueError, "exactly one of `vector_repr` and `dict_repr`"),
    "neither": (lambda: PVector(LAYERS), ValueError, "exactly one of `vector_repr` and `dict_repr`"),
    "size": (lambda: PVector(LAYERS, torch.zeros(60)), ValueError, r"must have shape \(61,\).*found \(60,\)"),
    "batch": (lambda: PVector(LAYERS, torch.zeros(2, 61)), ValueError, r"found \(2, 61\)"),
    "layers": (
        lambda: PVector(LAYERS, dict_repr=random_pvector_dict(OTHER).to_dict()),
        ValueError,
        "'2', '3', '5' missing, '1' unknown",
    ),
    "shapes": (
        lambda: PVector(SAME_NAMES, dict_repr=random_pvector_dict(FIRST).to_dict()),
        ValueError,
        r"layer '0' should be Conv1d \(weight \(3, 2, 3\), bias \(3,\)\); found shapes \[\(3, 2, 2\), \(3,\)\]",
    ),
    "names": (
        lambda: PVector.from_dict(FIRST, {"0.weight": torch.zeros(3, 2, 2), "0.running_mean": torch.zeros(3)}),
        ValueError,
        r"'0.bias' missing, '0.running_mean' unknown.*named_parameters",
    ),
    "layer and name": (
        lambda: PVector.from_dict(FIRST, {"0": (torch.zeros(3, 2, 2),), "0.bias": torch.zeros(3)}),
        ValueError,
        "layer names or parameter names as its keys, not both",
    ),
    "collections": (
        lambda: random_pvector(LAYERS) + random_pvector(FIRST),
        ValueError,
        r"only the left one has '2', '3', '5'\. Bring one .*\.restrict\(collection\) or \.embed\(collection\)",
    ),
    "collections in place": (
        lambda: random_pvector(FIRST).__isub__(random_pvector(LAYERS)),
        ValueError,
        "only the right one has '2', '3', '5'",
    ),
    "collections in dot": (
        lambda: random_pvector(SAME_NAMES) @ random_pvector(FIRST),
        ValueError,
        r"'0' is Conv1d \(weight \(3, 2, 3\), bias \(3,\)\) in the left one and Conv1d \(weight \(3, 2, 2\)",
    ),
    "restrict": (
        lambda: random_pvector(FIRST).restrict(LAYERS),
        ValueError,
        "only be restricted to layers that it has: only the collection has '2', '3', '5'",
    ),
    "embed": (
        lambda: random_pvector(LAYERS).embed(FIRST),
        ValueError,
        "a collection that has all of its layers: only the PVector has '2', '3', '5'",
    ),
    "tensor on the right": (
        lambda: random_pvector(FIRST) * torch.ones(15),
        TypeError,
        r"0-d tensors and PVectors; found a tensor of shape \(15,\)",
    ),
    "tensor on the left": (lambda: torch.ones(15) * random_pvector(FIRST), TypeError, r"tensor of shape \(15,\)"),
    "numpy array": (lambda: np.ones(2) * random_pvector(FIRST), TypeError, "unsupported operand"),
    "text": (lambda: random_pvector(FIRST) + "1", TypeError, "unsupported operand"),
    "matrix": (lambda: random_pvector(FIRST) @ 2, TypeError, "unsupported operand"),
    "dot with a tensor": (
        lambda: random_pvector(FIRST).dot(torch.ones(15)),
        TypeError,
        "another PVector; found Tensor",
    ),
    "two spaces": (lambda: random_pvector(FIRST) + random_fvector(15), TypeError, "unsupported operand"),
    "outputs": (lambda: FVector(torch.zeros(3)), ValueError, r"shape \(k, n\), outputs by examples; found \(3,\)"),
    "examples": (
        lambda: random_fvector(3, 2) + random_fvector(3, 1),
        ValueError,
        r"the left one has \(2, 3\), the right one \(1, 3\)",
    ),
    "vector for a scalar": (
        lambda: grad(torch.zeros(2), random_pvector(FIRST)),
        ValueError,
        r"`scalar` must hold one number; found shape \(2,\)",
    ),
}


@pytest.mark.parametrize("error", ERRORS)
def test_bad_input_gets_an_error_that_says_what_would_work(error):
    call, kind, message = ERRORS[error]
    with pytest.raises(kind, match=message):
        call()
