"""Positions that a mask leaves out: at a layer that has them, they enter neither its factors nor their number."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from nngeo.layers.rule import Factored, Gradients

Pulled = dict[str, list[list[Tensor | None]]]  # by module, for each call: gradients (k, ...) at its outputs


@dataclass(frozen=True)
class Padding:
    """The masks of a mini-batch, and which gradients say whether a position acts on what counts.

    A layer's position is left out where a mask leaves it out *and* no cotangent has a gradient there. So a position is
    kept that acts on others, as one through a convolution or through attention that knows of no mask; and a layer whose
    positions are others, as many by chance, keeps them.
    """

    masks: Sequence[Tensor]  # (b, *positions), True for what is left out
    gradients: Callable[[], Pulled] | None = None  # of all cotangents; None: the records have all of them

    def without(self, part: Gradients, every: Gradients) -> Gradients:
        """A layer's gradients without these positions; `every` are those that say which positions act."""
        if not isinstance(part, Factored) or not isinstance(every, Factored):
            return part
        counted = partial(self._counted, every.products.g)
        return replace(part, products=part.products.with_counted(counted))

    def _counted(self, g: Tensor) -> Tensor | None:
        """(b, t), True for the positions that count, from gradients (n, k, b, t, o); None where all do."""
        silent = (g == 0).all(-1).all(1).all(0)
        left_out = torch.zeros_like(silent)
        for mask in self.masks:
            if mask.shape[1:].numel() == silent.shape[1]:
                left_out |= mask.reshape(silent.shape) & silent
            else:
                fitting = (at for at in _aligned(mask, silent.shape[1]) if not (at & ~silent).any())
                left_out |= next(fitting, torch.zeros_like(silent))
        return ~left_out if bool(left_out.any()) else None


def _aligned(mask: Tensor, t: int) -> Iterator[Tensor]:
    """(b, t), ways to read a mask (b, *positions) as one of t positions: with further axes, or without some of its own.

    Where axes are missing, a position is left out if all of it is.
    """
    flat = mask.flatten(1) if mask.ndim > 1 else mask[:, None]
    if t % flat.shape[1] == 0:
        yield flat.repeat_interleave(t // flat.shape[1], 1)
        yield flat.repeat(1, t // flat.shape[1])
    axes = mask.ndim - 1
    for start in range(axes):
        for stop in range(start + 1, axes + 1):
            if stop - start < axes and math.prod(mask.shape[1 + start : 1 + stop]) == t:
                inner = mask.flatten(1 + stop).all(-1) if stop < axes else mask
                yield inner.flatten(1, start).all(1).flatten(1) if start else inner.flatten(1)
