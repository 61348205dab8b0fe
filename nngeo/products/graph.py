"""Derivatives that can be differentiated again, by plain double backward: for `create_graph=True`.

Vectorised derivatives of vectorised gradients are wrong for some layers (torch 2.13: LayerNorm), so rows are
differentiated one by one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from nngeo.generators.outputs import check_outputs, outputs_of
from nngeo.generators.sources import Replay
from nngeo.layers.collection import LayerCollection
from nngeo.layers.replace import call_with
from nngeo.products.differential import Differential
from nngeo.products.evaluation import Evaluation, Place
from nngeo.products.facts import facts_of
from nngeo.products.space import inputs_space, outputs_space, weights_space


class InputGraph(Differential):
    """J by the inputs, with a graph that reaches them (where they require gradients) and the parameters."""

    differentiable = True

    def __init__(self, evaluation: Evaluation, places: Mapping[str, Place], budget: int):
        self.budget = budget
        facts_of(evaluation, LayerCollection(), tuple(places))
        arguments = evaluation.arguments()
        given = [arguments[place] for place in places.values()]
        self._leaves = [x if x.requires_grad else x.detach().requires_grad_() for x in given]
        batch = evaluation.replaced(dict(zip(places.values(), self._leaves, strict=True)))
        self.outputs = outputs_of(batch, evaluation.model, evaluation.function)
        check_outputs(self.outputs.detach(), batch, evaluation.model, evaluation.function)
        self.domain = inputs_space(places, given)
        self.codomain = outputs_space(self.outputs)
        self._pulled: tuple[Tensor, Tensor] | None = None

    def pull(self, w: Tensor) -> Tensor:
        return torch.stack([self._joined(gradients(self.outputs, self._leaves, row)) for row in w])

    def _joined(self, grads: Sequence[Tensor]) -> Tensor:
        return torch.cat([g.reshape(self.domain.b, -1) for g in grads], -1)

    def push(self, v: Tensor) -> Tensor:
        if self._pulled is None:
            w = torch.zeros_like(self.outputs, requires_grad=True)
            self._pulled = w, self.pull(w[None])[0]
        w, pulled = self._pulled
        rows = v.expand(-1, self.domain.b, -1)
        return torch.stack([gradients(pulled, [w], row)[0].reshape(self.domain.b, -1) for row in rows])

    def push_cost(self) -> float:
        return 2.0

    def pull_cost(self) -> float:
        return 1.0


class WeightGraph(Differential):
    """J by the weights, with a graph: of one example after the other."""

    differentiable = True

    def __init__(self, evaluation: Evaluation, layers: LayerCollection, budget: int):
        self.budget = budget
        model, b = evaluation.model, evaluation.batch.size
        facts_of(evaluation, layers, ())
        parameters = dict(layers.named_parameters(model))
        self._leaves = {n: p if p.requires_grad else p.detach().requires_grad_() for n, p in parameters.items()}
        replay = Replay(model, evaluation.function)
        tensors = {f"model.{name}": leaf for name, leaf in self._leaves.items()}

        def run(part: Evaluation) -> Tensor:
            return call_with(replay, tensors, (part.batch.content,), {})

        self._ones = [run(evaluation.examples(slice(e, e + 1))) for e in range(b)]
        self.outputs = torch.cat(self._ones)
        check_outputs(self.outputs.detach(), evaluation.batch, model, evaluation.function)
        self.domain = weights_space(layers, self.outputs)
        self.codomain = outputs_space(self.outputs)

    def pull(self, w: Tensor) -> Tensor:
        leaves = list(self._leaves.values())

        def one(e: int, row: Tensor) -> Tensor:
            return torch.cat([g.flatten() for g in gradients(self._ones[e], leaves, row[e][None])])

        return torch.stack([torch.stack([one(e, row) for e in range(self.domain.b)]) for row in w])

    def push(self, v: Tensor) -> Tensor:
        found = []
        rows = v.expand(-1, self.domain.b, -1)
        for e, out in enumerate(self._ones):
            w = torch.zeros_like(out, requires_grad=True)
            pulled = torch.cat([g.flatten() for g in gradients(out, list(self._leaves.values()), w)])
            found.append(torch.stack([gradients(pulled, [w], row[e])[0].flatten() for row in rows]))
        return torch.stack(found, 1)

    def push_cost(self) -> float:
        return 2.0

    def pull_cost(self) -> float:
        return 1.0


def gradients(outputs: Tensor, inputs: Sequence[Tensor], w: Tensor) -> list[Tensor]:
    """Like every input, with their own graph; zero where the outputs do not depend on it."""
    found: Sequence[Tensor | None] = [None] * len(inputs)
    if outputs.requires_grad:
        found = torch.autograd.grad(
            outputs, list(inputs), w.reshape(outputs.shape), create_graph=True, allow_unused=True
        )
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)]
