"""Robust multi-task learning with excess risks (ExcessMTL: He et al., 2024)."""

from __future__ import annotations

import torch
from torch import Tensor

from nngeo.descent.aggregation.base import RowWeighting, WeightedAggregator
from nngeo.descent.aggregation.options import number
from nngeo.descent.aggregation.stateful import Memory


class ExcessMTLWeighting(Memory, RowWeighting):
    """Weights by exponentiated gradient steps on excess risks `sum_j J_ij^2 / sqrt(S_ij)`, S the sum of J^2 so far.

    From the Jacobian (m, n) itself. Remembers the roots of S, of its size; forgets where that size changes.

    Args:
        robust_step_size: of the step on the excess risks, relative to the first ones.
        n_warmup_steps: so many calls give weights 1/m and, by their mean, the risks that later ones are relative to.
            With 0, those of the first call are, which itself is not scaled.
    """

    differentiable = False
    robust_step_size = number(0, open_ends="lowest")
    n_warmup_steps = number(0, whole=True)

    def __init__(self, robust_step_size: float = 1.0, n_warmup_steps: int = 0) -> None:
        super().__init__()
        self.robust_step_size = robust_step_size
        self.n_warmup_steps = n_warmup_steps

    def weights(self, matrix: Tensor) -> Tensor:
        m = len(matrix)
        w, lengths, first, steps = self.recall(
            matrix,
            tuple(matrix.shape),
            w=matrix.new_full((m,), 1 / m),
            lengths=torch.zeros_like(matrix),
            first=matrix.new_zeros(m),
            steps=0,
        )
        lengths = torch.hypot(lengths, matrix)  # squares of large or small entries leave the range of float32
        risk = torch.where(lengths > 0, matrix.abs() * (matrix.abs() / lengths), 0).sum(1)
        self.remember(lengths=lengths, steps=steps + 1)
        if steps < max(self.n_warmup_steps, 1):
            first = first + risk / max(self.n_warmup_steps, 1)
            self.remember(first=first)
            if self.n_warmup_steps:
                return w
        else:
            risk = torch.where(first > 0, risk / first, risk)
        # Equation 9 in logarithms: a large excess risk saturates rather than overflows.
        w = (w.log() + self.robust_step_size * risk).softmax(0)
        self.remember(w=w)
        return w


class ExcessMTL(WeightedAggregator, of=ExcessMTLWeighting):
    """More weight for losses that are further from their optimum, with curvature estimated by squared gradients.

    "Robust multi-task learning with excess risks" (He et al., 2024), equations 6, 7 and 9. Stateful.

    >>> import torch
    >>> ExcessMTL()(torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]))
    tensor([4.8080, 1.0000, 1.0000])
    """
