"""Metrics at the outputs of a model, which may depend on the outputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nngeo.generators.batches import Function
from nngeo.generators.independence import explained
from nngeo.generators.outputs import check_outputs
from nngeo.generators.outputs import outputs_of as outputs_of_batch
from nngeo.layers.collection import LayerCollection
from nngeo.products.evaluation import Evaluation
from nngeo.products.facts import facts_of
from nngeo.products.manyderivatives import many_derivatives
from nngeo.products.metrics import Metric
from nngeo.products.space import Space
from nngeo.products.structured import as_metric

# A metric as all products take it, or a function of the outputs (b, ...) that returns one.
OutputMetric = Any


def outputs_of(model: nn.Module, x: Any, function: Function | None, create_graph: bool) -> Tensor:
    """The outputs (b, ...) of a model that comes back as it was, checked; with a graph if asked for."""
    evaluation = Evaluation.of(model, x, function)
    facts_of(evaluation, LayerCollection(), ())
    # With gradients, whether they are asked for or not: the model may differentiate inside.
    with explained(evaluation.run, evaluation.batch), many_derivatives(model), torch.enable_grad():
        outputs = outputs_of_batch(evaluation.batch, model, evaluation.function)
        check_outputs(outputs.detach(), evaluation.batch, model, evaluation.function)
    return outputs if create_graph else outputs.detach()


def metric_at(
    metric: OutputMetric, space: Space, model: nn.Module, x: Any, function: Function | None, create_graph: bool
) -> Metric:
    """The metric at the outputs for x, checked; a function of the outputs costs a forward."""
    m = as_metric(metric(outputs_of(model, x, function, create_graph)) if callable(metric) else metric)
    m.check(space)
    return m
