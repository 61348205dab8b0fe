"""Every use of a parameter is accounted for: the plan of a sweep, found by comparison with autograd.

On two examples random cotangents are pulled through the rules, layer by layer, and compared with what autograd says,
for each example apart. A layer that differs (its weight is also used by a parent, by another layer, by a function; its
examples are folded into the batch in another order; ...) moves on to its next candidate source, at last to the whole
function, run again example by example. What differs even there is refused by name.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from nngeo.generators.batches import Batch, Function
from nngeo.generators.independence import FirstExamples, check_independence, run
from nngeo.generators.recording import Layouts, Plan, Recording, Shared
from nngeo.generators.routing import Routing
from nngeo.generators.sources import Source, candidates, uses_of
from nngeo.generators.truth import Truth
from nngeo.generators.watch import Layout, watch
from nngeo.layers.collection import LayerCollection


class Accounting:
    """Finds the plan of a sweep from the first examples of a batch; without the sources that use `banned` modules."""

    def __init__(
        self,
        model: nn.Module,
        function: Function | None,
        layers: LayerCollection,
        batch: Batch,
        banned: Collection[str] = (),
    ):
        self.banned = set(banned)
        self.model, self.function, self.layers = model, function, layers
        self.examples, self.uses = FirstExamples.of(batch), uses_of(model, layers)
        self.errors: dict[str, Exception] = {}
        self.reasons: dict[str, Exception] = {}  # the first error of each layer

    def plan(self, check: bool) -> Plan:
        """The plan; without `check` the first source of each layer, and the layouts."""
        choices = {name: self._candidates(name) for name in self.layers}
        check_independence(self.model, self.function, self.examples)
        sources = {name: choices[name][0] for name in self.layers}
        with Routing() as routing:
            layouts = self._layouts(set())
        plan = Plan(self.uses, sources, layouts, shapes=self.examples.whole.shapes(), routed=routing.found)
        if not check:
            return plan
        truth = Truth.of(self.model, self.function, self.layers, self.examples.two)
        plan.batched, plan.unused = self._can_batch(plan, truth), truth.unused
        pending = list(self.layers)
        while pending := self._wrong(plan, pending, truth):
            self._move_on(plan, pending, choices)
        return plan

    def _candidates(self, name: str) -> list[Source]:
        sources = candidates(self.layers[name], self.uses[name], self.model)
        return [source for source in sources if not self.banned.intersection(source.hosts)]

    def _move_on(self, plan: Plan, pending: list[str], choices: dict[str, list[Source]]) -> None:
        """Give each layer its next source; but only one at a time an output with an added axis of examples.

        What follows such an output has examples, too: where they are is measured again, and the layers that have not
        come to that point begin anew.
        """
        added = plan.added()
        for name in pending:
            source = self._next(name, choices[name], plan)
            if not (source.added and plan.added() != added):
                plan.sources[name] = source
        if plan.added() != added:
            try:
                plan.layouts = self._layouts(plan.added())
            except Exception:  # the rest of the model can't do with another axis, and will say so when it is compared
                return
            for name in pending:
                ahead = choices[name][: choices[name].index(replace(plan.sources[name], vectorized=True))]
                if not plan.sources[name].added and not any(source.added for source in ahead):
                    plan.sources[name] = choices[name][0]

    def _next(self, name: str, choices: list[Source], plan: Plan) -> Source:
        before = plan.sources[name]
        if not before.fast and before.vectorized and name in self.errors:
            return replace(before, vectorized=False)
        for source in choices[choices.index(replace(before, vectorized=True)) + 1 :]:
            if self._applies(source, plan.layouts):
                return source
        if isinstance(reason := self.reasons.get(name), NotImplementedError):
            raise reason
        kind = self.layers[name].kind
        raise NotImplementedError(
            f"Gradients of single examples by the parameters of layer {name!r} ({kind}) can't be computed: run one by "
            "one, the examples give other gradients than in a batch, where they influence each other (normalization "
            "over the batch?), or the layer can't be run again. Leave it out by `layer_collection="
            "LayerCollection.from_model(model, layers=...)`."
        ) from self.errors.get(name)

    def _applies(self, source: Source, layouts: Layouts) -> bool:
        """Whether a source can give anything else than the ones before it."""
        calls = [call for host in source.hosts for call in layouts[host]]
        if source.position_major:
            return any(layout.entries > 1 for call in calls for layout in call[1])
        if source.added:
            return any(layout.axis is None for call in calls for layout in call[1])
        return not source.hosts or bool(calls)

    def _layouts(self, added: set[str]) -> Layouts:
        """Where the examples are: the axis that doubles when one example becomes two."""
        names = [name for name, _ in self.model.named_modules()]
        shapes = []
        for batch in (self.examples.one, self.examples.two):
            with watch(self.model, names, batch.size, added) as seen:
                run(self.model, self.function, batch)
            shapes.append(seen.calls)
        one, two = shapes
        return {
            name: [
                (
                    [_layout(s, t) for s, t in zip(first.arguments, second.arguments, strict=False)],
                    [_layout(s, t) for s, t in zip(first.returned, second.returned, strict=False)],
                )
                for first, second in zip(one[name], two[name], strict=False)
            ]
            for name in names
        }

    def _can_batch(self, plan: Plan, truth: Truth) -> bool:
        """Whether the backward pass can be vectorised; if not, cotangents are pulled one by one."""
        try:
            recording = Recording(self.model, self.function, self.layers, plan, self.examples.two)
            recording.pull(truth.cotangents, retain=False)
        except RuntimeError:
            return False
        return True

    def _wrong(self, plan: Plan, pending: list[str], truth: Truth) -> list[str]:
        """The layers whose gradients differ from autograd's."""
        self.errors = {}
        changed = [name for name in pending if plan.sources[name].added]
        try:
            recording = Recording(self.model, self.function, self.layers, plan, self.examples.two)
            same = torch.allclose(recording.outputs, truth.outputs, rtol=1e-3, atol=1e-5)
        except Exception as error:
            if not changed:
                raise
            # The rest of the model can't do with outputs that have an axis of examples.
            same, self.errors = False, dict.fromkeys(changed, error)
        if changed and not same:
            rest = [name for name in pending if name not in changed]
            without = {name: replace(s, added=s.added and name not in changed) for name, s in plan.sources.items()}
            return changed + (self._wrong(replace(plan, sources=without), rest, truth) if rest else [])
        grads: dict = recording.pull(truth.cotangents, retain=False)
        shared: Shared = {}
        return [name for name in pending if not self._agrees(recording, name, grads, shared, truth)]

    def _agrees(self, recording: Recording, name: str, grads: dict, shared: Shared, truth: Truth) -> bool:
        try:
            found = recording.record_of(name, grads, truth.cotangents, shared).jacobian()
        except Exception as error:  # whatever a module raises when it is run in a way it was not made for
            self.errors[name] = error
            self.reasons.setdefault(name, error)
            return False
        return truth.agrees(name, found)


def _layout(one: Any, two: Any) -> Layout:
    """The layout of a leaf, from its value (or shape) with one and with two examples."""
    one, two = (leaf.shape if isinstance(leaf, Tensor) else leaf for leaf in (one, two))
    return Layout.between(one, two) if isinstance(one, torch.Size) and isinstance(two, torch.Size) else Layout(None)
