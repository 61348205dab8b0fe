"""Weight metrics of containers: nested lists of blocks, pulled and pushed, against the dense definition."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import nngeo.nn as nnj
from tests.jacobians import randn, rows, seeded

B = 2


class Gated(nnj.Sequential):
    """A container with a parameter of its own."""

    def __init__(self, *modules):
        super().__init__(*modules)
        self.gate = nn.Parameter(torch.full((2,), 0.7))

    def forward(self, x):
        return super().forward(x) * self.gate


class WithHead(nnj.SkipConnection):
    """A container with a child beside the chain."""

    def __init__(self):
        super().__init__(nnj.Linear(2, 2))
        self.head = nnj.Linear(4, 1)

    def forward(self, x):
        return self.head(super().forward(x))


class Pair(nn.Module):
    """A child that is no container, of two layers."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x):
        return self.b(self.a(x).sin())


def tied():
    layer = nnj.Linear(3, 3)
    return nnj.Sequential(layer, nnj.Tanh(), layer, nnj.Linear(3, 2))


# The model, the shape of an example, and the sizes of its blocks in nested lists.
MODELS = {
    "chain": (lambda: nnj.Sequential(nnj.Linear(3, 2), nnj.Tanh(), nnj.Linear(2, 2)), (3,), [8, 6]),
    "nested": (
        lambda: nnj.Sequential(
            *(nnj.Linear(3, 2), nnj.Sequential(nnj.Tanh(), nnj.Linear(2, 2), nnj.Sequential(nnj.Linear(2, 3)))),
            *(nnj.Sequential(nnj.Tanh()), nnj.Linear(3, 1)),
        ),
        (3,),
        [8, [6, [9]], 4],
    ),
    "skip": (lambda: nnj.Sequential(nnj.Linear(3, 2), nnj.SkipConnection(nnj.Linear(2, 2))), (3,), [8, [6]]),
    "skip_alone": (lambda: nnj.SkipConnection(nnj.Linear(3, 2), nnj.Tanh(), nnj.Linear(2, 2)), (3,), [8, 6]),
    "residual": (
        lambda: nnj.Residual(nnj.Linear(3, 2), nnj.Residual(nnj.Linear(2, 2)), nnj.Linear(2, 3)),
        (3,),
        [8, [6], 9],
    ),
    "torch_sequential_inside": (
        lambda: nnj.Sequential(nn.Sequential(nn.Linear(3, 2), nn.Tanh()), nn.Linear(2, 1)),
        (3,),
        [[8], 3],
    ),
    "children_of_several_layers": (
        lambda: nnj.Sequential(nnj.Linear(3, 2), Pair(), nnj.Linear(2, 1)),
        (3,),
        [8, 12, 3],
    ),
    "attention": (
        lambda: nnj.Sequential(
            nnj.TransformerEncoderLayer(2, 1, dim_feedforward=2, dropout=0.0, batch_first=True),
            nnj.Flatten(),
            nnj.Linear(4, 1),
        ),
        (2, 2),
        [44, 5],
    ),
    "own_parameters": (lambda: nnj.Sequential(Gated(nnj.Linear(3, 2)), nnj.Linear(2, 1)), (3,), [[2, 8], 3]),
    "child_beside_the_chain": (lambda: nnj.Sequential(WithHead()), (2,), [[6, 5]]),
    "tied": (tied, (3,), [12, 8]),
    "convolutions": (
        lambda: nnj.Sequential(
            nnj.Conv2d(1, 2, 2, stride=2), nnj.BatchNorm2d(2), nnj.Tanh(), nnj.Flatten(), nnj.Linear(8, 1)
        ).eval(),
        (1, 4, 4),
        [10, 4, 9],
    ),
}


def flat(tree) -> list:
    return [leaf for branch in tree for leaf in flat(branch)] if isinstance(tree, list) else [tree]


def like(tree, leaves):
    """A nested list like `tree`, of leaves taken from an iterator."""
    return [like(branch, leaves) for branch in tree] if isinstance(tree, list) else next(leaves)


@pytest.fixture(params=MODELS)
def case(request):
    make, shape, sizes = MODELS[request.param]
    model, x = seeded(make), randn(B, *shape)
    return model, x, sizes, rows(model, x, "weight")


def check(found, expected) -> None:
    assert_close(found, expected, rtol=1e-9, atol=1e-11)


def test_the_list_is_nested_as_the_containers_and_skips_what_has_no_weights(case):
    model, x, sizes, j = case
    found = model.jTmjp(x, model(x), None, wrt="weight")
    shapes = like(sizes, iter([(B, p, p) for p in flat(sizes)]))
    assert torch.utils._pytree.tree_map(lambda block: tuple(block.shape), found) == shapes
    assert sum(flat(sizes)) == model._n_params == j.shape[2]


def test_the_blocks_are_those_of_the_dense_metric(case):
    model, x, sizes, j = case
    m = randn(B, j.shape[1], j.shape[1])
    parts = j.split(flat(sizes), -1)
    check(flat(model.jTmjp(x, None, m, wrt="weight")), [part.mT @ m @ part for part in parts])


def test_the_diagonal_is_one_tensor(case):
    model, x, _, j = case
    check(model.jTmjp(x, None, None, wrt="weight", to_diag=True), j.square().sum(1))


