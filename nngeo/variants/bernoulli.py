"""Yes or no, from one logit for each decision."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from nngeo.variants.base import Cotangents, Variant, aligned, keep, working
from nngeo.variants.registry import register_variant


@register_variant("classif_binary_logits")
class BinaryLogits(Variant):
    """Independent zeros and ones whose log-odds are the outputs, of any shape (b, ...): the metric is p (1 - p)."""

    by_example = True
    reads_targets = False

    def exact(self, outputs: Tensor, targets: tuple[Any, ...] = (), mask: Tensor | None = None) -> Cotangents:
        z = working(outputs)
        root = ((logsigmoid(z) + logsigmoid(-z)) / 2).exp()
        return Cotangents.diagonal(keep(self.counted(outputs, targets, mask), root), outputs.dtype)

    def sample(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        return torch.bernoulli(working(outputs).sigmoid(), generator=generator)

    def gradient(self, outputs: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        z, counted = working(outputs), self.counted(outputs, (), mask)
        y = keep(counted, aligned(target, z, self.name))
        if not bool(((y >= 0) & (y <= 1)).all()):
            raise ValueError(
                f"Variant {self.name!r} needs targets from 0 to 1; found {y.min().item()} to {y.max().item()}."
            )
        # p - y, in the two terms that do not cancel for large logits.
        return keep(counted, (1 - y) * z.sigmoid() - y * (-z).sigmoid()).to(outputs.dtype)
