"""A module of which nothing is known is one layer: its own sandwich is exact, and the diagonal is taken there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nngeo.layers.collection import LayerCollection
from nngeo.products.contexts import frozen
from nngeo.products.diagrules import Collected, DiagRule, Passage, add
from nngeo.products.differential import Differential
from nngeo.products.evaluation import Evaluation
from nngeo.products.inputs import InputDifferential
from nngeo.products.metrics import Diagonal
from nngeo.products.sandwich import sandwich
from nngeo.products.weights import WeightDifferential


class OneLayer(DiagRule):
    """The exact diagonals of J' diag(m) J and J diag(s) J', for the module as a whole."""

    def __init__(self, budget: int):
        self.budget = budget

    def pull(self, call: Passage, m: Tensor, found: Collected, below: bool) -> Tensor | None:
        layers = _own_layers(call.module, found)
        if len(layers):
            with torch.enable_grad():
                parts = layers.split(_diagonal(self._of_weights(call, layers), m))
            for name in layers:
                for local, h in layers.split_layer(name, parts[name]).items():
                    p = call.module.get_parameter(layers[name].full_name(local))
                    if found.wants(p):
                        found.add(p, h.flatten(1))
        return self._of_input(call, m, back=True).reshape(call.x.shape) if below else None

    def push(self, call: Passage, s: Tensor | None, given: Collected) -> Tensor | None:
        total: Tensor | None = None
        layers = _own_layers(call.module, given)
        if len(layers):
            q = torch.cat([_known(given, p, len(call.x)) for p in layers.parameters(call.module)], -1)
            with torch.enable_grad():
                total = _diagonal(self._of_weights(call, layers).T, q).reshape(call.y.shape)
        return total if s is None else add(total, self._of_input(call, s, back=False).reshape(call.y.shape))

    def _of_weights(self, call: Passage, layers: LayerCollection) -> Differential:
        return WeightDifferential(_alone(call), layers, self.budget)

    def _of_input(self, call: Passage, m: Tensor, back: bool) -> Tensor:
        with frozen(call.module):
            at: Differential = InputDifferential(_alone(call), {"input": 0}, self.budget)
            return _diagonal(at if back else at.T, m)


def _diagonal(at: Differential, m: Tensor) -> Tensor:
    return sandwich((at, at), Diagonal(m.reshape(len(m), -1)), "diag", None)


def _alone(call: Passage) -> Evaluation:
    return Evaluation.of(call.module, call.x, None)


def _own_layers(module: nn.Module, collected: Collected) -> LayerCollection:
    """The layers of a module at which something is wanted, or given."""
    if not any(collected.wants(p) for p in module.parameters()):
        return LayerCollection()
    layers = LayerCollection.from_model(module, frozen=True).layers.values()
    return LayerCollection(layer for layer in layers if any(map(collected.wants, _parameters(module, layer))))


def _parameters(module: nn.Module, layer: Any) -> list[nn.Parameter]:
    return [module.get_parameter(layer.full_name(local)) for local in layer.shapes]


def _known(given: Collected, p: Tensor, b: int) -> Tensor:
    q = given.of(p)
    return p.new_zeros(b, p.numel()) if q is None else q.expand(b, -1)
