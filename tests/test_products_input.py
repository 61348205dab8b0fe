"""What bad input to a product gets: an error that names the argument, what was found, and what would work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from nngeo import LayerCollection, PVector
from nngeo.products import (
    BlockDiagonal,
    Dense,
    Diagonal,
    Factor,
    Kronecker,
    LowRankPlusDiagonal,
    Softmax,
    jacobian,
    jmjTp,
    jmp,
    jTmjp,
    jvp,
    mjp,
    vjp,
)
from tests.modules import named
from tests.product_settings import draw, setting

AT = {wrt: setting("conv2d_groups", wrt) for wrt in ("input", "weight")}  # n 32, P 16, o 36
MLP = setting("mlp", "weight")  # layers "0" (16), "2" (20), "4" (10); o 2

# ------------------------------------------------------------------------------------------ bad input

VECTORS = {
    "jvp": (jvp, (3, 31), "v"),
    "jvp_batch": (jvp, (2, 32), "v"),
    "vjp": (vjp, (3, 35), "w"),
    "vjp_batch": (vjp, (4, 36), "w"),
    "jmp": (jmp, (3, 31, 2), "m"),
    "jmp_flat": (jmp, (32,), "m"),
    "mjp": (mjp, (3, 2, 35), "m"),
    "mjp_batch": (mjp, (2, 2, 36), "m"),
}


@pytest.mark.parametrize("form", VECTORS)
def test_a_vector_of_a_wrong_shape_is_named_with_both_shapes(form):
    product, shape, name = VECTORS[form]
    at = AT["input"]
    with pytest.raises(ValueError, match=rf"`{name}`.*") as raised:
        product(at.model, at.x, draw(*shape))
    assert str(tuple(shape)) in str(raised.value)


PRODUCTS: dict[str, Callable[..., Any]] = {
    "jvp": lambda at, *a, **o: jvp(at.model, at.x, draw(at.J.shape[2]), *a, **o),
    "vjp": lambda at, *a, **o: vjp(at.model, at.x, draw(at.J.shape[1]), *a, **o),
    "jmp": lambda at, *a, **o: jmp(at.model, at.x, None, *a, **o),
    "mjp": lambda at, *a, **o: mjp(at.model, at.x, None, *a, **o),
    "jacobian": lambda at, *a, **o: jacobian(at.model, at.x, *a, **o),
    "jmjTp": lambda at, *a, **o: jmjTp(at.model, at.x, None, *a, **o),
    "jTmjp": lambda at, *a, **o: jTmjp(at.model, at.x, None, *a, **o),
}
every_product = pytest.mark.parametrize("product", PRODUCTS)
each_side = pytest.mark.parametrize("wrt", ["input", "weight"])


@every_product
@pytest.mark.parametrize("wrt", ["wieght", "", ("input", "y")], ids=str)
def test_an_unknown_wrt_is_answered_with_the_known_ones(product, wrt):
    with pytest.raises(ValueError, match="wrt.*input.*weight"):
        PRODUCTS[product](AT["input"], wrt)


@every_product
def test_several_inputs_must_be_told_apart(product):
    with pytest.raises(ValueError, match="(?s)left.*right"):
        PRODUCTS[product](setting("two_inputs", "left"), "input")


@every_product
def test_integers_have_no_derivative(product):
    at = setting("embedding", "weight")
    with pytest.raises(TypeError, match="int64"):
        PRODUCTS[product](at, "input")


@every_product
def test_weights_of_a_module_without_parameters_are_an_error(product):
    with pytest.raises(ValueError, match="parameters"):
        PRODUCTS[product](setting("softmax", "input"), "weight")


@pytest.mark.parametrize("product", [jmjTp, jTmjp], ids=["jmjTp", "jTmjp"])
@pytest.mark.parametrize("name, known", [("result", "dense.*diag.*trace"), ("method", "exact.*mc.*diag_backprop")])
def test_an_unknown_option_is_answered_with_the_known_ones(product, name, known):
    at = AT["weight"]
    with pytest.raises(ValueError, match=f"(?s){name}.*'dens'.*{known}"):
        product(at.model, at.x, None, "weight", **{name: "dens"})


@pytest.mark.parametrize("product", [jmjTp, jTmjp], ids=["jmjTp", "jTmjp"])
def test_an_unknown_reduction_is_answered_with_the_known_ones(product):
    at = AT["weight"]
    with pytest.raises(ValueError, match="(?s)reduce.*'average'.*sum.*mean"):
        product(at.model, at.x, None, "weight", reduce="average")


METRICS = {
    "tensor": draw(35, 35),
    "batch": draw(2, 36, 36),
    "vector": draw(36),
    "diagonal": Diagonal(draw(35)),
    "dense": Dense(draw(3, 35, 35)),
    "factor": Factor(draw(3, 35, 2)),
    "low_rank_plus_diagonal": LowRankPlusDiagonal(draw(35, 2), draw(35)),
    "kronecker": Kronecker(draw(6, 6), draw(5, 5)),
    "softmax": Softmax(draw(3, 35)),
}


@pytest.mark.parametrize("metric", METRICS)
def test_a_metric_of_a_wrong_size_says_which_would_fit(metric):
    at = AT["weight"]
    with pytest.raises(ValueError, match="36"):
        jTmjp(at.model, at.x, METRICS[metric], "weight")


@pytest.mark.parametrize("names", [("0", "2"), ("0", "2", "4", "5"), ("0", "1", "2")], ids="+".join)
def test_blocks_must_be_those_of_the_layers(names):
    sizes = {"0": 16, "1": 10, "2": 20, "4": 10, "5": 1}
    blocks = BlockDiagonal({name: draw(sizes[name], sizes[name]) for name in names})
    with pytest.raises(ValueError, match="'4'|'5'"):
        jmjTp(MLP.model, MLP.x, blocks, "weight")


def test_a_block_must_have_the_size_of_its_layer():
    blocks = BlockDiagonal({"0": draw(16, 16), "2": draw(19, 19), "4": draw(10, 10)})
    with pytest.raises(ValueError, match="'2'"):
        jmjTp(MLP.model, MLP.x, blocks, "weight")


def test_a_metric_of_another_type_is_an_error():
    with pytest.raises(TypeError, match="metric"):
        jTmjp(MLP.model, MLP.x, [1.0, 2.0], "weight")


def test_two_inputs_must_have_as_many_examples():
    with pytest.raises(ValueError, match="x2"):
        jTmjp(MLP.model, MLP.x, None, "weight", x2=MLP.module.inputs(2))


def test_a_factor_of_two_inputs_does_not_exist():
    with pytest.raises(ValueError, match="factor"):
        jTmjp(MLP.model, MLP.x, None, "weight", x2=MLP.x2, result="factor")


def test_an_indefinite_metric_has_no_factor():
    with pytest.raises(ValueError, match="factor"):
        jTmjp(MLP.model, MLP.x, Dense(torch.diag(draw(2))), "weight", result="factor")


def test_a_pvector_of_another_model_is_an_error():
    layers = LayerCollection.from_model(AT["weight"].model)
    with pytest.raises(ValueError, match="LayerCollection"):
        jvp(MLP.model, MLP.x, PVector(layers, vector_repr=draw(layers.numel())), "weight")


def test_a_pvector_is_no_vector_of_inputs():
    layers = LayerCollection.from_model(MLP.model)
    with pytest.raises((TypeError, ValueError), match="PVector"):
        jvp(MLP.model, MLP.x, PVector(layers, vector_repr=draw(layers.numel())), "input")


@each_side
def test_several_outputs_need_a_function(wrt):
    (module,) = named("lstm")
    with pytest.raises(TypeError, match="function"):
        jacobian(module.build().layer, module.inputs(), wrt)


@each_side
def test_outputs_without_the_axis_of_examples_are_an_error(wrt):
    at = AT[wrt]
    with pytest.raises(ValueError, match="example"):
        jacobian(at.model, at.x, wrt, function=lambda x: at.model(x).sum())


@each_side
def test_batch_norm_in_training_has_no_jacobian_by_example(wrt):
    (module,) = named("batch_norm1d")
    with pytest.raises(ValueError, match="eval"):
        jacobian(module.build().train(), module.inputs(), wrt)


@each_side
def test_dropout_in_training_has_no_jacobian(wrt):
    model = nn.Sequential(nn.Linear(3, 2), nn.Dropout()).double().train()
    with pytest.raises(ValueError, match="eval"):
        jacobian(model, draw(3, 3), wrt)


@each_side
def test_a_vector_of_another_precision_is_an_error(wrt):
    at = AT[wrt]
    with pytest.raises((TypeError, ValueError), match="float32"):
        jvp(at.model, at.x, draw(at.J.shape[2]).float(), wrt)
