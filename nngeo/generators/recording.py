"""One forward of one mini-batch, watched, and the records that backward passes take from it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
import torch.fx.experimental.symbolic_shapes  # noqa: F401 (torch does it in the first backward pass of a cotangent)
from torch import Tensor, nn

from nngeo.generators.batches import Batch, Function
from nngeo.generators.independence import run
from nngeo.generators.outputs import random_like
from nngeo.generators.padding import Padding, Pulled
from nngeo.generators.record import BatchRecord, LayerRecord
from nngeo.generators.sources import (
    Replay,
    Source,
    Uses,
    View,
    fast_gradients,
    full_precision,
    generic_gradients,
    whole_gradients,
)
from nngeo.generators.untouched import Snapshot
from nngeo.generators.watch import Call, Layout, LayoutChanged, Watch, watch
from nngeo.layers.collection import Layer, LayerCollection
from nngeo.layers.rule import Computed, Gradients, LinearMapRule, assemble, rule_for
from nngeo.layers.turn import TURN

Layouts = dict[str, list[tuple[list[Layout], list[Layout]]]]  # by module, for each call: of arguments, of outputs


Shared = dict[tuple, Callable[[], dict[str, Tensor]]]  # what the generic rule finds at a call, for all its layers


@dataclass
class Plan:
    """How the records of a model are made: for each layer a source, for each module the layouts of its tensors."""

    uses: dict[str, Uses]
    sources: dict[str, Source]
    layouts: Layouts = field(default_factory=dict)
    batched: bool = True  # whether the backward pass can be vectorised over cotangents
    unused: list[str] = field(default_factory=list)  # parameters that the outputs do not depend on
    undetermined: set[str] = field(default_factory=set)  # layers that no example has reached so far
    rounding: float = 0.0  # what is as good as zero in an entry of a gradient
    routed: bool = False  # whether rows are picked by tensors, so that each batch has to be tested
    reads: bool = False  # whether Python reads values of tensors: each batch has to be tested, too
    shapes: list[torch.Size] = field(default_factory=list)  # of the tensors of one example, in the batch it was made on
    apart: list[bool] = field(default_factory=list)  # the leaves of that batch with one entry for each of its examples
    failed: bool = False  # whether something was raised where it was followed: it is not to be used again
    loads: dict[Any, float] = field(default_factory=dict)  # what an example takes of a backward pass's budget

    @contextmanager
    def followed(self) -> Iterator[None]:
        """An error inside means that the plan is not to be used again."""
        try:
            yield
        except Exception:
            self.failed = True
            raise

    def hosts(self) -> set[str]:
        """The modules to watch."""
        return {host for source in self.sources.values() for host in source.hosts}

    def added(self) -> set[str]:
        """The modules whose outputs, the same for all examples, get an axis of examples."""
        return {host for source in self.sources.values() if source.added for host in source.hosts}

    def names(self, layer: Layer, host: str) -> dict[str, str]:
        """{parameter's name in the host: its name in the layer}."""
        if host in self.sources[layer.name].hosts and host in self.uses[layer.name]:
            return self.uses[layer.name][host]
        prefix = f"{host}." if host else ""
        return {layer.full_name(local).removeprefix(prefix): local for local in layer.shapes}

    def layouts_of(self, host: str, call: int) -> tuple[list[Layout], list[Layout]]:
        """The layouts of a call; one more call than in the first batch is read as the last there."""
        known = self.layouts[host]
        return known[min(call, len(known) - 1)]


@dataclass(frozen=True)
class Forward:
    """Outputs of one mini-batch, with their graph, and the calls of the watched modules that led to them."""

    batch: Batch
    outputs: Tensor
    seen: Watch

    @classmethod
    def of(
        cls,
        model: nn.Module,
        function: Function | None,
        batch: Batch,
        hosts: Collection[str],
        added: Collection[str] = (),
        before: Snapshot | None = None,
    ) -> Forward:
        """Run a model on a batch; outputs of the modules in `added` get an axis of examples."""
        with TURN, watch(model, hosts, batch.size, added) as seen:
            return cls(batch, run(model, function, batch, before), seen)


class Recording:
    """Outputs of one mini-batch, and the calls that led to them."""

    def __init__(self, model: nn.Module, function: Function | None, layers: LayerCollection, plan: Plan, by: Forward):
        self.model, self.layers, self.plan, self.batch = model, layers, plan, by.batch
        self.replay = Replay(model, function)
        self.seen, self.outputs = by.seen, by.outputs
        self.like = full_precision(self.outputs.detach())
        for host in plan.hosts():
            if host in self.seen.inside:
                raise LayoutChanged(host)
            for j, call in enumerate(self.seen.calls[host]):
                self._check_layout(host, j, call)

    def _check_layout(self, host: str, j: int, call: Call) -> None:
        """Raise LayoutChanged where the plan may misread a call.

        Positions folded into the batch may be more or fewer with other inputs, but not with inputs of the same shape:
        then which rows belong to an example depends on the data. Where there was one, their order is not known.
        """
        if not self.plan.layouts.get(host):
            raise LayoutChanged(host)
        arguments, outputs = self.plan.layouts_of(host, j)
        for layout, shape in zip([*arguments, *outputs], [*call.argument_shapes(), *call.returned], strict=False):
            if layout.axis is None or shape is None:
                continue
            shape = layout.whole(shape)
            size, b = shape[layout.axis] if layout.axis < len(shape) else 0, self.batch.size
            if size == layout.entries * b:
                continue
            if size % b or size == 0 or layout.entries == 1 or self.plan.shapes == self.batch.shapes():
                raise LayoutChanged(host)

    def elements(self) -> int:
        """The size of the gradients that one cotangent leaves at all watched modules."""
        return sum(self._sizes())

    def largest(self) -> int:
        """The size of the largest of these gradients."""
        return max(self._sizes(), default=0)

    def _sizes(self) -> list[int]:
        calls = [call for found in self.seen.calls.values() for call in found]
        return [shape.numel() for call in calls for shape in call.shapes if shape is not None]

    def pull(self, c: Tensor, retain: bool) -> Pulled:
        """Gradients (k, ...) at every output of every call of the watched modules, from cotangents c (k, b, ...)."""
        calls = [(name, call) for name, found in self.seen.calls.items() for call in found]
        edges = [edge for _, call in calls for edge in call.outputs if edge is not None]
        if not edges or not self.outputs.requires_grad:
            flat: list[Tensor | None] = [None] * len(edges)
        elif self.plan.batched and len(c) > 1:
            flat = list(_backward(self.outputs, edges, c, retain, batched=True))
        else:
            last = len(c) - 1
            rows = [_backward(self.outputs, edges, row, retain or j < last, batched=False) for j, row in enumerate(c)]
            flat = [None if row[0] is None else _stacked(row) for row in zip(*rows, strict=True)]
        found: Pulled = {name: [] for name in self.seen.calls}
        for name, call in calls:
            found[name].append([None if edge is None else flat.pop(0) for edge in call.outputs])
        return found

    def records(
        self,
        c: Tensor,
        *,
        first: bool = True,
        retain: bool = False,
        count: int | None = None,
        padding: Padding | None = None,
    ) -> BatchRecord:
        """What cotangents c (k, b, ...), of `count` in all, leave at every layer; with `retain` more may follow."""
        with self.plan.followed():
            grads = self.pull(c, retain)
            shared: Shared = {}
            records = {name: self.record_of(name, grads, c, shared, first, padding) for name in self.layers}
        return BatchRecord(records, self.batch.size, first, count or len(c))

    def record_of(
        self, name: str, grads: Pulled, c: Tensor, shared: Shared, first: bool = True, padding: Padding | None = None
    ) -> LayerRecord:
        """One layer's record, from what `pull` returned for cotangents c."""
        layer, source, like = self.layers[name], self.plan.sources[name], self.like
        parts = self._parts(layer, source, grads, c, shared, padding) or self._nothing(layer, source, len(c), like)
        return LayerRecord(layer, parts, self.batch.size, len(c), first, like)

    def reaching(self, names: Collection[str], rounding: float) -> tuple[list[int], set[str]]:
        """Up to two examples on which the outputs have gradients by some of these layers, and these layers.

        None in most batches.
        """
        found, reached = list[int](), set[str]()
        if not names or not self.outputs.requires_grad:
            return found, reached
        if not self._reached(names, noise := random_like(self.outputs), rounding):
            return found, reached
        for e in range(self.batch.size):
            alone = torch.zeros_like(noise)
            alone[e] = noise[e]
            if by_it := self._reached(names, alone, rounding):
                found.append(e)
                reached |= by_it
            if len(found) == 2:
                break
        return found, reached

    def _reached(self, names: Collection[str], c: Tensor, rounding: float) -> set[str]:
        layers = LayerCollection(self.layers[name] for name in names)
        by_layer = [
            (name, list(LayerCollection([layer]).parameters(self.model))) for name, layer in layers.layers.items()
        ]
        wanted = [(name, p) for name, parameters in by_layer for p in parameters if p.requires_grad]
        if not wanted:
            return set()
        with TURN:
            grads = torch.autograd.grad(self.outputs, [p for _, p in wanted], c, retain_graph=True, allow_unused=True)
        pairs = zip(wanted, grads, strict=True)
        return {name for (name, _), g in pairs if g is not None and bool(g.norm() > rounding)}

    def _parts(
        self, layer: Layer, source: Source, grads: Pulled, c: Tensor, shared: Shared, padding: Padding | None
    ) -> list[Gradients]:
        if not source.hosts:
            compute = partial(whole_gradients, self.replay, self.batch, c, source, self._wanted(source, ""))
            return [self._picked(layer, "", shared.setdefault((source,), cache(compute)))]
        parts = []
        for host in source.hosts:
            module, names = self.model.get_submodule(host), self.plan.names(layer, host)
            for j, (view, call, g) in enumerate(self.views(host, source, grads[host])):
                call.check_unchanged(host)
                if source.fast:
                    part = every = fast_gradients(module, call, view, g, layer, names)
                    if padding is not None:
                        if padding.gradients is not None:
                            *_, g = [*self.views(host, source, padding.gradients()[host])][j]
                            every = fast_gradients(module, call, view, g, layer, names)
                        part = padding.without(part, every)
                    parts.append(part)
                    continue
                compute = partial(generic_gradients, module, call, view, g, self._wanted(source, host))
                parts.append(self._picked(layer, host, shared.setdefault((host, j, source), cache(compute))))
        return parts

    def views(self, host: str, source: Source, grads: list) -> Iterator[tuple[View, Call, list[Tensor | None]]]:
        """The calls of a host on which the outputs depend, with how to read them, and the gradients there."""
        for j, (call, g) in enumerate(zip(self.seen.calls[host], grads, strict=True)):
            if any(grad is not None for grad in g):
                yield View(source, *self.plan.layouts_of(host, j), self.batch.size), call, g

    def _wanted(self, source: Source, host: str) -> list[str]:
        """The host's parameters that some layer with this source needs: they are computed together."""
        layers = [self.layers[name] for name, other in self.plan.sources.items() if other == source]
        return [name for layer in layers for name in self.plan.names(layer, host)]

    def _picked(self, layer: Layer, host: str, compute: Callable[[], dict[str, Tensor]]) -> Gradients:
        """A layer's gradients among those by all parameters wanted from a module."""
        plan, names = self.plan, self.plan.names(layer, host)

        def dense() -> Tensor:
            with plan.followed():
                found = compute()
            like = next(iter(found.values()))
            return assemble(layer, {names[name]: found[name] for name in names}, like.shape[:2], like)

        return Computed(dense)

    def _nothing(self, layer: Layer, source: Source, k: int, like: Tensor) -> list[Gradients]:
        if not source.fast:
            return []
        module = self.model.get_submodule(source.hosts[0])
        rule = rule_for(module)
        return [rule.nothing(module, layer, k, self.batch.size, like)] if isinstance(rule, LinearMapRule) else []


def _stacked(rows: Sequence[Tensor]) -> Tensor:
    return rows[0][None] if len(rows) == 1 else torch.stack(tuple(rows))


def _backward(outputs: Tensor, edges: list, c: Tensor, retain: bool, batched: bool) -> tuple[Tensor | None, ...]:
    try:
        with TURN:  # activation checkpointing runs the model again
            return torch.autograd.grad(
                outputs, edges, c, retain_graph=retain, is_grads_batched=batched, allow_unused=True
            )
    except RuntimeError as error:
        if "donated" not in str(error):
            raise
        raise NotImplementedError(
            "A compiled model frees what a second backward pass needs. Give the model that was compiled: "
            "model._orig_mod."
        ) from error
