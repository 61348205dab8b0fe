"""Diagonals of sandwiches by a recursion that keeps only the diagonal between layers: cheap, and biased."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nngeo.generators.batches import Function
from nngeo.generators.differentiable import quiet
from nngeo.generators.outputs import check_outputs
from nngeo.layers.collection import LayerCollection
from nngeo.layers.models import as_written
from nngeo.products import diaglinear  # noqa: F401 (registers its rules)
from nngeo.products.contexts import frozen
from nngeo.products.diagrules import Collected, DiagRule, Passage, diag_rule_for
from nngeo.products.differential import BUDGET
from nngeo.products.evaluation import Evaluation, Wrt
from nngeo.products.facts import facts_of
from nngeo.products.metrics import Diagonal, Identity, Metric
from nngeo.products.onelayer import OneLayer
from nngeo.products.opening import layers_of, of_weights
from nngeo.products.space import inputs_space, outputs_space, weights_space


def diag_backprop(
    back: bool,
    model: nn.Module,
    x: Any,
    metric: Metric,
    wrt: Wrt,
    reduce: str | None,
    *,
    layer_collection: LayerCollection | None = None,
    function: Function | None = None,
    create_graph: bool = False,
    budget: int | None = None,
) -> Tensor:
    """Approximates the diagonal of J' M J (b, n), or without `back` of J M J' (b, o), for the cost of about one vjp.

    m <- diag(J_l' diag(m) J_l) from layer to layer, and the same by the weights of each; forwards, the variances of
    independent units. What a layer puts off the diagonal is lost before the next one sees it, so this is no estimate:
    it is biased, without a bound. It is exact for the last two Linear layers of a network, and for a convolution that
    is the last layer with weights; before, on trained networks, sums of the diagonal over a layer are off by factors
    of 3 to 300 (see docs/products.rst). A Monte-Carlo estimate with one sample costs the same and is unbiased.

    Layers are the children of nn.Sequential and of containers with a rule (`register_diag_rule`); any other module is
    one layer, whose own diagonal is exact.
    """
    if create_graph:
        raise ValueError("method='diag_backprop' has no create_graph=True; use method='exact' or 'mc'.")
    if not isinstance(metric, Identity | Diagonal):
        raise ValueError(
            f"method='diag_backprop' takes the metric None or Diagonal, not {type(metric).__name__}: pass its "
            "diagonal, Diagonal(d), or use method='exact' or 'mc'."
        )
    evaluation, weights = Evaluation.of(model, x, function, detached=True), of_weights(wrt)
    layers = layers_of(model, layer_collection) if weights else LayerCollection()
    if not weights:
        evaluation.inputs(wrt)
    facts_of(evaluation, LayerCollection(), ("diag_backprop",))
    run = _Recursion(back, evaluation, layers, BUDGET if budget is None else budget)
    with frozen(model), quiet(), torch.no_grad():
        if reduce is None:
            return run(metric, slice(None))
        b, n = evaluation.batch.size, max(1, layers.numel() + evaluation.batch.tensors()[0][0].numel())
        step = max(1, run.budget // n)
        total = sum(run(metric, slice(start, start + step)).sum(0) for start in range(0, b, step))
        return torch.as_tensor(total / b if reduce == "mean" else total)


class _Recursion:
    """Diagonals of some of the examples; the model is `frozen`."""

    def __init__(self, back: bool, evaluation: Evaluation, layers: LayerCollection, budget: int):
        self.back, self.evaluation, self.layers, self.budget = back, evaluation, layers, budget
        self.parameters = list(layers.parameters(evaluation.model))

    def __call__(self, metric: Metric, rows: slice) -> Tensor:
        """(b, n) or (b, o)."""
        evaluation = self.evaluation if rows == slice(None) else self.evaluation.examples(rows)
        root = passage(evaluation, self.budget)
        check_outputs(root.y, evaluation.batch, evaluation.model, evaluation.function)
        inside = weights_space(self.layers, root.y) if self.parameters else inputs_space(["input"], [root.x])
        space = outputs_space(root.y) if self.back else inside
        if rows != slice(None):
            metric = metric.examples(rows)
        metric.check(space)
        m = metric.apply(space.like.new_ones(1, 1, space.d), space)[0]
        return self._pulled(root, m.expand(space.b, -1)) if self.back else self._pushed(root, m)

    def _pulled(self, root: Passage, m: Tensor) -> Tensor:
        """(b, n)."""
        found = Collected({id(p): None for p in self.parameters})
        result = root.rule.pull(root, m.reshape(root.y.shape), found, below=not self.parameters)
        if not self.parameters:
            return (torch.zeros_like(root.x) if result is None else result).reshape(len(m), -1)
        parts = [m.new_zeros(len(m), p.numel()) if (h := found.of(p)) is None else h for p in self.parameters]
        return torch.cat([part.reshape(len(m), -1) for part in parts], -1)

    def _pushed(self, root: Passage, s: Tensor) -> Tensor:
        """(b, o), from s (b, n), or (1, n)."""
        parts = s.split([p.numel() for p in self.parameters], -1) if self.parameters else []
        given = Collected({id(p): part for p, part in zip(self.parameters, parts, strict=True)})
        x = None if self.parameters else s.expand(len(root.x), -1).reshape(root.x.shape)
        result = root.rule.push(root, x, given)
        return (torch.zeros_like(root.y) if result is None else result).reshape(len(root.y), -1)


def passage(evaluation: Evaluation, budget: int) -> Passage:
    """A forward, noted layer by layer."""
    whole = OneLayer(budget)

    def visit(module: nn.Module, x: Tensor) -> Passage:
        written = as_written(module)
        rule: DiagRule = diag_rule_for(written) or whole
        return rule.forward(written, x, visit)

    (x,) = evaluation.arguments().values()
    return visit(evaluation.model, x.clone())  # which a container may change in place
