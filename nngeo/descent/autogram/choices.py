"""The ways to get a layer's gradients from the calls of modules, and where each of them takes the examples to be."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn

from nngeo.descent.autogram.graph import Use
from nngeo.generators.sources import Source, Uses, View, candidates
from nngeo.generators.watch import Layout
from nngeo.layers.collection import Layer

Reading = Literal["first", "second", "folded", "none"]


@dataclass(frozen=True)
class Choice:
    """A source, and its reading of tensors: where the axis of examples is. Without hosts: the graph itself.

    Outputs that are the same for all examples, such as those of a position embedding, get a gradient for each where
    they are added to something that differs: `above` counts the operations up to there.
    """

    source: Source
    reading: Reading = "folded"
    above: int = 0

    @property
    def by_rows(self) -> bool:
        """Whether autograd gives the gradients, by a backward pass for each loss."""
        return not self.source.hosts and not self.source.fast

    def view(self, use: Use, b: int, examples: slice = slice(None)) -> View:
        """How the tensors of a call are read."""
        arguments = [_layout(shape, b, self.reading) for shape in use.call.argument_shapes()]
        outputs = [_layout(shape, b, self.reading) for shape in use.call.returned]
        return View(self.source, arguments, outputs, b, examples)

    @property
    def in_graph(self) -> bool:
        """Whether the gradients come from products that are found in the graph."""
        return not self.source.hosts and self.source.fast and not self.above

    @property
    def in_sums(self) -> bool:
        """Whether the gradients come from sums to which the parameters themselves are added."""
        return not self.source.hosts and self.above > 0


ABOVE = 3
IN_GRAPH = [Choice(Source((), fast=True, position_major=major)) for major in (False, True)]
IN_SUMS = Choice(Source((), fast=True), "none", 1)
ROWS = Choice(Source(()))


def choices(layer: Layer, uses: Uses, model: nn.Module, whole: bool) -> Iterator[Choice]:
    """From the cheapest to the one that is always right.

    With `whole`, for losses of the batch, only the rules of layers compete with autograd: it needs a backward pass for
    each loss in any case.
    """
    fast = [source for source in candidates(layer, uses, model) if source.fast]
    yield from _of_modules(fast, whole)
    yield from IN_GRAPH
    if not whole:
        yield IN_SUMS
    yield from _of_modules((source for source in candidates(layer, uses, model) if not source.fast), whole)
    yield ROWS


def _of_modules(sources: Iterable[Source], whole: bool) -> Iterator[Choice]:
    for source in sources:
        if source.added and source.fast and not whole:
            yield from (Choice(source, "none", above) for above in range(1, ABOVE + 1))
        if source.added or not source.hosts or (whole and (source.position_major or not source.fast)):
            continue
        readings: tuple[Reading, ...] = ("folded",) if whole or source.position_major else ("first", "second", "folded")
        for reading in readings:
            yield Choice(source, reading)
            if not source.fast:
                yield Choice(replace(source, vectorized=False), reading)


def _layout(shape: torch.Size | None, b: int, reading: Reading) -> Layout:
    if not shape or reading == "none":
        return Layout(None)
    if reading == "folded" and shape[0] and shape[0] % b == 0:
        return Layout(0, entries=shape[0] // b)
    axes = [axis for axis, size in enumerate(shape) if size == b]
    if not axes:
        return Layout(None)
    return Layout(1 if reading == "second" and 1 in axes else axes[0])
