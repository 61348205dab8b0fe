"""Scalarizations whose minimum is the point of the Pareto front that a preference vector asks for."""

from __future__ import annotations

import torch
from torch import Tensor

from nngeo.descent.aggregation.options import number
from nngeo.descent.scalarization.base import Scalarizer, losses_like, matching


class COSMOS(Scalarizer):
    """`r.L - lambda cos(r, L)`: a weighted sum with a reward for losses in the ratio of the preferences.

    "Scalable Pareto front approximation for deep multi-objective learning" (Ruchte & Grabocka, 2021), equation 5. The
    paper draws r from a Dirichlet distribution for every batch, and gives it to the model as an input, too.

    Args:
        lambda_: weight of the cosine; 0.01 to 8 in the paper.
        weights: r, of the shape of the losses. May be written between calls.

    >>> COSMOS(2.0, torch.tensor([0.6, 0.8]))(torch.tensor([0.6, 0.8]))
    tensor(-1.)
    """

    lambda_ = number(0)
    weights = losses_like()

    def __init__(self, lambda_: float, weights: Tensor) -> None:
        super().__init__()
        self.lambda_ = lambda_
        self.weights = weights

    def forward(self, values: Tensor, /) -> Tensor:
        losses, r = values.flatten(), matching("weights", self.weights, values).flatten()
        return r @ losses - self.lambda_ * torch.cosine_similarity(r, losses, dim=0)


class PBI(Scalarizer):
    """`d_1 + theta d_2`: how far losses are along the direction of the preferences, and how far from it.

    With `F = L - z`: `d_1 = F.w/|w|` and `d_2 = |F - d_1 w/|w||`. "MOEA/D: a multiobjective evolutionary algorithm
    based on decomposition" (Zhang & Li, 2007), section III.A.3.

    Args:
        theta: weight of d_2; 5 in the paper.
        weights: w, of the shape of the losses. May be written between calls.
        reference: z, a lower bound of the losses; zero if None.

    >>> PBI(5.0, torch.tensor([1.0, 0.0]))(torch.tensor([2.0, 0.1]))
    tensor(2.5000)
    """

    theta = number(0)
    weights = losses_like()
    reference = losses_like(optional=True)

    def __init__(self, theta: float, weights: Tensor, reference: Tensor | None = None) -> None:
        super().__init__()
        self.theta = theta
        self.weights = weights
        self.reference = reference

    def forward(self, values: Tensor, /) -> Tensor:
        w = matching("weights", self.weights, values).flatten()
        if not w.any():
            raise ValueError("weights is zero, and has no direction.")
        direction, losses = w / w.norm(), _above(self.reference, values).flatten()
        along = losses @ direction
        # The length has no derivative at zero: 1e-12 moves it by 1e-6 there, and by nothing elsewhere.
        apart = ((losses - along * direction).square().sum() + 1e-12).sqrt()
        return along + self.theta * apart


class STCH(Scalarizer):
    """`mu log sum_i exp(w_i (L_i - z_i) / mu)`: a smooth version of the largest weighted loss.

    "Smooth Tchebycheff scalarization for multi-objective optimization" (Lin et al., 2024), equation 6. By more than the
    largest one, but no more than `mu log m`.

    Args:
        mu: smoothing; 0.01 to 1 in the paper.
        weights: w, of the shape of the losses; 1/m if None.
        reference: z, the ideal losses; zero if None.

    >>> STCH(0.01)(torch.tensor([1.0, 3.0]))
    tensor(1.5000)
    """

    mu = number(0, open_ends="lowest")
    weights = losses_like(optional=True)
    reference = losses_like(optional=True)

    def __init__(self, mu: float, weights: Tensor | None = None, reference: Tensor | None = None) -> None:
        super().__init__()
        self.mu = mu
        self.weights = weights
        self.reference = reference

    def forward(self, values: Tensor, /) -> Tensor:
        losses = _above(self.reference, values)
        weighted = (
            losses / losses.numel() if self.weights is None else matching("weights", self.weights, values) * losses
        )
        largest = weighted.detach().amax()
        # Less the largest before the division: large losses over a small mu leave the range of numbers.
        return largest + self.mu * ((weighted - largest) / self.mu).flatten().logsumexp(0)


def _above(reference: Tensor | None, values: Tensor) -> Tensor:
    return values if reference is None else values - matching("reference", reference, values)
