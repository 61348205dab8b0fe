"""Classes, from log-probabilities."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nngeo.variants.base import Cotangents, Variant, keep, working
from nngeo.variants.classes import check_classes, class_indices, draw, in_range
from nngeo.variants.registry import register_variant


@register_variant("classif_logsoftmax")
class ClassifLogSoftmax(Variant):
    """One class for each example, from log-probabilities (b, C): the metric is diag(p).

    With log_softmax as the last layer, the matrix over parameters is that of classif_logits on the logits.
    """

    by_example = True
    reads_targets = False

    def exact(self, outputs: Tensor, targets: tuple[Any, ...] = (), mask: Tensor | None = None) -> Cotangents:
        counted = self.counted(outputs, targets, mask)
        root = (working(outputs) / 2).exp()
        return Cotangents.diagonal(keep(None if counted is None else counted[:, None], root), outputs.dtype)

    def sample(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        return draw(working(outputs).exp()[:, None], generator)[:, 0]

    def gradient(self, outputs: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        index = class_indices(self, target, outputs)
        counted = self.counted(outputs, (), mask)
        counted = None if counted is None else counted[:, None]
        index = in_range(index, counted, outputs.shape[1], self.name)
        return keep(counted, torch.zeros_like(outputs).scatter(1, index, -1))

    def n_output(self, outputs: Tensor) -> int:
        return outputs.shape[1]

    def positions(self, outputs: Tensor) -> torch.Size:
        return outputs.shape[:1]

    def validate(self, outputs: Tensor) -> None:
        super().validate(outputs)
        if outputs.ndim != 2:
            raise ValueError(
                "Variant 'classif_logsoftmax' needs log-probabilities (b, class); "
                f"found outputs of shape {tuple(outputs.shape)}."
            )
        check_classes(self, outputs)
        total = working(outputs).logsumexp(1).exp()
        error = (total - 1).abs()
        if bool((error > 4 * (outputs.shape[1] * torch.finfo(outputs.dtype).eps) ** 0.5).any()):
            raise ValueError(
                "Variant 'classif_logsoftmax' needs log-probabilities, whose exponentials sum to one; found a sum of "
                f"{total[error.argmax()].item():.4g}. Apply log_softmax, or use 'classif_logits' for logits."
            )
