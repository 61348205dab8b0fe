"""J M J' and J' M J for every kind of module, metric and result, against the dense algebra."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nngeo.products import Dense
from tests import reference_products as reference
from tests.product_settings import (
    INPUT_METRICS,
    OUTPUT_METRICS,
    backward,
    defined,
    draw,
    exact,
    expected,
    forward,
    input_metric,
    output_metric,
    settings,
)

FORWARD = ("dense", "diag", "factor", "trace")
# Kinds that differ from another one in an option of its forward pass alone: they get some metrics, not all.
VARIATIONS = {
    *("conv1d_same", "conv2d_wide_padding", "conv2d_replicate", "conv2d_same", "conv3d", "conv_transpose1d"),
    *("conv_transpose3d", "max_pool2d_dilated", "max_pool3d", "adaptive_max_pool2d", "upsample_nearest"),
    *("upsample_size", "batch_norm2d", "rms_norm", "layer_norm_plain", "attention_sequence_first", "rnn"),
    *("softplus_threshold", "glu", "log_softmax", "registered_twice", "frozen_layers", "folded", "nested"),
}
MAIN = [at for at in settings() if at.module.id not in VARIATIONS]
each_kind = pytest.mark.parametrize("at", MAIN, ids=lambda at: at.id)
every = pytest.mark.parametrize("at", settings(), ids=lambda at: at.id)
some = pytest.mark.parametrize(
    "at", settings("conv2d_groups", "attention", "two_inputs", "decoder"), ids=lambda at: at.id
)
on_outputs = pytest.mark.parametrize("kind", OUTPUT_METRICS, ids=lambda kind: kind.id)
on_inputs = pytest.mark.parametrize("kind", INPUT_METRICS, ids=lambda kind: kind.id)
reductions = pytest.mark.parametrize("reduce", ["sum", "mean"])


# ------------------------------------------------------------------------------------------ definitions


@on_outputs
@each_kind
def test_backward_metrics(at, kind):
    metric, M = output_metric(at, kind)
    results = defined(at.results, kind)
    exact(backward(at, metric, results), expected(reference.backward(at.J, M), results, at))


@on_inputs
@each_kind
def test_forward_metrics(at, kind):
    metric, M = input_metric(at, kind)
    results = defined(FORWARD, kind)
    exact(forward(at, metric, results), expected(reference.forward(at.J, M), results, at))


# ------------------------------------------------------------------------------------------ reductions


def reduced(matrix: Tensor, reduce: str) -> Tensor:
    return matrix.sum(0) if reduce == "sum" else matrix.mean(0)


@every
def test_backward_metrics_of_a_batch_add_up(at):
    metric, M = output_metric(at, OUTPUT_METRICS[1])
    results = [result for result in at.results if result != "factor"]
    matrix = reference.backward(at.J, M).sum(0)
    exact(backward(at, metric, results, reduce="sum"), expected(matrix, results, at))


@every
def test_forward_metrics_of_a_batch_add_up(at):
    metric, M = input_metric(at, INPUT_METRICS[5])
    results = ["dense", "diag", "trace"]
    matrix = reference.forward(at.J, M).sum(0)
    exact(forward(at, metric, results, reduce="sum"), expected(matrix, results, at))


@reductions
@on_outputs
@some
def test_backward_metrics_of_any_kind_of_a_batch(at, kind, reduce):
    metric, M = output_metric(at, kind)
    results = [result for result in at.results if result != "factor"]
    matrix = reduced(reference.backward(at.J, M), reduce)
    exact(backward(at, metric, results, reduce=reduce), expected(matrix, results, at))


@reductions
@on_inputs
@some
def test_forward_metrics_of_any_kind_of_a_batch(at, kind, reduce):
    metric, M = input_metric(at, kind)
    results = ["dense", "diag", "trace"]
    matrix = reduced(reference.forward(at.J, M), reduce)
    exact(forward(at, metric, results, reduce=reduce), expected(matrix, results, at))


# ------------------------------------------------------------------------------------------ two inputs


@every
def test_backward_metrics_between_two_inputs(at):
    M = draw(3, at.J.shape[1], at.J.shape[1])
    results = [result for result in at.results if result != "factor"]
    matrix = reference.backward(at.J, M, at.J2)
    exact(backward(at, Dense(M), results, x2=at.x2), expected(matrix, results, at))


@every
def test_forward_metrics_between_two_inputs(at):
    M = draw(3, at.J.shape[2], at.J.shape[2])
    results = ["dense", "diag", "trace"]
    matrix = reference.forward(at.J, M, at.J2)
    exact(forward(at, Dense(M), results, x2=at.x2), expected(matrix, results, at))


@on_outputs
@some
def test_backward_metrics_of_any_kind_between_two_inputs(at, kind):
    metric, M = output_metric(at, kind)
    results = [result for result in at.results if result != "factor"]
    matrix = reference.backward(at.J, M, at.J2)
    exact(backward(at, metric, results, x2=at.x2), expected(matrix, results, at))


@on_inputs
@some
def test_forward_metrics_of_any_kind_between_two_inputs(at, kind):
    metric, M = input_metric(at, kind)
    results = ["dense", "diag", "trace"]
    matrix = reference.forward(at.J, M, at.J2)
    exact(forward(at, metric, results, x2=at.x2), expected(matrix, results, at))


@some
def test_a_reduction_between_two_inputs_adds_the_pairs(at):
    matrix = reference.backward(at.J, torch.eye(at.J.shape[1], dtype=at.J.dtype), at.J2).sum(0)
    results = ["dense", "diag", "trace"]
    exact(backward(at, None, results, x2=at.x2, reduce="sum"), expected(matrix, results, at))
