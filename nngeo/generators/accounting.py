"""Every use of a parameter is accounted for: the plan of a sweep, found by comparison with autograd.

On a few examples random cotangents are pulled through the rules, layer by layer, and compared with what autograd says,
for two of them apart and for all together. A layer that differs (its weight is also used by a parent, by another layer,
by a function; its examples are folded into the batch in another order; ...) moves on to its next candidate source, at
last to the whole function, run again example by example. What differs even there is refused by name.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import torch
from torch import nn

from nngeo.generators.batches import Batch, Function
from nngeo.generators.independence import FirstExamples, check_independence, run
from nngeo.generators.recording import Layouts, Plan, Recording, Shared
from nngeo.generators.routing import Routing
from nngeo.generators.sources import Source, candidates, uses_of
from nngeo.generators.truth import Truth, has_zeros, perturbed
from nngeo.generators.watch import Call, Layout, watch
from nngeo.layers.collection import LayerCollection


class Accounting:
    """Finds the plan of a sweep from a few examples of a batch.

    Args:
        front: examples to look at first.
        banned: modules whose calls can't be divided among the examples.
        before: an earlier plan to begin with: its sources, and its layouts where these examples pass a module by.
    """

    def __init__(
        self,
        model: nn.Module,
        function: Function | None,
        layers: LayerCollection,
        batch: Batch,
        *,
        front: Sequence[int] = (),
        banned: Collection[str] = (),
        before: Plan | None = None,
    ):
        self.model, self.function, self.layers = model, function, layers
        self.examples, self.uses = FirstExamples.of(batch, front), uses_of(model, layers)
        self.banned, self.before = set(banned), before
        self.errors: dict[str, Exception] = {}
        self.reasons: dict[str, Exception] = {}  # the first error of each layer

    def plan(self, check: bool) -> Plan:
        """The plan; without `check` the first source of each layer, and the layouts."""
        check_independence(self.model, self.function, self.examples)
        with Routing() as routing:
            layouts = self._layouts(set())
        truths = [Truth.of(self.model, self.function, self.layers, self.examples.few)] if check else []
        unused = set(truths[0].unused if check else ())
        choices = {name: self._candidates(name) for name in self.layers}
        sources = {name: self._first(name, choices[name], layouts, unused) for name in self.layers}
        whole = self.examples.whole
        plan = Plan(self.uses, sources, layouts, shapes=whole.shapes(), routed=routing.found, apart=whole.apart())
        if not check:
            return plan
        plan.batched, plan.unused = self._can_batch(plan, truths[0]), truths[0].unused
        self._settle(plan, choices, truths[0])
        if has_zeros(self.model):
            with perturbed(self.model):
                truths.append(Truth.of(self.model, self.function, self.layers, self.examples.few))
                self._settle(plan, choices, truths[1])
        unseen = {name for name in self.layers if not any(truth.determines(name) for truth in truths)}
        unseen = self._without_precise(plan, unseen, truths[0])
        plan.undetermined = unseen if self.before is None else unseen & self.before.undetermined
        plan.rounding = max(truth.rounding for truth in truths)
        return plan

    def _candidates(self, name: str) -> list[Source]:
        sources = candidates(self.layers[name], self.uses[name], self.model)
        return [source for source in sources if not self.banned.intersection(source.hosts)]

    def _first(self, name: str, choices: list[Source], layouts: Layouts, unused: set[str]) -> Source:
        """The earlier plan's source, or the first one; of a layer that is used, one whose modules are called."""
        earlier = self.before.sources[name] if self.before is not None else None
        if earlier is not None and replace(earlier, vectorized=True) in choices:
            return earlier
        if all(self.layers[name].full_name(local) in unused for local in self.layers[name].shapes):
            return choices[0]
        called = [source for source in choices if source.hosts and any(layouts[host] for host in source.hosts)]
        return called[0] if called else choices[0]

    def _settle(self, plan: Plan, choices: dict[str, list[Source]], truth: Truth) -> None:
        pending = list(self.layers)
        while pending := self._wrong(plan, pending, truth):
            self._move_on(plan, pending, choices)

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
        """Where the examples are: the axis that grows with their number. Modules where there is none are banned."""
        names = [name for name, _ in self.model.named_modules()]
        seen = []
        for batch in (self.examples.one, self.examples.few):
            with watch(self.model, names, batch.size, added) as found:
                run(self.model, self.function, batch)
            seen.append(found.calls)
        layouts: Layouts = {}
        for name in names:
            one, few = seen[0][name], seen[1][name]
            layouts[name] = [self._layout(name, first, second) for first, second in zip(one, few, strict=False)]
            if len(one) != len(few):
                self.banned.add(name)
            if self.before is not None and not layouts[name]:
                layouts[name] = self.before.layouts[name]
        return layouts

    def _layout(self, name: str, one: Call, few: Call) -> tuple[list[Layout], list[Layout]]:
        found = []
        for first, second in ((one.argument_shapes(), few.argument_shapes()), (one.returned, few.returned)):
            layouts: list[Layout] = []
            for s, t in zip(first, second, strict=False):
                layout = Layout(None) if s is None or t is None else Layout.between(s, t, self.examples.few.size)
                if layout is None:
                    self.banned.add(name)
                layouts.append(layout or Layout(None))
            found.append(layouts)
        return found[0], found[1]

    def _can_batch(self, plan: Plan, truth: Truth) -> bool:
        """Whether the backward pass can be vectorised; if not, cotangents are pulled one by one."""
        try:
            recording = Recording(self.model, self.function, self.layers, plan, self.examples.few)
            recording.pull(truth.cotangents, retain=False)
        except RuntimeError:
            return False
        return True

    def _wrong(self, plan: Plan, pending: list[str], truth: Truth) -> list[str]:
        """The layers whose gradients differ from autograd's."""
        self.errors = {}
        changed = [name for name in pending if plan.sources[name].added]
        try:
            recording = Recording(self.model, self.function, self.layers, plan, self.examples.few)
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

    def _without_precise(self, plan: Plan, names: set[str], truth: Truth) -> set[str]:
        """Without the layers whose gradients are small beside others', as in deep networks, but agree in all digits."""
        if not names:
            return names
        recording = Recording(self.model, self.function, self.layers, plan, self.examples.few)
        grads, shared = recording.pull(truth.cotangents, retain=False), Shared()
        return {
            n for n in names if not truth.agrees_precisely(n, recording.record_of(n, grads, truth.cotangents, shared))
        }

    def _agrees(self, recording: Recording, name: str, grads: dict, shared: Shared, truth: Truth) -> bool:
        try:
            return truth.agrees(name, recording.record_of(name, grads, truth.cotangents, shared))
        except Exception as error:  # whatever a module raises when it is run in a way it was not made for
            self.errors[name] = error
            self.reasons.setdefault(name, error)
            return False
