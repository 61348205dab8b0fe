"""Losses that fall at one relative rate, by their values alone (FAMO: Liu et al., 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy

import torch
from torch import Tensor

from nngeo.descent.aggregation.options import number
from nngeo.descent.aggregation.stateful import Memory
from nngeo.descent.scalarization.base import Scalarizer, losses_like, matching
from nngeo.linalg.arguments import sizes
from nngeo.linalg.precision import full_precision

EPS = 1e-8  # added to losses whose logarithm is taken


class FAMO(Memory, Scalarizer):
    """`c sum_i z_i log(L_i - b_i)` with `z = softmax(w)` and `1/c = sum_i z_i / (L_i - b_i)`, both without a graph.

    "FAMO: fast adaptive multitask optimization" (Liu et al., 2023), algorithm 1. The logits w follow by Adam what each
    logarithm fell in a step of the model: after it, give the same batch's new losses to `update()`. Remembers w and
    the state of Adam; `state_dict()` has them, and there is nothing in `parameters()`.

    Args:
        shape: of the losses; n for (n,).
        min_losses: b, lower bounds of the losses; zero if None.
        lr: of Adam.
        weight_decay: of Adam. 1e-3 is that of the paper's algorithm.

    >>> famo = FAMO(2)
    >>> famo(torch.tensor([1.0, 3.0]))  # c = 1.5
    tensor(0.8240)
    >>> famo.update(torch.tensor([0.5, 2.9]))  # the second one fell less: it gets more weight
    """

    min_losses = losses_like(optional=True)
    lr = number(0)
    weight_decay = number(0)

    def __init__(
        self,
        shape: int | Sequence[int],
        min_losses: Tensor | None = None,
        lr: float = 0.025,
        weight_decay: float = 1e-3,
    ) -> None:
        super().__init__()
        self.shape = sizes("shape", shape)
        self.min_losses = min_losses
        self.lr = lr
        self.weight_decay = weight_decay

    def forward(self, values: Tensor, /) -> Tensor:
        losses = self._above(values)
        (w,) = self._recalled(values)
        self.remember(losses=losses.detach())
        z = w.flatten().softmax(0).view_as(values)
        c = 1 / (z / losses.detach()).sum()
        return (c * z * losses.log()).sum()

    @full_precision
    @torch.no_grad()
    def update(self, values: Tensor, /) -> None:
        """Take a step on the logits, with the losses of the same batch after the step of the model."""
        before = self.memory.get("losses")
        if before is None:
            raise ValueError("update() needs the losses before the step of the model: call the scalarizer with them.")
        after = self._above(values)
        (w,) = self._recalled(values)
        w = w.clone()
        fallen = (before.to(after).log() - after.log()).flatten()
        z = w.flatten().softmax(0)
        w.grad = (z * (fallen - z @ fallen)).view_as(w)
        adam = torch.optim.Adam([w], lr=self.lr, weight_decay=self.weight_decay)
        if "adam" in self.memory:
            # A copy: Adam changes its state in place, and a state_dict may hold the same.
            adam.load_state_dict({**adam.state_dict(), "state": deepcopy(self.memory["adam"])})
        adam.step()
        self.remember(w=w.detach(), adam=adam.state_dict()["state"])

    def _recalled(self, values: Tensor) -> list[Tensor]:
        return self.recall(values, self.shape, w=values.new_zeros(self.shape))

    def _above(self, values: Tensor) -> Tensor:
        """The losses above their bounds, with their graph; none is negative."""
        if values.shape != self.shape:
            raise ValueError(f"The losses have the shape {tuple(values.shape)}, and shape is {self.shape}.")
        above = values if self.min_losses is None else values - matching("min_losses", self.min_losses, values)
        if (above < 0).any():
            raise ValueError(
                f"A loss is below its bound by {-float(above.min()):.3g}, and has no logarithm: give lower min_losses."
            )
        return above + EPS
