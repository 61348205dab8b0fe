"""Forms of metrics: with and without an axis of examples, indefinite, in blocks, in chunks, in single precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from nngeo.products import (
    BlockDiagonal,
    Dense,
    Diagonal,
    Factor,
    Kronecker,
    LowRankPlusDiagonal,
    Softmax,
    jTmjp,
)
from tests import reference_products as reference
from tests.product_settings import (
    INPUT_METRICS,
    OUTPUT_METRICS,
    backward,
    draw,
    exact,
    expected,
    forward,
    input_metric,
    output_metric,
    setting,
    settings,
)

some = pytest.mark.parametrize(
    "at", settings("conv2d_groups", "attention", "two_inputs", "decoder"), ids=lambda at: at.id
)
on_outputs = pytest.mark.parametrize("kind", OUTPUT_METRICS, ids=lambda kind: kind.id)


def both_forms(m: int) -> dict[str, tuple[Any, Any, Tensor]]:
    """Metrics with a batch axis, the same for one example, and the dense matrices of the first."""
    d, v, root = draw(3, m).square(), draw(3, m, 2), draw(3, m, m)
    a, b = draw(3, 2, 2), draw(3, m // 2, m // 2, seed=1)
    return {
        "diagonal": (Diagonal(d), Diagonal(d[0]), d.diag_embed()),
        "dense": (Dense(root), Dense(root[0]), root),
        "tensor": (root, root[0], root),
        "factor": (Factor(v), Factor(v[0]), v @ v.mT),
        "low_rank": (LowRankPlusDiagonal(v, d), LowRankPlusDiagonal(v[0], d[0]), v @ v.mT + d.diag_embed()),
        "kronecker": (Kronecker(a, b), Kronecker(a[0], b[0]), torch.stack(list(map(torch.kron, a, b)))),
    }


@pytest.mark.parametrize("wrt", ["input", "weight"])
@pytest.mark.parametrize("form", both_forms(4))
def test_a_metric_has_a_batch_axis_or_is_shared(form, wrt):
    at = setting("linear", wrt)
    batched, shared, dense = both_forms(4)[form]
    results = ["dense", "diag", "trace", "blocks"]
    found = backward(at, batched, results), backward(at, shared, results)
    matrices = reference.backward(at.J, dense), reference.backward(at.J, dense[0])
    exact(found, tuple(expected(matrix, results, at) for matrix in matrices))


@pytest.mark.parametrize("id", ["mlp", "frozen_weights", "tied_linears"])
@pytest.mark.parametrize("batch", [(), (3,)], ids=["shared", "batched"])
def test_a_block_diagonal_metric_has_a_block_for_each_layer(id, batch):
    at = setting(id, "weight")
    blocks = {name: draw(*batch, p, p, seed=p) for name, p in at.sizes.items()}
    each = [[m if m.ndim == 2 else m[i] for m in blocks.values()] for i in range(3)]
    M = torch.stack([torch.block_diag(*ms) for ms in each])
    results = ["dense", "diag", "trace"]
    exact(forward(at, BlockDiagonal(blocks), results), expected(reference.forward(at.J, M), results, at))


# ------------------------------------------------------------------------------------------ signs, sizes, chunks


@pytest.mark.parametrize("at", settings("linear", "conv2d_groups", "decoder"), ids=lambda at: at.id)
def test_a_diagonal_may_be_negative(at):
    d = draw(3, at.J.shape[1])
    results = [result for result in at.results if result != "factor"]
    matrix = reference.backward(at.J, d.diag_embed())
    exact(backward(at, Diagonal(d), results), expected(matrix, results, at))


@pytest.mark.parametrize("scale", [1.0, 1e3], ids=["logits", "large_logits"])
def test_a_softmax_of_large_logits_is_finite(scale):
    at = setting("sequence_outputs", "weight")
    logits = scale * draw(3, *at.outputs)
    p = logits.softmax(-1)
    M = torch.stack([torch.block_diag(*each) for each in p.diag_embed() - p[..., None] * p[..., None, :]])
    results = ["dense", "diag", "trace", "factor", "blocks"]
    found = backward(at, Softmax(logits), results)
    exact(found, expected(reference.backward(at.J, M), results, at))


@some
@pytest.mark.parametrize("budget", [1, 100])
def test_a_budget_does_not_change_the_result(at, budget):
    metric, M = output_metric(at, OUTPUT_METRICS[5])
    results = ["dense", "diag", "trace"]
    found = backward(at, metric, results, budget=budget), backward(at, metric, results, budget=budget, reduce="sum")
    matrix = reference.backward(at.J, M)
    exact(found, (expected(matrix, results, at), expected(matrix.sum(0), results, at)))


@some
@pytest.mark.parametrize("budget", [1, 100])
def test_a_budget_does_not_change_a_forward_metric(at, budget):
    metric, M = input_metric(at, INPUT_METRICS[5])
    results = ["dense", "diag", "trace"]
    matrix = reference.forward(at.J, M)
    exact(forward(at, metric, results, budget=budget), expected(matrix, results, at))


@on_outputs
@some
def test_single_precision_metrics(at, kind):
    metric, M = output_metric(at, kind)
    model = at.module.build().float()
    x = tuple(map(single, at.x)) if isinstance(at.x, tuple) else single(at.x)
    found = jTmjp(model, x, single(metric), at.wrt, result="diag")
    matrix = reference.backward(at.J, M).diagonal(dim1=1, dim2=2).float()
    torch.testing.assert_close(found, matrix, rtol=1e-3, atol=1e-4)


def single(value: Any) -> Any:
    """A tensor, or the tensors of a metric, in float32."""
    if isinstance(value, Tensor):
        return value.float()
    if value is None or isinstance(value, int | float):
        return value
    return type(value)(*(single(part) for part in vars(value).values()))
