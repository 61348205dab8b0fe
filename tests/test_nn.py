"""Jacobian products as methods: the number that the definition gives, whatever the layer, the flags and `wrt`."""

from __future__ import annotations

import copy
import inspect
from functools import cache

import pytest
import torch
from torch.testing import assert_close

import nngeo.nn as nnj
from tests.jacobians import diagonal, randn, rows, seeded

B = 3

# NNJ's layers and containers, and what it has errors for: strides, overlaps, interpolation, dilation, groups, padding.
LAYERS = {
    "linear": (lambda: nnj.Linear(4, 3), (4,)),
    "linear_tokens": (lambda: nnj.Linear(4, 2), (2, 4)),
    "tanh": (nnj.Tanh, (4,)),
    "relu": (nnj.ReLU, (4,)),
    "sigmoid_image": (nnj.Sigmoid, (1, 2, 2)),
    "softplus_low_threshold": (lambda: nnj.Softplus(beta=2, threshold=0.5), (4,)),
    "sinusoidal": (nnj.Sinusoidal, (4,)),
    "truncexp": (nnj.TruncExp, (4,)),
    "reshape": (lambda: nnj.Reshape(2, 3), (6,)),
    "flatten": (nnj.Flatten, (2, 2, 2)),
    "flatten_from_2": (lambda: nnj.Flatten(2), (2, 2, 2)),
    "l2norm": (nnj.L2Norm, (4,)),
    "l2norm_large_eps": (lambda: nnj.L2Norm(eps=0.5), (2, 2)),
    "conv": (lambda: nnj.Conv2d(2, 3, 2, use_vmap_for_backprop=True), (2, 3, 3)),
    "conv_stride": (lambda: nnj.Conv2d(1, 2, 3, stride=2, padding=2), (1, 4, 4)),
    "conv_groups_dilation": (lambda: nnj.Conv2d(2, 2, 2, groups=2, dilation=2, bias=False), (2, 4, 4)),
    "conv_same": (lambda: nnj.Conv2d(1, 2, 3, padding="same"), (1, 3, 3)),
    "conv_circular": (lambda: nnj.Conv2d(1, 2, 3, padding=1, padding_mode="circular"), (1, 3, 3)),
    "upsample": (lambda: nnj.Upsample(scale_factor=2), (1, 2, 2)),
    "upsample_bilinear": (lambda: nnj.Upsample(size=(3, 4), mode="bilinear"), (1, 2, 2)),
    "upsample_fractional_3d": (lambda: nnj.Upsample(scale_factor=1.5), (2, 4)),
    "maxpool": (lambda: nnj.MaxPool2d(2), (1, 4, 4)),
    "maxpool_overlapping": (lambda: nnj.MaxPool2d(3, stride=1), (1, 4, 4)),
    "maxpool_dilated": (lambda: nnj.MaxPool2d(2, stride=1, padding=1, dilation=2), (1, 4, 4)),
    "sequential": (
        lambda: nnj.Sequential(
            *(nnj.Conv2d(1, 2, 2, stride=2), nnj.Tanh(), nnj.MaxPool2d(2, 1), nnj.Upsample(scale_factor=2)),
            *(nnj.Flatten(), nnj.Linear(32, 2), nnj.Softplus()),
            add_hooks=False,
        ),
        (1, 6, 6),
    ),
    "skip": (lambda: nnj.SkipConnection(nnj.Linear(4, 3), nnj.Tanh(), add_hooks=True), (4,)),
    "skip_image": (lambda: nnj.SkipConnection(nnj.Conv2d(1, 1, 3, padding=1), nnj.Tanh()), (1, 3, 3)),
    "skip_without_weights": (lambda: nnj.SkipConnection(nnj.Tanh()), (4,)),
    "residual": (lambda: nnj.Residual(nnj.Linear(4, 4), nnj.GELU()), (4,)),
    "nested": (
        lambda: nnj.Sequential(
            nnj.Linear(3, 4), nnj.Sequential(nnj.Tanh(), nnj.SkipConnection(nnj.Linear(4, 1))), nnj.Linear(5, 2)
        ),
        (3,),
    ),
    "torch_children": (
        lambda: nnj.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4), torch.nn.Sequential(torch.nn.SiLU())),
        (3,),
    ),
    "layernorm": (lambda: nnj.LayerNorm(4), (4,)),
    "softmax": (lambda: nnj.Softmax(-1), (4,)),
    "transformer": (
        lambda: nnj.TransformerEncoderLayer(4, 2, dim_feedforward=3, dropout=0.0, batch_first=True),
        (2, 4),
    ),
}
CASES = [(name, wrt) for name in LAYERS for wrt in ("input", "weight")]


