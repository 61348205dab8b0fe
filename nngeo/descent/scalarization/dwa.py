"""Weights by how slowly the losses fell in the last epochs (DWA: Liu et al., 2019)."""

from __future__ import annotations

import torch
from torch import Tensor

from nngeo.descent.aggregation.options import number
from nngeo.descent.aggregation.stateful import Memory
from nngeo.descent.scalarization.base import Scalarizer


class DWA(Memory, Scalarizer):
    """`m sum_i w_i L_i`, w the softmax of the ratios of each loss in the last two epochs, divided by a temperature.

    "End-to-end multi-task learning with attention" (Liu et al., 2019), equation 7. Call `step()` at the end of every
    epoch. The weights are 1 in the first two. Remembers the mean losses of two epochs; `state_dict()` has them.

    Args:
        temperature: a larger one makes the weights more alike; 2 in the paper.

    >>> dwa = DWA()
    >>> for losses in ([4.0, 4.0], [1.0, 4.0], [1.0, 1.0]):  # epochs of one batch
    ...     print(f"{dwa(torch.tensor(losses)):.4f}")
    ...     dwa.step()
    8.0000
    5.0000
    2.0000
    """

    temperature = number(0, open_ends="lowest")

    def __init__(self, temperature: float = 2.0) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, values: Tensor, /) -> Tensor:
        known = self.memory.get("shape", tuple(values.shape))
        if known != tuple(values.shape):
            raise ValueError(
                f"The losses have the shape {tuple(values.shape)}, and had {known} before: call reset() for others."
            )
        fresh = values.new_zeros(values.shape)
        total, n, last, older, epochs = self.recall(values, known, total=fresh, n=0, last=fresh, older=fresh, epochs=0)
        self.remember(total=total + values.detach(), n=n + 1)
        if epochs < 2:
            return values.sum()
        if not older.all():
            raise ValueError(
                "The mean of a loss over an epoch is zero: there is no ratio to its next one. Call reset()."
            )
        weights = (last / older / self.temperature).flatten().softmax(0).view_as(values)
        return values.numel() * (weights * values).sum()

    def step(self) -> None:
        """End an epoch; nothing happens where no losses have come since the last one."""
        if self.memory.get("n"):
            mean, last, epochs = (self.memory[name] for name in ("total", "last", "epochs"))
            self.remember(older=last, last=mean / self.memory["n"], epochs=epochs + 1)
            self.remember(total=torch.zeros_like(mean), n=0)
