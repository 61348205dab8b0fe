"""Multi-task learning as a bargaining game (Nash-MTL: Navon et al., 2022)."""

from __future__ import annotations

import torch
from torch import Tensor

from nngeo.descent.aggregation.base import GramianWeightedAggregator, GramianWeighting
from nngeo.descent.aggregation.options import number
from nngeo.descent.aggregation.stateful import Memory
from nngeo.linalg.balance import balanced_weights


class NashMTLWeighting(Memory, GramianWeighting):
    """Weights a > 0 with `G a = 1/a`, the Nash bargaining solution, scaled down to `|J'a| <= max_norm`.

    By a primal-dual Newton method, exact where the solution exists, which is where no `v >= 0` has `J'v = 0`.
    Remembers a.

    Args:
        n_tasks: m.
        max_norm: 0 for no limit. `|J'a|` is sqrt(m) without.
        update_weights_every: calls from one solution to the next; those between use the last a.
        optim_niter: largest number of Newton steps.
    """

    needs_rows = True
    n_tasks = number(1, whole=True)
    max_norm = number(0)
    update_weights_every = number(1, whole=True)
    optim_niter = number(1, whole=True)

    def __init__(
        self, n_tasks: int, max_norm: float = 1.0, update_weights_every: int = 1, optim_niter: int = 20
    ) -> None:
        super().__init__()
        self.n_tasks = n_tasks
        self.max_norm = max_norm
        self.update_weights_every = update_weights_every
        self.optim_niter = optim_niter

    def weights(self, gramian: Tensor) -> Tensor:
        if len(gramian) != self.n_tasks:
            raise ValueError(f"n_tasks is {self.n_tasks}, but the matrix has {len(gramian)} rows.")
        a, steps = self.recall(gramian, (self.n_tasks,), a=gramian.new_ones(self.n_tasks), steps=0)
        if steps % self.update_weights_every == 0:
            a = balanced_weights(gramian, 1, max_iter=self.optim_niter).to(gramian)
        self.remember(a=a, steps=steps + 1)
        length = (a @ gramian @ a).clamp(min=0).sqrt()
        return torch.where((length > self.max_norm) & (self.max_norm > 0), a * (self.max_norm / length), a)


class NashMTL(GramianWeightedAggregator, of=NashMTLWeighting):
    """The direction with the largest product of utilities `g_i.d` in a ball.

    "Multi-task learning as a bargaining game" (Navon et al., 2022), claim 3.1 and algorithm 1. Stateful.

    >>> NashMTL(n_tasks=2)(torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]))
    tensor([0.0542, 0.7061, 0.7061])
    """