@cache
def case(name: str, wrt: str):
    """The model, its inputs and J, or None where there are no weights."""
    make, shape = LAYERS[name]
    model, x = seeded(make), randn(B, *shape)
    nothing = wrt == "weight" and not any(p.requires_grad for p in model.parameters())
    return model, x, None if nothing else rows(model, x, wrt)


def check(found, expected) -> None:
    assert_close(found, expected, rtol=1e-9, atol=1e-11)


def joined(blocks) -> torch.Tensor:
    """The block-diagonal matrix of a nested list."""
    flat: list = []

    def collect(part):
        flat.append(part) if isinstance(part, torch.Tensor) else [collect(inner) for inner in part]

    collect(blocks)
    return torch.stack([torch.block_diag(*(block[e] for block in flat)) for e in range(B)])


def block_diagonal(matrix: torch.Tensor, blocks) -> torch.Tensor:
    """The matrix, with zeros where a nested list of blocks has them."""
    return torch.where(joined_ones(blocks), matrix, 0.0)


def joined_ones(blocks) -> torch.Tensor:
    def ones(part):
        return torch.ones_like(part) if isinstance(part, torch.Tensor) else [ones(inner) for inner in part]

    return joined(ones(blocks)).bool()


@pytest.mark.parametrize(("name", "wrt"), CASES)
def test_jacobian_has_the_rows_of_autograd(name, wrt):
    model, x, j = case(name, wrt)
    check(model.jacobian(x, model(x), wrt=wrt), j)
    check(model.jacobian(x, wrt=wrt), j)


@pytest.mark.parametrize(("name", "wrt"), CASES)
def test_jvp_is_j_times_v(name, wrt):
    model, x, j = case(name, wrt)
    v = randn(B, 1 if j is None else j.shape[2])
    check(model.jvp(x, model(x), v, wrt=wrt), None if j is None else torch.einsum("bon,bn->bo", j, v))


@pytest.mark.parametrize(("name", "wrt"), CASES)
def test_vjp_is_w_times_j(name, wrt):
    model, x, j = case(name, wrt)
    w = randn(B, model(x)[0].numel())
    check(model.vjp(x, model(x), w, wrt=wrt), None if j is None else torch.einsum("bon,bo->bn", j, w))


@pytest.mark.parametrize("columns", [5, None])
@pytest.mark.parametrize(("name", "wrt"), CASES)
def test_jmp_is_j_times_m(name, wrt, columns):
    model, x, j = case(name, wrt)
    m = None if columns is None else randn(B, 1 if j is None else j.shape[2], columns)
    check(model.jmp(x, None, m, wrt), j if j is None or m is None else j @ m)


@pytest.mark.parametrize("count", [5, None])
@pytest.mark.parametrize(("name", "wrt"), CASES)
def test_mjp_is_m_times_j(name, wrt, count):
    model, x, j = case(name, wrt)
    m = None if count is None else randn(B, count, model(x)[0].numel())
    check(model.mjp(x, model(x), m, wrt), j if j is None or m is None else m @ j)


