"""Fair resource allocation in multi-task learning (FairGrad: Ban & Ji, 2024)."""

from __future__ import annotations

from torch import Tensor

from nngeo.descent.aggregation.base import GramianWeightedAggregator, GramianWeighting
from nngeo.descent.aggregation.options import Option, number
from nngeo.linalg.balance import balanced_weights


def _count(name: str, value: int | None) -> int | None:
    if value is not None and not isinstance(value, int):
        raise TypeError(f"{name} should be a whole number, or None, found {value!r}.")
    if value is not None and value < 1:
        raise ValueError(f"{name} should be at least 1, or None, found {value!r}.")
    return value


class FairGradWeighting(GramianWeighting):
    """Weights w > 0 with `G w = w^(-1/alpha)`, by a primal-dual Newton method.

    Args:
        alpha: 0 is the mean, 1 proportional fairness (the weights of Nash-MTL), infinity the fairness of the worst off.
        max_iters: largest number of Newton steps; 100 if None.
    """

    alpha = number(0)
    max_iters = Option(_count)

    def __init__(self, alpha: float, max_iters: int | None = None) -> None:
        super().__init__()
        self.alpha = alpha
        self.max_iters = max_iters

    def weights(self, gramian: Tensor) -> Tensor:
        if self.alpha == 0:
            return gramian.new_full((len(gramian),), 1 / len(gramian))
        return balanced_weights(gramian, 1 / self.alpha, max_iter=self.max_iters or 100).to(gramian)


class FairGrad(GramianWeightedAggregator, of=FairGradWeighting):
    """The direction with the largest alpha-fair sum of the utilities `g_i.d` in a ball.

    "Fair resource allocation in multi-task learning" (Ban & Ji, 2024), equation 4.

    >>> import torch
    >>> FairGrad(alpha=1.0)(torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]))
    tensor([0.0766, 0.9985, 0.9985])
    """

    def __str__(self) -> str:
        return f"{self.alpha}-FairGrad"
