"""Losses on scales that are parameters, learned together with the model's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nngeo.descent.aggregation.stateful import Stateful
from nngeo.descent.scalarization.base import Scalarizer, matching
from nngeo.linalg.arguments import sizes


class UW(Scalarizer, Stateful):
    """`sum_i (exp(-s_i) L_i + s_i) / 2`, where s, the logarithm of a variance for each loss, is learned.

    "Multi-task learning using uncertainty to weigh losses for scene geometry and semantics" (Kendall et al., 2018),
    equation 7. The optimizer needs `parameters()` of this, too.

    Args:
        shape: of the losses; n for (n,).

    >>> uw = UW(2)
    >>> uw(torch.tensor([1.0, 3.0]))
    tensor(2., grad_fn=<DivBackward0>)
    >>> optimizer = torch.optim.SGD([*uw.parameters()], lr=0.1)  # and those of the model
    """

    def __init__(self, shape: int | Sequence[int]) -> None:
        super().__init__()
        self.log_var = nn.Parameter(torch.zeros(sizes("shape", shape)))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.log_var.shape)

    def forward(self, values: Tensor, /) -> Tensor:
        s = matching("log_var", self.log_var, values)
        return ((-s).exp() * values + s).sum() / 2

    @torch.no_grad()
    def reset(self) -> None:
        """Set s to zero."""
        self.log_var.zero_()


class IMTLL(Scalarizer, Stateful):
    """`sum_i (exp(s_i) L_i - s_i)`, where s is learned: at its optimum all scaled losses are 1.

    "Towards impartial multi-task learning" (Liu et al., 2021), equation 9, IMTL-L; twice `UW` with -s for s. The
    optimizer needs `parameters()` of this, too.

    Args:
        shape: of the losses; n for (n,).

    >>> IMTLL(2)(torch.tensor([1.0, 3.0]))
    tensor(4., grad_fn=<SumBackward0>)
    """

    def __init__(self, shape: int | Sequence[int]) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(sizes("shape", shape)))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.log_scale.shape)

    def forward(self, values: Tensor, /) -> Tensor:
        s = matching("log_scale", self.log_scale, values)
        return (s.exp() * values - s).sum()

    @torch.no_grad()
    def reset(self) -> None:
        """Set s to zero."""
        self.log_scale.zero_()