@pytest.mark.parametrize("to_diag", [False, True], ids=["to_full", "to_diag"])
@pytest.mark.parametrize("kind", ["identity", "full", "diag"])
@pytest.mark.parametrize(("name", "wrt"), CASES)
def test_jmjTp_pushes_a_metric(name, wrt, kind, to_diag):
    model, x, j = case(name, wrt)
    m = metric(kind, 1 if j is None else j.shape[2])
    found = model.jmjTp(x, model(x), m, wrt=wrt, from_diag=kind == "diag", to_diag=to_diag)
    if j is None:
        assert found is None
        return
    expected = j @ dense(m, kind, j.shape[2]) @ j.mT
    check(found, diagonal(expected) if to_diag else expected)


@pytest.mark.parametrize("to_diag", [False, True], ids=["to_full", "to_diag"])
@pytest.mark.parametrize("kind", ["identity", "full", "diag"])
@pytest.mark.parametrize(("name", "wrt"), CASES)
def test_jTmjp_pulls_a_metric(name, wrt, kind, to_diag):
    model, x, j = case(name, wrt)
    o = model(x)[0].numel()
    m = metric(kind, o)
    found = model.jTmjp(x, model(x), m, wrt=wrt, from_diag=kind == "diag", to_diag=to_diag)
    if j is None:
        assert found is None
        return
    expected = j.mT @ dense(m, kind, o) @ j
    if isinstance(found, list):
        check(joined(found), block_diagonal(expected, found))
    else:
        check(found, diagonal(expected) if to_diag else expected)


def metric(kind: str, n: int) -> torch.Tensor | None:
    """Neither symmetric nor definite."""
    return {"identity": lambda: None, "full": lambda: randn(B, n, n), "diag": lambda: randn(B, n)}[kind]()


def dense(m: torch.Tensor | None, kind: str, n: int) -> torch.Tensor:
    if m is None:
        return torch.eye(n, dtype=torch.float64)
    return torch.diag_embed(m) if kind == "diag" else m


@pytest.mark.parametrize("name", ["jacobian", "jvp", "jmp", "vjp", "mjp", "jmjTp", "jTmjp", "jjT", "jTj"])
@pytest.mark.parametrize(("plural", "wrt"), [("inputs", "input"), ("weights", "weight")])
@pytest.mark.parametrize("model", [lambda: nnj.Linear(3, 2), lambda: nnj.Sequential(nnj.Linear(3, 2), nnj.ReLU())])
def test_the_plural_means_the_same(model, plural, wrt, name):
    model, x = seeded(model), randn(B, 3)
    n = 3 if wrt == "input" else 8
    shapes = {"jvp": (B, n), "jmp": (B, n, 2), "vjp": (B, 2), "mjp": (B, 4, 2), "jmjTp": (B, n, n), "jTmjp": (B, 2, 2)}
    args = (x, None, randn(*shapes[name])) if name in shapes else (x,)
    found = getattr(model, name)(*args, wrt=plural)
    assert found is not None
    check(found, getattr(model, name)(*args, wrt=wrt))


ACTIVATIONS = [
    *("tanh", "relu", "sigmoid_image", "softplus_low_threshold", "sinusoidal", "truncexp", "reshape"),
    *("flatten", "flatten_from_2"),
]


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_elementwise_layers_give_the_diagonal_of_their_jacobian(name):
    model, x, j = case(name, "input")
    check(model.jacobian(x, model(x), wrt="input", diag=True), diagonal(j))
    check(model.jacobian(x, model(x), diag=False), j)
    assert model.jacobian(x, wrt="weight", diag=True) is None


def test_the_weights_jacobian_of_a_prelu_is_not_diagonal():
    model, x = seeded(lambda: nnj.PReLU(4)), randn(B, 4)
    check(model.jacobian(x, diag=True), diagonal(rows(model, x)))
    with pytest.raises(ValueError, match="not diagonal"):
        model.jacobian(x, wrt="weight", diag=True)


NAMES = ["jacobian", "jvp", "jmp", "vjp", "mjp", "jmjTp", "jTmjp", "jjT", "jTj", "jTmjp_batch2"]


