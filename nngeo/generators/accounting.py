"""Every use of a parameter is accounted for: the plan of a sweep, found by comparison with autograd.

On a few examples random cotangents are pulled through the rules, layer by layer, and compared with what autograd says,
each apart from the others. A layer that differs (its weight is also used by a parent, by another
layer, by a function; its examples are folded into the batch in another order; ...) moves on to its next candidate
source, at last to the whole function, run again example by example. What differs even there is refused by name.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from nngeo.generators.batches import Batch, Function
from nngeo.generators.independence import FirstExamples, check_independence
from nngeo.generators.outputs import is_finite
from nngeo.generators.recording import Forward, Layouts, Plan, Pulled, Recording, Shared
from nngeo.generators.sources import Chain, Source, candidates, uses_of
from nngeo.generators.truth import Truth, has_zeros, perturbed
from nngeo.generators.untouched import Snapshot, untouched
from nngeo.generators.watch import Call, Layout, LayoutChanged
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
        self.names = [name for name, _ in model.named_modules()]
        self.chains: dict[str, Chain] = {}
        self.errors: dict[str, Exception] = {}
        self.reasons: dict[str, Exception] = {}  # the first error of each layer

    def plan(self, check: bool) -> Plan:
        """The plan; without `check` the first source of each layer, and the layouts."""
        with self._wanted():
            while True:
                try:
                    return self._checked() if check else self._unchecked()
                except LayoutChanged as change:  # what it sees depends on more than the examples
                    if change.host in self.banned:
                        raise self._refusal(change.host) from change
                    self.banned.add(change.host)

    def _unchecked(self) -> Plan:
        return self._first_plan(self._layouts(self._forward(self.examples.one), self._forward(self.examples.few)))

    def _checked(self) -> Plan:
        seen: list[Forward] = []

        def look(batch: Batch) -> Tensor:
            seen.append(self._forward(batch))
            return seen[-1].outputs

        first = check_independence(self.model, self.function, self.examples, look)
        few, one = seen[:2]
        plan = self._first_plan(self._layouts(one, few))
        plan.routed, plan.reads = first.routed, first.reads
        zeros, points = has_zeros(self.model), list[tuple[Truth, set[str]]]()
        if zeros:
            # What is behind them is seen at other parameters: all there is, unless Python reads values.
            with perturbed(self.model):
                points += self._settle_nearby(plan)
        if first.reads or not points:
            points.append(self._settle(plan, few))
        unseen = set(self.layers).difference(*(found for _, found in points))
        plan.undetermined = unseen if self.before is None else unseen & self.before.undetermined
        plan.failed = False  # as sources did that were tried
        plan.rounding = max(truth.rounding for truth, _ in points)
        return plan

    @contextmanager
    def _wanted(self) -> Iterator[None]:
        """Inside, the parameters of the layers require gradients."""
        with untouched(self.model):
            for p in self.layers.parameters(self.model):
                p.requires_grad_()
            self._before = Snapshot(self.model)
            yield

    def _forward(self, batch: Batch, added: Collection[str] = ()) -> Forward:
        return Forward.of(self.model, self.function, batch, self.names, added, self._before)

    def _first_plan(self, layouts: Layouts) -> Plan:
        for name in self.layers:
            known = candidates(self.layers[name], self.uses[name], self.model)
            choices = [source for source in known if not self.banned.intersection(source.hosts)]
            self.chains[name] = Chain(choices, self._first(name, choices, layouts))
        sources, whole = {name: chain.source for name, chain in self.chains.items()}, self.examples.whole
        return Plan(self.uses, sources, layouts, shapes=whole.shapes(), apart=whole.apart())

    def _first(self, name: str, choices: list[Source], layouts: Layouts) -> Source:
        """The earlier plan's source, or the first one whose modules are called; of a layer that is not used, any."""
        earlier = self.before.sources[name] if self.before is not None else None
        if earlier is not None and replace(earlier, vectorized=True) in choices:
            return earlier
        called = [source for source in choices if source.hosts and any(layouts[host] for host in source.hosts)]
        return called[0] if called else choices[0]

    def _settle_nearby(self, plan: Plan) -> list[tuple[Truth, set[str]]]:
        """What `_settle` finds at other parameters; nothing where the model can't be run there as it was before."""
        few = self._forward(self.examples.fewest)
        try:
            return [self._settle(plan, few)] if is_finite(few.outputs) else []
        except LayoutChanged:
            return []

    def _settle(self, plan: Plan, few: Forward) -> tuple[Truth, set[str]]:
        """Move the layers along their chains until they agree with the truth; it, and the layers that it determines."""
        truth = Truth.of(self.model, self.layers, few.outputs)
        plan.unused = truth.unused
        if self.before is None:
            for name, layer in self.layers.layers.items():
                if all(layer.full_name(local) in truth.unused for local in layer.shapes):
                    plan.sources[name] = self.chains[name].restart()
        at = Trial(self, plan, truth, few)
        pending = list(self.layers)
        while pending := at.wrong(pending):
            self._move_on(plan, pending)
        return truth, at.determined()

    def _move_on(self, plan: Plan, pending: list[str]) -> None:
        """Give each layer its next source; but only one at a time an output with an added axis of examples.

        What follows such an output has examples, too: where they are is measured again, and the layers that have not
        come to that point begin anew.
        """
        added = plan.added()
        for name in pending:
            chain = self.chains[name]
            source = chain.following(name in self.errors, lambda source: self._applies(source, plan.layouts))
            if source is None:
                raise self._refusal(name)
            if not (source.added and plan.added() != added):
                plan.sources[name] = chain.move(source, name in self.errors)
        if plan.added() != added:
            try:
                one, few = (self._forward(batch, plan.added()) for batch in (self.examples.one, self.examples.few))
                plan.layouts = self._layouts(one, few)
            except Exception:  # the rest of the model can't do with another axis, and will say so when it is compared
                return
            for name in pending:
                if not self.chains[name].was_added:
                    plan.sources[name] = self.chains[name].restart()

    def _refusal(self, name: str) -> Exception:
        if isinstance(reason := self.reasons.get(name), NotImplementedError):
            return reason
        kind = type(self.model.get_submodule(name)).__name__
        refusal = NotImplementedError(
            f"Gradients of single examples by the parameters of layer {name!r} ({kind}) can't be computed: run one by "
            "one, the examples give other gradients than in a batch, where they influence each other (normalization "
            "over the batch?), or the layer can't be run again with other parameters (kept by `function` from outside, "
            "for torch.func.functional_call?). Leave it out by `layer_collection="
            "LayerCollection.from_model(model, layers=...)`."
        )
        refusal.__cause__ = self.errors.get(name)
        return refusal

    def _applies(self, source: Source, layouts: Layouts) -> bool:
        """Whether a source can give anything else than the ones before it."""
        calls = [call for host in source.hosts for call in layouts[host]]
        if source.position_major:
            return any(layout.entries > 1 for call in calls for layout in call[1])
        if source.added:
            return any(layout.axis is None for call in calls for layout in call[1])
        return not source.hosts or bool(calls)

    def _layouts(self, one: Forward, few: Forward) -> Layouts:
        """Where the examples are: the axis that grows with their number. Modules where there is none are banned."""
        self.banned |= one.seen.inside | few.seen.inside
        layouts: Layouts = {}
        for name in self.names:
            single, several = one.seen.calls[name], few.seen.calls[name]
            layouts[name] = [self._layout(name, first, second) for first, second in zip(single, several, strict=False)]
            if len(single) != len(several):
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


