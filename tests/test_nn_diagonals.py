"""diag_backprop: the recursion that keeps diagonals, written out, and where it is exact."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

import nngeo.nn as nnj
from tests.jacobians import diagonal, randn, rows, seeded

B = 3

# One mixing layer, at most: nothing is lost, whatever the diagonal metric is.
EXACT = {
    "linear": (lambda: nnj.Linear(3, 2), (3,)),
    "mlp_two_linear": (lambda: nnj.Sequential(nnj.Sinusoidal(), nnj.Linear(3, 2), nnj.TruncExp()), (3,)),
    "conv_then_pool": (
        lambda: nnj.Sequential(nnj.Conv2d(1, 2, 2, stride=2), nnj.ReLU(), nnj.Flatten(), nnj.Reshape(2, 4)),
        (1, 4, 4),
    ),
    "skip": (lambda: nnj.SkipConnection(nnj.Linear(3, 2), nnj.Tanh()), (3,)),
    "skip_image": (lambda: nnj.SkipConnection(nnj.Conv2d(2, 1, 1), nnj.Tanh()), (2, 2, 2)),
    "l2norm": (nnj.L2Norm, (3,)),
    "maxpool_overlapping": (lambda: nnj.MaxPool2d(2, stride=1), (1, 3, 3)),
    "upsample": (lambda: nnj.Upsample(scale_factor=2), (1, 2, 2)),
}


def check(found, expected) -> None:
    assert_close(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", ["identity", "diag"])
@pytest.mark.parametrize("wrt", ["input", "weight"])
@pytest.mark.parametrize("name", EXACT)
def test_pulled_through_one_mixing_layer_it_is_exact(name, wrt, kind):
    make, shape = EXACT[name]
    model, x = seeded(make), randn(B, *shape)
    m = randn(B, model(x)[0].numel()) if kind == "diag" else None
    found = model.jTmjp(x, None, m, wrt, from_diag=kind == "diag", to_diag=True, diag_backprop=True)
    if wrt == "weight" and not model._n_params:
        assert found is None
        return
    j = rows(model, x, wrt)
    check(found, diagonal(j.mT @ (torch.eye(j.shape[1]).to(j) if m is None else torch.diag_embed(m)) @ j))


@pytest.mark.parametrize("kind", ["identity", "diag"])
@pytest.mark.parametrize("wrt", ["input", "weight"])
@pytest.mark.parametrize("name", EXACT)
def test_pushed_through_one_mixing_layer_it_is_exact(name, wrt, kind):
    make, shape = EXACT[name]
    model, x = seeded(make), randn(B, *shape)
    if wrt == "weight" and not model._n_params:
        assert model.jmjTp(x, None, None, wrt, to_diag=True, diag_backprop=True) is None
        return
    j = rows(model, x, wrt)
    m = randn(B, j.shape[2]) if kind == "diag" else None
    found = model.jmjTp(x, None, m, wrt, from_diag=kind == "diag", to_diag=True, diag_backprop=True)
    check(found, diagonal(j @ (torch.eye(j.shape[2]).to(j) if m is None else torch.diag_embed(m)) @ j.mT))


# Written out: the diagonal of every layer's sandwich is all that the next one sees.

CHAINS = {
    "mlp": (lambda: [nnj.Linear(3, 4), nnj.Tanh(), nnj.Linear(4, 4), nnj.Sinusoidal(), nnj.Linear(4, 2)], (3,)),
    "lenet": (
        lambda: [
            *(nnj.Conv2d(1, 2, 2, padding=1), nnj.Tanh(), nnj.MaxPool2d(2), nnj.Conv2d(2, 2, 2), nnj.Flatten()),
            *(nnj.L2Norm(), nnj.Linear(2, 2), nnj.TruncExp()),
        ],
        (1, 3, 3),
    ),
    "skips": (
        lambda: [nnj.SkipConnection(nnj.Linear(3, 2)), nnj.Linear(5, 3), nnj.SkipConnection(nnj.Tanh())],
        (3,),
    ),
}


@pytest.fixture(params=CHAINS)
def chain(request):
    make, shape = CHAINS[request.param]
    model, x = seeded(lambda: nnj.Sequential(*make())), randn(B, *shape)
    inputs = [x]
    for layer in model:
        inputs.append(layer(inputs[-1]).detach())
    return model, inputs


def test_a_pulled_diagonal_passes_layer_by_layer(chain):
    model, inputs = chain
    m = start = randn(B, inputs[-1][0].numel()).abs()
    parts = []
    for layer, x in reversed(list(zip(model, inputs, strict=False))):
        if layer._n_params:
            j = rows(layer, x, "weight")
            parts.insert(0, diagonal(j.mT @ torch.diag_embed(m) @ j))
        j = rows(layer, x)
        m = diagonal(j.mT @ torch.diag_embed(m) @ j)
    flags = {"from_diag": True, "to_diag": True, "diag_backprop": True}
    check(model.jTmjp(inputs[0], None, start, wrt="weight", **flags), torch.cat(parts, 1))
    check(model.jTmjp(inputs[0], None, start, wrt="input", **flags), m)


def test_a_pushed_diagonal_passes_layer_by_layer(chain):
    model, inputs = chain
    s = start = randn(B, inputs[0][0].numel()).abs()
    total, weights = None, randn(B, model._n_params).abs()
    pieces = iter(weights.split([layer._n_params for layer in model], -1))
    for layer, x in zip(model, inputs, strict=False):
        j, q = rows(layer, x), next(pieces)
        s = diagonal(j @ torch.diag_embed(s) @ j.mT)
        total = None if total is None else diagonal(j @ torch.diag_embed(total) @ j.mT)
        if layer._n_params:
            own = rows(layer, x, "weight")
            pushed = diagonal(own @ torch.diag_embed(q) @ own.mT)
            total = pushed if total is None else total + pushed
    flags = {"from_diag": True, "to_diag": True, "diag_backprop": True}
    check(model.jmjTp(inputs[0], None, start, wrt="input", **flags), s)
    check(model.jmjTp(inputs[0], None, weights, wrt="weight", **flags), total)


def test_a_sum_is_taken_for_one_of_independent_terms():
    model, x = seeded(lambda: nnj.Residual(nnj.Linear(3, 3), nnj.Tanh())), randn(B, 3)
    m, j = randn(B, 3), rows(model._F, x)
    flags = {"from_diag": True, "to_diag": True, "diag_backprop": True}
    check(model.jTmjp(x, None, m, **flags), m + diagonal(j.mT @ torch.diag_embed(m) @ j))
    check(model.jmjTp(x, None, m, **flags), m + diagonal(j @ torch.diag_embed(m) @ j.mT))
    w = rows(model, x, "weight")
    check(model.jTmjp(x, None, m, wrt="weight", **flags), diagonal(w.mT @ torch.diag_embed(m) @ w))


def test_layers_with_their_own_jacobian_take_part():
    class Scaled(nnj.Linear):
        def jacobian(self, x, val=None, wrt="input"):
            return 2 * super().jacobian(x, val, wrt)

    model, x = seeded(lambda: nnj.Sequential(Scaled(3, 2), nnj.Tanh())), randn(B, 3)
    found = model.jTmjp(x, None, None, wrt="weight", to_diag=True, diag_backprop=True)
    check(found, 4 * rows(model, x, "weight").square().sum(1))


def test_a_sum_over_the_batch_is_taken_inside():
    model, x = seeded(EXACT["skip"][0]), randn(B, 3)
    found = model.jTmjp(x, None, None, wrt="weight", to_diag=True, diag_backprop=True, reduce="sum")
    check(found, rows(model, x, "weight").square().sum((0, 1)))


@pytest.mark.parametrize(
    ("flags", "matrix"),
    [({"diag_backprop": True}, None), ({"diag_backprop": True, "to_diag": True}, torch.ones(B, 3, 3))],
    ids=["full_result", "full_metric"],
)
@pytest.mark.parametrize("product", ["jTmjp", "jmjTp"])
def test_full_matrices_are_refused(product, flags, matrix):
    model, x = seeded(lambda: nnj.Linear(3, 3)), randn(B, 3)
    with pytest.raises(ValueError, match="diag"):
        getattr(model, product)(x, None, matrix, **flags)