@pytest.mark.parametrize("name", NAMES)
def test_underscored_names_are_the_same_methods(name):
    model, x = seeded(lambda: nnj.Linear(3, 3)), randn(B, 3)
    third = {"jvp": randn(B, 3), "vjp": randn(B, 3), "jTmjp_batch2": None}.get(name, randn(B, 3, 3))
    args = (x, randn(B, 3, seed=2)) if name == "jTmjp_batch2" else (x, None)
    more = () if name in ("jacobian", "jjT", "jTj", "jTmjp_batch2") else (third,)
    assert_close(getattr(model, f"_{name}")(*args, *more), getattr(model, name)(*args, *more), rtol=0, atol=0)


@pytest.mark.parametrize("wrt", ["input", "weight"])
@pytest.mark.parametrize("to_diag", [False, True])
def test_jjT_and_jTj_are_sandwiches_of_the_identity(wrt, to_diag):
    model, x, j = case("linear", wrt)
    forward, back = j @ j.mT, j.mT @ j
    check(model.jjT(x, None, wrt, to_diag), diagonal(forward) if to_diag else forward)
    check(model.jTj(x, None, wrt=wrt, to_diag=to_diag), diagonal(back) if to_diag else back)


@pytest.mark.parametrize("identity", [True, False], ids=["identity", "metrics"])
@pytest.mark.parametrize("to_diag", [False, True], ids=["to_full", "to_diag"])
@pytest.mark.parametrize("wrt", ["input", "weight"])
@pytest.mark.parametrize("name", ["linear", "nested"])
def test_batch2_gives_the_three_products_of_two_batches(name, wrt, to_diag, identity):
    model, x1, j1 = case(name, wrt)
    x2 = randn(*x1.shape, seed=7)
    j2, o = rows(model, x2, wrt), j1.shape[1]
    ms = None if identity else tuple(randn(B, o, o, seed=s) for s in (3, 4, 5))
    found = model._jTmjp_batch2(x1, x2, model(x1), model(x2), ms, wrt=wrt, to_diag=to_diag)
    m11, m12, m22 = ms or [torch.eye(o, dtype=torch.float64)] * 3
    expected = (j1.mT @ m11 @ j1, j1.mT @ m12 @ j2, j2.mT @ m22 @ j2)
    assert len(found) == 3
    for one, other in zip(found, expected, strict=True):
        if isinstance(one, list):
            check(joined(one), block_diagonal(other, one))
        else:
            check(one, diagonal(other) if to_diag else other)


def test_batch2_is_the_gauss_newton_diagonal_of_a_squared_distance():
    model, x1, x2 = seeded(lambda: nnj.Sequential(nnj.Linear(3, 4), nnj.Tanh())), randn(B, 3), randn(B, 3, seed=2)
    first, mixed, last = model.jTmjp_batch2(x1, x2, None, None, None, wrt="weight", to_diag=True)
    difference = rows(model, x1, "weight") - rows(model, x2, "weight")
    check(first - 2 * mixed + last, difference.square().sum(1))


@pytest.mark.parametrize("name", ["linear", "tanh", "sequential"])
@pytest.mark.parametrize("wrt", ["parameters", "", "weightss", None, 3])
def test_an_unknown_wrt_is_refused(name, wrt):
    model, x, _ = case(name, "input")
    with pytest.raises((ValueError, TypeError), match="wrt"):
        model.vjp(x, model(x), torch.ones_like(model(x)).flatten(1), wrt=wrt)


def test_an_unknown_wrt_says_what_is_known():
    model, x, _ = case("tanh", "input")
    with pytest.raises(ValueError, match='"input", "weight"'):
        model.jacobian(x, wrt="bias")


def test_val_is_a_hint_that_nothing_depends_on():
    model, x, j = case("sequential", "weight")
    w = randn(B, j.shape[1])
    expected = torch.einsum("bon,bo->bn", j, w)
    val = model(x)
    model(randn(*x.shape, seed=9))  # what ran last does not matter
    check(model.vjp(x, val, w, wrt="weight"), expected)
    check(model.vjp(x, None, w, wrt="weight"), expected)
    check(model.vjp(x, torch.zeros_like(val), w, wrt="weight"), expected)


