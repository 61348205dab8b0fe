"""Direction-oriented stochastic multi-objective gradients (SDMGrad: Xiao et al., 2023)."""

from __future__ import annotations

import torch
from torch import Tensor

from nngeo.descent.aggregation.base import GramianWeightedAggregator, GramianWeighting
from nngeo.descent.aggregation.options import number, rows_or, vector
from nngeo.descent.aggregation.stateful import Memory
from nngeo.linalg.simplex import project_onto_simplex


class SDMGradWeighting(Memory, GramianWeighting):
    """Weights `(w + lambda u) / (1 + lambda)`, w after projected steps on `|J'(w + lambda u)|^2` over the simplex.

    The steps start at the last w (1/m at first).

    Takes the cross Gramian `J1 J2'` of two independent batches, which makes the steps unbiased. It is divided by the
    square of the mean length of a gradient, so that `lr` has no unit.

    Args:
        lr: the step.
        momentum: of the steps in one call.
        n_iter: their number.
        lambda_: pull towards the preference.
        pref_vector: u (m,); 1/m if None.
    """

    lr = number(0, open_ends="lowest")
    momentum = number(0, 1, open_ends="highest")
    n_iter = number(1, whole=True)
    lambda_ = number(0)
    pref_vector = vector()

    def __init__(
        self,
        lr: float = 10.0,
        momentum: float = 0.5,
        n_iter: int = 20,
        lambda_: float = 0.3,
        pref_vector: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.lr = lr
        self.momentum = momentum
        self.n_iter = n_iter
        self.lambda_ = lambda_
        self.pref_vector = pref_vector

    def weights(self, gramian: Tensor) -> Tensor:
        m = len(gramian)
        (w,) = self.recall(gramian, (m,), w=gramian.new_full((m,), 1 / m))
        pull = self.lambda_ * rows_or("pref_vector", self.pref_vector, 1 / m, gramian)
        square = gramian.diagonal().clamp(min=0).sqrt().mean() ** 2
        scaled = torch.where(square > 0, gramian / square, 0)
        velocity = torch.zeros_like(w)
        for _ in range(self.n_iter):
            velocity = self.momentum * velocity + scaled @ (w + pull)
            w = project_onto_simplex(w - self.lr * velocity)
        self.remember(w=w)
        return (w + pull) / (1 + self.lambda_)


class SDMGrad(GramianWeightedAggregator, of=SDMGradWeighting):
    """SDMGrad where one Jacobian is all there is (full batches): `J1 = J2 = J`. For two batches use the weighting.

    "Direction-oriented multi-objective learning: simple and provable stochastic algorithms" (Xiao et al., 2023),
    algorithm 1. Stateful.

    >>> SDMGrad()(torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]))
    tensor([4.8462, 1.0000, 1.0000])
    """