@pytest.mark.parametrize("to_diag", [False, True])
def test_a_list_of_blocks_is_pushed_exactly(case, to_diag):
    model, x, sizes, j = case
    ms = [randn(B, p, p, seed=s) for s, p in enumerate(flat(sizes))]
    dense = torch.stack([torch.block_diag(*(m[e] for m in ms)) for e in range(B)])
    expected = j @ dense @ j.mT
    found = model.jmjTp(x, model(x), like(sizes, iter(ms)), wrt="weight", to_diag=to_diag)
    check(found, expected.diagonal(dim1=1, dim2=2) if to_diag else expected)


def test_a_list_of_diagonals_is_pushed_exactly(case):
    model, x, sizes, j = case
    ds = [randn(B, p, seed=s) for s, p in enumerate(flat(sizes))]
    found = model.jmjTp(x, None, like(sizes, iter(ds)), wrt="weight", from_diag=True)
    check(found, j @ torch.diag_embed(torch.cat(ds, -1)) @ j.mT)


@pytest.mark.parametrize("from_diag", [False, True])
@pytest.mark.parametrize("b", [1, B])
def test_blocks_without_examples_are_shared(case, from_diag, b):
    model, x, sizes, j = case
    ms = [randn(*((p,) if from_diag else (p, p)), seed=s) for s, p in enumerate(flat(sizes))]
    dense = torch.block_diag(*(torch.diag(m) if from_diag else m for m in ms))
    found = model.jmjTp(x[:b], None, like(sizes, iter(ms)), wrt="weight", from_diag=from_diag)
    check(found, (j @ dense @ j.mT)[:b])


def test_blocks_with_and_without_examples_may_be_mixed():
    model, x = seeded(MODELS["chain"][0]), randn(B, 3)
    j = rows(model, x, "weight")
    a, shared = randn(B, 8), randn(6, seed=2)
    found = model.jmjTp(x, None, [a, shared], wrt="weight", from_diag=True)
    check(found, j @ torch.diag_embed(torch.cat([a, shared.expand(B, 6)], 1)) @ j.mT)
    found = model.jmjTp(x, None, [torch.diag_embed(a), shared.diag()], wrt="weight")
    check(found, j @ torch.diag_embed(torch.cat([a, shared.expand(B, 6)], 1)) @ j.mT)


def test_a_list_of_blocks_is_not_sampled():
    model = seeded(MODELS["chain"][0])
    with pytest.raises(ValueError, match="mc"):
        model.jmjTp(randn(B, 3), None, [torch.eye(8), torch.eye(6)], wrt="weight", method="mc")


def test_a_diagonal_and_a_full_matrix_are_used_whole(case):
    model, x, _, j = case
    p = j.shape[2]
    d, full = randn(B, p), randn(B, p, p)
    check(model.jmjTp(x, None, d, wrt="weight", from_diag=True), j @ torch.diag_embed(d) @ j.mT)
    check(model.jmjTp(x, None, full, wrt="weight"), j @ full @ j.mT)


@pytest.mark.parametrize("reduce", ["sum", "mean"])
def test_blocks_can_be_reduced_over_the_batch(case, reduce):
    model, x, sizes, j = case
    parts = [getattr(part.mT @ part, reduce)(0) for part in j.split(flat(sizes), -1)]
    check(flat(model.jTmjp(x, None, None, wrt="weight", reduce=reduce)), parts)


def test_cross_layer_blocks_come_with_a_dense_result(case):
    model, x, _, j = case
    check(model.jTmjp(x, None, None, wrt="weight", result="dense"), j.mT @ j)
    check(model.jTmjp(x, None, None, wrt="weight", result="trace"), j.square().sum((1, 2)))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_blocks_can_be_estimated_with_standard_errors(seed):
    model, x = seeded(MODELS["skip"][0]), randn(B, 3)
    generator = torch.Generator().manual_seed(seed)
    exact = flat(model.jTmjp(x, None, None, wrt="weight"))
    estimates = flat(model.jTmjp(x, None, None, wrt="weight", method="mc", samples=2000, generator=generator))
    for estimate, block in zip(estimates, exact, strict=True):
        assert ((estimate.value - block).abs() <= 6 * estimate.standard_error + 1e-12).all()


def test_a_lone_layer_gives_one_tensor():
    model, x = seeded(lambda: nnj.Linear(3, 2)), randn(B, 3)
    assert model.jTmjp(x, None, None, wrt="weight").shape == (B, 8, 8)


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ([torch.zeros(B, 8, 8)], "1 entries for 2"),
        ([torch.zeros(B, 8, 8), [torch.zeros(B, 6, 6)]], "found list"),
        ([torch.zeros(B, 8, 8), torch.zeros(B, 5, 5)], r"\(b, 6, 6\)"),
        ([torch.zeros(B, 8), torch.zeros(B, 6)], r"\(b, 8, 8\)"),
    ],
)
def test_a_list_that_does_not_fit_is_refused(blocks, message):
    model = seeded(MODELS["chain"][0])
    with pytest.raises(ValueError, match=message):
        model.jmjTp(randn(B, 3), None, blocks, wrt="weight")


def test_a_list_is_no_metric_of_inputs():
    with pytest.raises(ValueError, match="weights"):
        seeded(MODELS["chain"][0]).jmjTp(randn(B, 3), None, [torch.zeros(B, 3, 3)], wrt="input")
