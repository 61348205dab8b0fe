"""Derivatives by the inputs: examples are independent, so one backward pass serves all of them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from functools import cached_property

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from nngeo.generators.batches import Batch
from nngeo.generators.differentiable import Made, quiet
from nngeo.generators.outputs import check_outputs, outputs_of
from nngeo.layers.collection import LayerCollection
from nngeo.products.contexts import second_derivatives
from nngeo.products.differential import Differential
from nngeo.products.evaluation import Evaluation, Place
from nngeo.products.facts import facts_of
from nngeo.products.space import inputs_space, outputs_space
from nngeo.products.tangents import CannotPush, Tangents, random_cotangent


class InputDifferential(Differential):
    """J by one or several inputs, their coordinates one after the other.

    It is to be used inside of `frozen(model)`. Where the shape of the outputs is known, the model is not run before
    something is pulled or pushed.
    """

    def __init__(self, evaluation: Evaluation, places: Mapping[str, Place], budget: int):
        self.evaluation, self.places, self.budget = evaluation, places, budget
        self.facts = facts_of(evaluation, LayerCollection(), tuple(places))
        arguments = evaluation.arguments()
        self._leaves = [arguments[place].detach() for place in places.values()]
        self.domain = inputs_space(places, self._leaves)
        self.codomain = outputs_space(self._outputs_like())

    def push(self, v: Tensor) -> Tensor:
        m, b, n = len(v), self.domain.b, self.domain.d
        step = max(1, self.budget // self._held()) if m > 1 else 1
        tangents = self._tangents()  # not kept: it refers to this object, and would keep it alive
        try:
            with second_derivatives(self.evaluation.model, forward=tangents.forward):
                parts = [tangents(self._split(part)) for part in v.expand(m, b, n).split(step)]
        except CannotPush:
            return self._push_by_rows(v)
        found = (parts[0] if len(parts) == 1 else torch.cat(parts)).reshape(m, b, -1)
        if not bool(found.isfinite().all()):
            self._recorded  # noqa: B018 (which raises where the outputs are not finite themselves)
        return found

    def pull(self, w: Tensor) -> Tensor:
        m, b = len(w), self.domain.b
        step = max(1, self.budget // self._held()) if m > 1 else 1
        shape = self._recorded[1].shape
        with quiet() if m > 1 else nullcontext():
            parts = [self._gradients(part.reshape(-1, *shape)) for part in w.split(step)]
        rows = [torch.cat([g.reshape(len(g), b, -1) for g in part], -1) for part in parts]
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def examples(self, rows: slice) -> InputDifferential:
        return InputDifferential(self.evaluation.examples(rows), self.places, self.budget)

    def push_cost(self) -> float:
        return self._work

    def pull_cost(self) -> float:
        return self._work

    def _outputs_like(self) -> Tensor:
        """Something of the shape, dtype and device of the outputs; known beforehand for inputs of a known shape."""
        if self.evaluation.by_user or len(self.evaluation.arguments()) > 1:
            return self._recorded[1].detach()
        shape = self._leaves[0].shape[1:]
        if shape not in self.facts.outputs:
            self.facts.outputs[shape] = self._recorded[1][0].detach().to("meta")
        known = self.facts.outputs[shape]
        return self._leaves[0].new_zeros((), dtype=known.dtype).expand(self.domain.b, *known.shape)

    @cached_property
    def _recorded(self) -> tuple[list[Tensor], Tensor]:
        """Leaves, and the outputs with their graph."""
        leaves = [leaf.detach().requires_grad_() for leaf in self._leaves]
        with torch.enable_grad():
            outputs = self._run(*leaves)
        check_outputs(outputs, self.evaluation.batch, self.evaluation.model, self.evaluation.function)
        return leaves, outputs

    def _tangents(self) -> Tangents:
        return Tangents(self.facts, self._run, self._leaves, self.codomain.like, lambda: self._probe)

    @cached_property
    def _probe(self) -> tuple[Tensor, list[Tensor]]:
        """A random cotangent and its gradients."""
        w = random_cotangent(self.codomain.like)
        return w, [g[0] for g in self._gradients(w[None])]

    def _run(self, *leaves: Tensor) -> Tensor:
        batch = self.evaluation.replaced(dict(zip(self.places.values(), leaves, strict=True)))
        outputs = outputs_of(batch, self.evaluation.model, self.evaluation.function)
        if "codomain" in vars(self) and outputs.shape != self.codomain.shape:
            raise NotImplementedError(
                f"The outputs have shape {tuple(outputs.shape)}, and {tuple(self.codomain.shape or ())} for other "
                "inputs of the same shape; what depends on the data in this way has no Jacobian of a fixed size."
            )
        return outputs

    def _split(self, v: Tensor) -> list[Tensor]:
        parts = v.split(list(self.domain.sizes.values()), -1)
        return [part.reshape(len(v), *leaf.shape) for part, leaf in zip(parts, self._leaves, strict=True)]

    def _gradients(self, w: Tensor) -> list[Tensor]:
        """(k, *shape) by every leaf, for w (k, b, ...)."""
        leaves, outputs = self._recorded
        found: list[Tensor | None] = [None] * len(leaves)
        if outputs.requires_grad:
            found = self.facts.pull([outputs], leaves, [w], 1)
        return [x.new_zeros(len(w), *x.shape) if g is None else g for x, g in zip(self._leaves, found, strict=True)]

    def _held(self) -> int:
        """Elements that one row holds at a time."""
        return self.facts.footprint.of(self.evaluation.batch, self.evaluation.model, self._run_few)

    def _run_few(self, few: Batch) -> Tensor:
        """The outputs of a few examples, with a graph."""
        part = Evaluation(self.evaluation.model, self.evaluation.function, few, self.evaluation.by_user)
        arguments = part.arguments()
        leaves = {place: arguments[place].detach().requires_grad_() for place in self.places.values()}
        return outputs_of(part.replaced(leaves), part.model, part.function)

    @cached_property
    def _work(self) -> float:
        """Multiplications and elements of a forward, for each example; counted once."""
        if self.facts.work is None:
            self.facts.work = (self._multiplications() + self._held()) / self.domain.b
        return self.facts.work

    def _multiplications(self) -> float:
        """Multiplications of a forward; of a model that differentiates inside, the elements that it computes."""
        try:
            with quiet(), FlopCounterMode(display=False) as counter:
                self._run(*self._leaves)
        except RuntimeError:  # the counter's hooks do not suit such models
            with Made() as made:
                self._run(*self._leaves)
            return made.elements
        return counter.get_total_flops() / 2
