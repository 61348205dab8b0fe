"""Weights smoothed over the steps (CR-MOGM: Zhou et al., 2022)."""

from __future__ import annotations

from torch import Tensor

from nngeo.descent.aggregation.base import GramianWeightedAggregator, Weighting, the_weighting
from nngeo.descent.aggregation.options import number, vector
from nngeo.descent.aggregation.stateful import Memory, reset


class CRMOGMWeighting(Memory, Weighting):
    """Weights `alpha l + (1 - alpha) w`, l the last ones and w those of another weighting.

    Takes what that weighting takes. Remembers l; `reset()` resets the other weighting, too.

    Args:
        alpha: share of the last weights; may be written between steps (the paper lets it grow to 1 as the learning
            rate decays).
        initial_weights: l at the first step (m,); w itself if None.
    """

    alpha = number(0, 1)
    initial_weights = vector()

    def __init__(self, weighting: Weighting, alpha: float = 0.9, initial_weights: Tensor | None = None) -> None:
        super().__init__()
        self.weighting = the_weighting(weighting)
        self.alpha = alpha
        self.initial_weights = initial_weights

    def forward(self, statistic: Tensor, /) -> Tensor:
        w = self.weighting(statistic)
        start = w if self.initial_weights is None else self.initial_weights
        (last,) = self.recall(w, (), last=start)
        if last.shape != w.shape:
            raise ValueError(
                f"The last weights are of {len(last)} objectives, the new ones of {len(w)}: "
                "call reset() when their number changes, and give as many initial_weights."
            )
        w = self.alpha * last + (1 - self.alpha) * w
        self.remember(last=w)
        return w

    def reset(self) -> None:
        super().reset()
        reset(self.weighting)


class CRMOGM(GramianWeightedAggregator, of=CRMOGMWeighting):
    """The aggregator of a weighting of Gramians with its weights smoothed over the steps.

    "On the convergence of stochastic multi-objective gradient manipulation and beyond" (Zhou et al., 2022).
    Stateful.

    >>> import torch
    >>> from nngeo.descent.aggregation.upgrad import UPGradWeighting
    >>> A = CRMOGM(UPGradWeighting(), alpha=0.5, initial_weights=torch.tensor([0.5, 0.5]))
    >>> A(torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]))
    tensor([0.6465, 1.4502, 1.4502])
    """
