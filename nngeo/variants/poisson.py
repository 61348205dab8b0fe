"""Counts, from the logarithm of their rate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nngeo.variants.base import Cotangents, Variant, aligned, keep, working
from nngeo.variants.registry import register_variant


@register_variant("poisson_log_rate")
class PoissonLogRate(Variant):
    """Independent counts whose log-rates are the outputs, of any shape (b, ...): the metric is the rate."""

    by_example = True
    reads_targets = False

    def exact(self, outputs: Tensor, targets: tuple[Any, ...] = (), mask: Tensor | None = None) -> Cotangents:
        root = (working(outputs) / 2).exp()
        return Cotangents.diagonal(keep(self.counted(outputs, targets, mask), root), outputs.dtype)

    def sample(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        return torch.poisson(working(outputs).exp(), generator=generator)

    def gradient(self, outputs: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        log_rate, counted = working(outputs), self.counted(outputs, (), mask)
        counts = keep(counted, aligned(target, log_rate, self.name))
        if not bool((counts >= 0).all()):
            raise ValueError(f"Variant {self.name!r} needs targets that are counts; found {counts.min().item()}.")
        return keep(counted, log_rate.exp() - counts).to(outputs.dtype)