@pytest.mark.parametrize("shape", [(B, 3), (3, 3), (B, 2, 2)])
def test_a_metric_of_another_shape_is_refused(shape):
    model, x = seeded(lambda: nnj.Linear(4, 3)), randn(B, 4)
    with pytest.raises(ValueError, match=r"shape \("):
        model.jTmjp(x, None, randn(*shape))


def test_metrics_of_the_functions_are_accepted():
    from nngeo.products import Factor

    model, x, j = case("nested", "weight")
    v = randn(B, j.shape[1], 2)
    check(model.jTmjp(x, None, Factor(v), wrt="weight", to_diag=True), diagonal(j.mT @ v @ v.mT @ j))


# Weights


def test_weights_are_read_and_written_in_the_order_of_the_products():
    model = seeded(lambda: nnj.Sequential(nnj.Linear(2, 3), nnj.Tanh(), nnj.Linear(3, 1)))
    expected = torch.cat([p.detach().flatten() for p in model.parameters()])
    weight = model.get_weight()
    check(weight, expected)
    weight += 1  # a copy
    check(model.get_weight(), expected)
    places = [p.data_ptr() for p in model.parameters()]
    model.set_weight(weight)
    check(model.get_weight(), expected + 1)
    assert places == [p.data_ptr() for p in model.parameters()]


def test_weights_of_the_wrong_number_are_refused():
    with pytest.raises(ValueError, match=r"\(8,\)"):
        nnj.Linear(3, 2).set_weight(torch.zeros(7))


def test_a_tied_layer_counts_once():
    layer = seeded(lambda: nnj.Linear(4, 4))
    model, x = nnj.Sequential(layer, nnj.Tanh(), layer), randn(B, 4)
    assert model._n_params == len(model.get_weight()) == 20
    w = randn(B, 4)
    check(model.vjp(x, None, w, wrt="weight"), torch.einsum("bon,bo->bn", rows(model, x, "weight"), w))
    (block,) = model.jTmjp(x, None, None, wrt="weight")
    check(block, rows(model, x, "weight").mT @ rows(model, x, "weight"))


def test_frozen_parameters_do_not_count():
    model, x = seeded(lambda: nnj.Sequential(nnj.Linear(3, 4), nnj.Tanh(), nnj.Linear(4, 2))), randn(B, 3)
    model[0].weight.requires_grad_(False)
    assert model._n_params == len(model.get_weight()) == 14
    check(model.jacobian(x, wrt="weight"), rows(model, x, "weight"))
    model[2].requires_grad_(False)
    assert [block.shape for block in model.jTmjp(x, None, None, wrt="weight")] == [(B, 4, 4)]
    before = model[0].weight.clone()
    model.set_weight(torch.zeros(4))
    check(model[0].weight, before)
    model.requires_grad_(False)
    assert model._n_params == 0 and model.get_weight().shape == (0,)
    assert model.jacobian(x, wrt="weight") is None


def test_the_same_activation_object_may_stand_twice():
    act = nnj.Tanh()
    model, x = seeded(lambda: nnj.Sequential(nnj.Linear(3, 3), act, nnj.Linear(3, 3), act)), randn(B, 3)
    check(model.jacobian(x, model(x)), rows(model, x))
    check(model.jacobian(x, model(x), "weight"), rows(model, x, "weight"))


# The model stays as it is


def test_a_product_leaves_no_hook_no_gradient_and_no_tensor_behind():
    model, x, _ = case("sequential", "input")
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    for wrt in ("input", "weight"):
        model.jvp(x, model(x), torch.ones(B, 36 if wrt == "input" else model._n_params, dtype=x.dtype), wrt)
        model.jTmjp(x, model(x), None, wrt, to_diag=True)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_a_copy_has_products_of_its_own():
    model, x, _ = case("sequential", "weight")
    other = copy.deepcopy(model)
    other.set_weight(torch.randn(other._n_params, dtype=torch.float64))
    check(other.jacobian(x, wrt="weight"), rows(other, x, "weight"))


