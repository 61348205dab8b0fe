"""Plans that are verified: every use of a parameter is accounted for."""

from __future__ import annotations

import warnings
from dataclasses import replace

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from nngeo.descent.autogram.choices import Choice, choices
from nngeo.descent.autogram.graph import Graph, Use
from nngeo.descent.autogram.hooks import Watcher
from nngeo.descent.autogram.linears import products_of
from nngeo.descent.autogram.objectives import Objectives
from nngeo.descent.autogram.plan import Plan
from nngeo.descent.autogram.pulled import random_state_kept
from nngeo.descent.autogram.sums import sums_above, sums_of
from nngeo.descent.autogram.trial import HIDDEN, Trial
from nngeo.generators.sources import uses_of
from nngeo.layers.collection import LayerCollection

KEPT = 256  # plans, of graphs that differ in a shape


class Planner:
    """Plans by the structure of the graph, made when a structure is met for the first time.

    A random combination of the rows of J, pulled through the rules, is compared with what autograd says of it,
    parameter by parameter. A layer that differs (its weight is also used by a parent, by another layer, by the loss;
    its examples are folded into the batch in another order; ...) moves on to its next choice, at last to autograd, row
    by row.
    """

    def __init__(self, model: nn.Module, whole: bool, watcher: Watcher):
        self.model, self.whole, self.watcher = model, whole, watcher
        self._modules = list(model.modules())
        self._plans: dict[tuple, Plan] = {}
        self._last: dict[str, Choice] = {}

    def is_current(self) -> bool:
        """Whether the model still has the same modules."""
        return list(self.model.modules()) == self._modules

    def graph(self, losses: Tensor) -> Graph:
        """The graph of some losses."""
        numbers: dict[int, int] = {}
        for module in self._modules:
            for p in module._parameters.values():
                numbers.setdefault(id(p), len(numbers))
        return Graph.below(losses, self.watcher, numbers)

    def plan(self, graph: Graph, objectives: Objectives) -> Plan:
        """The plan for a graph. One that is not known costs two backward passes."""
        losses = objectives.losses
        key = (graph.key, losses.shape, losses.dtype, *[module.training for module in self._modules])
        plan = self._plans.get(key)
        if plan is not None:
            plan.look_above(graph)
            if not (plan.routed or plan.pending) or self._holds(plan, graph, objectives):
                return plan
        if len(self._plans) >= KEPT:
            del self._plans[next(iter(self._plans))]
        plan = self._plans[key] = self._made(graph, objectives)
        return plan

    def _holds(self, plan: Plan, graph: Graph, objectives: Objectives) -> bool:
        names = list(plan.layers) if plan.routed else [name for name in plan.layers if name in plan.pending]
        trial = Trial(plan, graph, objectives, self.watcher, names, plan.hosts)
        right = all(plan.choices[name].by_rows or trial.agrees(name, plan.rounding) for name in names)
        plan.pending -= {name for name in names if right and trial.determines(name, plan.rounding)}
        return right

    def _made(self, graph: Graph, objectives: Objectives) -> Plan:
        layers = self._layers(graph)
        plan = Plan(self.model, layers, uses_of(self.model, layers), routed=graph.is_routed())
        users = graph.users()
        plan.products = {name: products_of(layer, self.model, graph, users) for name, layer in layers.layers.items()}
        if not self.whole:
            shared = [(j, use) for j, use in enumerate(graph.uses) if _is_shared(use, objectives.b)]
            plan.added = {name: sums_of(layer, self.model, graph, users) for name, layer in layers.layers.items()}
            plan.above = {j: sums_above(use.edges[0].node, graph, users) for j, use in shared}
            plan.look_above(graph)
        trial = Trial(plan, graph, objectives, self.watcher, list(layers), {use.module for use in graph.uses})
        plan.rounding = trial.rounding
        with random_state_kept():
            for name in layers:
                self._choose(name, plan, trial)
        plan.pending = {name for name in layers if not trial.determines(name, plan.rounding)}
        plan.settle(graph, objectives)
        self._last.update(plan.choices)
        if not self.whole and (slow := plan.by_rows()):
            listed = ", ".join(f"{layer.name!r} ({layer.kind})" for layer in slow)
            warnings.warn(
                f"The gradients of each loss by {listed} take a backward pass for every one of the "
                f"{objectives.losses.numel()} losses: no rule gives them from the calls of modules. Was the forward "
                "run before the engine was made, are weights used outside of the engine's modules, does their forward "
                "draw random numbers, or do the examples influence each other?",
                stacklevel=5,
            )
        return plan

    def _layers(self, graph: Graph) -> LayerCollection:
        if not self.whole:
            _check_examples_are_apart(self.model)
        found = LayerCollection.from_model(self.model).layers.values()
        missing = any(p.requires_grad and id(p) not in graph.parameters for p in self.model.parameters())
        if missing and any("CheckpointFunction" in type(node).__name__ for node in graph.nodes):
            raise NotImplementedError(HIDDEN)
        layers = [
            layer
            for layer in found
            if any(id(self.model.get_parameter(layer.full_name(x))) in graph.parameters for x in layer.shapes)
        ]
        for layer in layers:
            if any(self.model.get_parameter(layer.full_name(x)).is_complex() for x in layer.shapes):
                raise NotImplementedError(
                    f"Layer {layer.name!r} ({layer.kind}) has complex parameters, which the engine does not serve. Use "
                    "nngeo.descent.backward, for which each is two real ones."
                )
        if not layers:
            raise ValueError(
                "The losses do not depend on any parameter of the engine's modules that requires a gradient."
            )
        return LayerCollection(layers)

    def _choose(self, name: str, plan: Plan, trial: Trial) -> None:
        """Give a layer the first choice that is right, that of the last plan before all others."""
        known = [self._last[name]] if name in self._last else []
        for choice in (*known, *choices(plan.layers[name], plan.uses[name], self.model, self.whole)):
            vectorized = replace(choice, source=replace(choice.source, vectorized=True))
            if choice not in known and choice != vectorized and vectorized not in trial.failed:
                continue  # the loop is for modules that can't be vectorised
            plan.choices[name] = choice
            if choice.by_rows or (trial.applies(name) and trial.agrees(name, plan.rounding)):
                return


def _is_shared(use: Use, b: int) -> bool:
    """Whether a module may have returned the same for all examples."""
    return list(use.edges) == [0] and b not in [
        size for shape in use.call.returned if shape is not None for size in shape[:1]
    ]


def _check_examples_are_apart(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            why = "is in train mode" if module.training else "has no running statistics"
            raise ValueError(
                f"Layer {name!r} ({type(module).__name__}) {why}, so it mixes the examples of a batch: with "
                "a batch_dim each loss should depend on one. Use Engine(..., batch_dim=None), or a layer that "
                "normalizes each example by itself (GroupNorm, LayerNorm), or call eval() on it."
            )
