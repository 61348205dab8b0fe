"""How many examples are run at a time: mini-batches are joined where they are small, and split where they are large."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from nngeo.generators.batches import Batch
from nngeo.generators.independence import FEW
from nngeo.generators.plans import Planner
from nngeo.generators.recording import Recording
from nngeo.variants import Cotangents, Estimator

# Elements of gradients at the layers' outputs that one backward pass may hold (2**25 are 128 MiB in float32), and at
# one of them: beyond 32 MiB the C library takes memory for each tensor anew from the system, which costs time.
BUDGET = 2**25
LARGEST = 2**22

# A block that glibc takes from the system by itself: 32 MiB less 64 KiB.
BLOCK = 2**25 - 2**16

# Examples whose forward is run together even where the gradients of all cotangents would not fit.
TOGETHER = 8

# The part of the budget up to which small mini-batches are joined, and the elements of their inputs.
JOINED = 1 / 2
INPUTS = 2**18


def load(recording: Recording) -> float:
    """What one cotangent takes of what one backward pass may hold."""
    return max(recording.elements() / BUDGET, recording.largest() / LARGEST)


class Measure(Protocol):
    """What is known of the batches of a model."""

    def load(self, batch: Batch) -> float:
        """What one example of a batch takes of a budget."""

    def apart(self, batch: Batch) -> Sequence[bool]:
        """Which leaves of the first batch of this kind had one entry for each example.

        A tensor that all examples share may be as long as a later batch.
        """


@dataclass(frozen=True)
class OfRecords:
    """A measure of the gradients of all cotangents; found out on a few examples, once for each shape."""

    planner: Planner
    estimator: Estimator
    targets: Callable[[Batch], tuple]

    def load(self, batch: Batch) -> float:
        known, key = self.planner.plan(batch).loads, (self.estimator.kind, tuple(batch.shapes()))
        if key not in known:
            few = batch.parts(FEW, self.apart(batch))[0]
            recording = self.planner.record(few)
            count = self.estimator.count(recording.outputs.detach(), self.targets(few))
            known[key] = load(recording) * count / few.size
            self.planner.keep(recording)
        return known[key]

    def apart(self, batch: Batch) -> Sequence[bool]:
        return self.planner.plan(batch).apart


class Sizing:
    """How the mini-batches of a sweep are put together.

    Examples are independent, so that they can be run in other company than the loader's. Cotangents are those of the
    loader's mini-batches as long as these are not split: draws are made for a whole one.

    Args:
        splits: whether large mini-batches may be split.
        joins: whether small ones may be joined.
    """

    def __init__(self, measure: Measure, splits: bool, joins: bool):
        self._measure, self._splits, self._joins = measure, splits, joins

    def groups(self, batches: Iterable[Batch]) -> Iterator[list[Batch]]:
        """What is run at a time: small neighbours of the same shapes, one mini-batch, or a part of it."""
        # Once such a block is free, glibc keeps smaller ones instead of taking them anew each time.
        torch.empty(BLOCK, dtype=torch.uint8, device="cpu")
        waiting: list[Batch] = []
        taken = 0.0
        for batch in batches:
            fraction = self._fraction(batch)
            like = bool(waiting) and waiting[0].kind == batch.kind and waiting[0].shapes() == batch.shapes()
            if waiting and not (like and taken + fraction <= 1):
                yield waiting
                waiting, taken = [], 0.0
            if fraction <= 0.5:
                waiting.append(batch.copied())  # a loader may fill the same tensors again
                taken += fraction
            else:
                yield from ([part] for part in self._parts(batch))
        if waiting:
            yield waiting

    def _parts(self, batch: Batch) -> list[Batch]:
        if not self._splits or batch.size <= TOGETHER:
            return [batch]
        return batch.parts(max(TOGETHER, int(1 / max(self._measure.load(batch), 1e-9))), self._measure.apart(batch))

    def _fraction(self, batch: Batch) -> float:
        """What a mini-batch takes of a group of small ones."""
        elements = sum(tensor.numel() for tensor in batch.tensors())
        apart = [*self._measure.apart(batch), *batch.apart()]
        if not self._joins or 2 * elements > INPUTS or not all(apart):
            return 1.0
        return max(batch.size * self._measure.load(batch) / JOINED, elements / INPUTS)


def joined(cotangents: list[Cotangents], sizes: list[int]) -> Cotangents:
    """Join several mini-batches, of these sizes, into one."""
    if len(cotangents) == 1:
        return cotangents[0]

    def products(v: Tensor) -> Tensor:
        return torch.cat([c.contracted(part[None])[0] for c, part in zip(cotangents, v.split(sizes), strict=True)], 1)

    return Cotangents(
        cotangents[0].count,
        lambda start, stop: torch.cat([c.chunk(start, stop) for c in cotangents], 1),
        lambda v: torch.cat([c.metric(part) for c, part in zip(cotangents, v.split(sizes), strict=True)]),
        None if any(c.products is None for c in cotangents) else products,
    )