def test_float32_stays_float32():
    model, x = copy.deepcopy(case("sequential", "weight")[0]).float(), randn(B, 1, 6, 6).float()
    assert model.jTmjp(x, None, None, wrt="weight", to_diag=True).dtype == torch.float32
    assert model.jacobian(x).dtype == torch.float32


@pytest.mark.parametrize("wrt", ["input", "weight"])
def test_a_product_with_a_residual_has_no_graph(wrt):
    model, x, _ = case("nested", "weight")
    assert not model.vjp(x, None, model(x), wrt).requires_grad
    assert not model.jTmjp(x, None, model(x), wrt, from_diag=True, to_diag=True).requires_grad
    assert not model.jacobian(x, wrt=wrt).requires_grad


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("wrt", ["input", "weight"])
def test_products_do_not_need_gradients_to_be_on(wrt, mode):
    model, x, j = case("sequential", wrt)
    with mode():
        found = model.vjp(x, model(x), torch.ones(B, j.shape[1], dtype=x.dtype), wrt)
        full = model.jmjTp(x, None, None, wrt)
    check(found, j.sum(1))
    check(full, j @ j.mT)


def test_products_can_be_differentiated():
    model, x = seeded(lambda: nnj.Sequential(nnj.Linear(2, 3), nnj.Tanh(), nnj.Linear(3, 2))), randn(B, 2)
    leaf = x.clone().requires_grad_()
    trace = model.jTmjp(leaf, None, None, create_graph=True).diagonal(dim1=1, dim2=2).sum()
    (found,) = torch.autograd.grad(trace, leaf)
    step = 1e-6 * randn(B, 2)
    change = (model.jTj(x + step) - model.jTj(x - step)).diagonal(dim1=1, dim2=2).sum() / 2
    assert_close(change, (found * step).sum(), rtol=1e-5, atol=1e-12)


def test_the_third_argument_is_named_as_in_nnj():
    names = {name: list(inspect.signature(getattr(nnj.Linear, name)).parameters)[3] for name in NAMES[1:7]}
    assert names == dict.fromkeys(("jvp", "vjp"), "vector") | dict.fromkeys(("jmp", "mjp", "jmjTp", "jTmjp"), "matrix")


# The documented use


def test_training_as_documented_fits_the_targets():
    torch.manual_seed(0)
    model = nnj.Sequential(nnj.Linear(4, 16), nnj.Tanh(), nnj.Linear(16, 2))
    x = torch.randn(20, 4)
    target, lr = torch.stack([x[:, 0].sin(), x[:, 1] * x[:, 2] / 2], 1), 0.1
    losses = []
    for _ in range(300):
        val = model(x)
        gradient = model.vjp(x, val, val - target, wrt="weight")
        param = model.get_weight()
        param -= lr * gradient.mean(0)
        model.set_weight(param)
        losses.append(0.5 * (val - target).square().sum(1).mean().item())
    assert losses[0] > 0.3
    assert losses[-1] < 0.1 * losses[0]
    ggn_diag = model._jTmjp(x, val, None, wrt="weights", to_diag=True, diag_backprop=True)
    assert ggn_diag.shape == (20, model._n_params)


def test_a_seed_of_mnist_size_runs_as_written():
    x, target, lr = torch.randn(5, 784), torch.randn(5, 10), 1e-3
    model = nnj.Sequential(nnj.Linear(784, 64), nnj.Tanh(), nnj.Linear(64, 10))
    val = model(x)
    gradient = model.vjp(x, val, val - target, wrt="weight")
    assert gradient.shape == (5, 784 * 64 + 64 + 640 + 10)
    expected = torch.autograd.grad((0.5 * (model(x) - target).square().sum(1)).mean(), list(model.parameters()))
    assert_close(gradient.mean(0), torch.cat([g.flatten() for g in expected]))
    param = model.get_weight()
    param -= lr * gradient.mean(0)
    model.set_weight(param)
    ggn_diag = model._jTmjp(x, val, None, wrt="weights", to_diag=True)
    assert ggn_diag.shape == gradient.shape