class Trial:
    """The gradients that a plan's sources give on a few examples, held to the truth."""

    def __init__(self, by: Accounting, plan: Plan, truth: Truth, few: Forward):
        self.by, self.plan, self.truth = by, plan, truth
        self._added: set[str] = set()
        self._forward: Forward = few
        self._grads: Pulled | None = None

    def wrong(self, pending: list[str]) -> list[str]:
        """The layers whose gradients differ from autograd's; notes the errors that they raise."""
        self.by.errors = {}
        return self._wrong(self.plan, pending)

    def determined(self) -> set[str]:
        """The layers that the examples reach.

        Those, too, whose gradients are small beside others', as in deep networks, but agree in all digits.
        """
        found = {name for name in self.by.layers if self.truth.determines(name)}
        if len(found) == len(self.by.layers):
            return found
        (recording, grads), shared = self._recorded(self.plan), Shared()
        records = (
            (name, recording.record_of(name, grads, self.truth.cotangents[1:], shared))
            for name in self.by.layers
            if name not in found
        )
        return found | {name for name, record in records if self.truth.agrees_precisely(name, record)}

    def _wrong(self, plan: Plan, pending: list[str]) -> list[str]:
        changed = [name for name in pending if plan.sources[name].added]
        try:
            recording, grads = self._recorded(plan)
            same = torch.allclose(recording.outputs, self.truth.outputs, rtol=1e-3, atol=1e-5)
        except Exception as error:
            if not changed:
                raise
            # The rest of the model can't do with outputs that have an axis of examples.
            same, self.by.errors = False, dict.fromkeys(changed, error)
        if changed and not same:
            rest = [name for name in pending if name not in changed]
            without = {name: replace(s, added=s.added and name not in changed) for name, s in plan.sources.items()}
            return changed + (self._wrong(replace(plan, sources=without), rest) if rest else [])
        shared: Shared = {}
        return [name for name in pending if not self._agrees(recording, name, grads, shared)]

    def _recorded(self, plan: Plan) -> tuple[Recording, Pulled]:
        """The few examples by a plan, and the gradients at all modules; run again where outputs get another axis."""
        if plan.added() != self._added:
            self._forward, self._grads = self.by._forward(self._forward.batch, plan.added()), None
            self._added = plan.added()
        recording = Recording(self.by.model, self.by.function, self.by.layers, plan, self._forward)
        if self._grads is None:
            try:
                self._grads = recording.pull(self.truth.cotangents, retain=True)
            except RuntimeError:  # the backward pass can't be vectorised: cotangents are pulled one by one
                self.plan.batched = plan.batched = False
                self._grads = recording.pull(self.truth.cotangents, retain=True)
            # Two, so that the pass is as vectorised as it will be; one tells all that there is to know.
            self._grads = {
                name: [[None if g is None else g[1:] for g in call] for call in calls]
                for name, calls in self._grads.items()
            }
        return recording, self._grads

    def _agrees(self, recording: Recording, name: str, grads: Pulled, shared: Shared) -> bool:
        try:
            return self.truth.agrees(name, recording.record_of(name, grads, self.truth.cotangents[1:], shared))
        except Exception as error:  # whatever a module raises when it is run in a way it was not made for
            self.by.errors[name] = error
            self.by.reasons.setdefault(name, error)
            return False
