"""Derivatives by the weights: gradients of single examples by the layer rules, tangents that all examples share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property

import torch
from torch import Tensor

from nngeo.generators.base import dtype_is_one
from nngeo.generators.differentiable import split_by_parameter
from nngeo.generators.outputs import check_mode, check_outputs
from nngeo.generators.plans import Planner
from nngeo.generators.record import BatchRecord
from nngeo.generators.sources import Replay
from nngeo.layers.collection import LayerCollection
from nngeo.layers.replace import call_with
from nngeo.products import byblock, byexample
from nngeo.products.contexts import frozen, second_derivatives
from nngeo.products.differential import Differential, unit_vectors
from nngeo.products.evaluation import Evaluation
from nngeo.products.facts import facts_of
from nngeo.products.space import outputs_space, weights_space
from nngeo.products.tangents import CannotPush, Tangents, random_cotangent
from nngeo.representations import Block

# What running a model on one example more takes beside its multiplications, in multiplications.
OVERHEAD = 1e6


class WeightDifferential(Differential):
    """J by the parameters of a LayerCollection, which all examples share."""

    def __init__(self, evaluation: Evaluation, layers: LayerCollection, budget: int):
        self.evaluation, self.layers, self.budget = evaluation, layers, budget
        model, function = evaluation.model, evaluation.function
        check_mode(model)
        dtype_is_one(model, layers)
        self.recording = Planner(model, function, layers, check=True).record(evaluation.batch)
        self.outputs = self.recording.outputs.detach()
        check_outputs(self.outputs, evaluation.batch, model, function)
        self.domain, self.codomain = weights_space(layers, self.outputs), outputs_space(self.outputs)

    def pull(self, w: Tensor) -> Tensor:
        out, k = self.outputs.new_empty(len(w), self.domain.b, self.domain.d), 0
        for records in self._records(w):
            count = next(iter(records.layers.values())).n_cotangents
            for name, part in self.layers.split(out[k : k + count]).items():
                records.layers[name].write(part)
            k += count
        return out

    def push(self, v: Tensor) -> Tensor:
        """Where examples have vectors of their own: by rows, or for one example after the other, whichever is less."""
        b, o = self.domain.b, self.codomain.d
        if v.shape[1] == 1:
            return self._push_shared(v[:, 0])
        if o * self.pull_cost() < len(v) * self.push_cost() + OVERHEAD:
            return self._push_by_rows(v)
        return torch.cat([self.examples(slice(e, e + 1))._push_shared(v[:, e]) for e in range(b)], 1)

    def squares(self, w: Tensor) -> Tensor:
        dtype = torch.promote_types(self.outputs.dtype, torch.float32)
        out = self.outputs.new_empty(self.domain.b, self.domain.d, dtype=dtype)
        for chunk, records in enumerate(self._records(w)):
            for name, part in self.layers.split(out).items():
                byexample.write_squares(records.layers[name], part, add=chunk > 0)
        return out.to(self.outputs.dtype)

    def total_squares(self, w: Tensor) -> Tensor:
        out = self._zeros(self.domain.d)
        for records in self._records(w):
            out += torch.cat([record.squares() for record in records.layers.values()])
        return out.to(self.outputs.dtype)

    def norms(self, w: Tensor) -> Tensor:
        chunks = [[byexample.norms(r) for r in records.layers.values()] for records in self._records(w)]
        return torch.cat([torch.stack(parts).sum(0) for parts in chunks]).to(self.outputs.dtype)

    has_kernel = True

    def kernel(self, other: Differential, blocks: Mapping[str, Block] | None = None, diag: bool = False) -> Tensor:
        left = self._all_records()
        right = other._all_records() if isinstance(other, WeightDifferential) and other is not self else left
        pairs = {name: (left.layers[name], right.layers[name]) for name in self.layers}
        if blocks is None:
            kernels = [byexample.kernel(*pair) for pair in pairs.values()]
        else:
            kernels = [byblock.sandwiched(blocks[name], *pair, diag) for name, pair in pairs.items()]
        return torch.stack(kernels).sum(0).to(self.outputs.dtype)

    def held(self, squared: bool = False) -> int:
        return 1 + self.recording.elements() // self.domain.b if squared else self.domain.d

    def examples(self, rows: slice) -> WeightDifferential:
        return WeightDifferential(self.evaluation.examples(rows), self.layers, self.budget)

    def push_cost(self) -> float:
        return 2 * self._work

    def pull_cost(self) -> float:
        return self._work + 4.0 * self.domain.d  # which are written, and read again

    def squares_cost(self) -> float:
        return self._work

    @cached_property
    def _work(self) -> float:
        """Multiplications of a forward for each example, roughly: of every weight at every position."""
        total = 0.0
        for host, calls in self.recording.seen.calls.items():
            sizes = [(p.numel(), len(p)) for p in self.evaluation.model.get_submodule(host).parameters() if p.ndim]
            each = max((numel / rows for numel, rows in sizes), default=1.0)
            total += each * sum(shape.numel() for call in calls for shape in call.shapes if shape is not None)
        return total / self.domain.b + 1

    @cached_property
    def _probe(self) -> tuple[Tensor, list[Tensor]]:
        """A random cotangent and its gradients, summed over the examples."""
        w, total = random_cotangent(self.outputs), self._zeros(self.domain.d)
        for records in self._records(w[None]):
            total += torch.cat([byexample.total(record) for record in records.layers.values()])
        return w, split_by_parameter(self.layers, total.to(self.outputs.dtype))

    def _zeros(self, *shape: int) -> Tensor:
        """In float32 for half precision."""
        return torch.zeros(shape, dtype=torch.promote_types(self.outputs.dtype, torch.float32)).to(self.outputs.device)

    def _records(self, w: Tensor) -> Iterator[BatchRecord]:
        """Of w (k, b, o), in chunks whose gradients at the layers' outputs fit the budget."""
        for part in w.split(max(1, self.budget // max(1, self.recording.elements()))):
            yield self.recording.records(part.reshape(-1, *self.outputs.shape), retain=True)

    def _all_records(self) -> BatchRecord:
        """Of all outputs at once."""
        c = unit_vectors(self.codomain, 0, self.codomain.d)
        return self.recording.records(c.reshape(-1, *self.outputs.shape), retain=True)

    def _push_shared(self, v: Tensor) -> Tensor:
        """J v (m, b, o) for v (m, P)."""
        model, evaluation = self.evaluation.model, self.evaluation
        names = [f"model.{name}" for name, _ in self.layers.named_parameters(model)]
        leaves = [p.detach() for p in self.layers.parameters(model)]

        def run(*leaves: Tensor) -> Tensor:
            replay, tensors = Replay(model, evaluation.function), dict(zip(names, leaves, strict=True))
            return call_with(replay, tensors, (evaluation.batch.content,), {})

        facts = facts_of(evaluation, self.layers, ("weight",))
        tangents = Tangents(facts, run, leaves, self.outputs, lambda: self._probe)
        step = max(1, self.budget // (2 * self.recording.elements() + v.shape[1]))
        try:
            with frozen(model), second_derivatives(model, forward=tangents.forward):
                parts = [tangents(split_by_parameter(self.layers, rows)) for rows in v.split(step)]
        except CannotPush:
            return self._push_by_rows(v[:, None])
        return torch.cat(parts).reshape(len(v), self.domain.b, -1)
