"""What a Laplace approximation asks of a likelihood: how well outputs fit, and what uncertain outputs predict."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nngeo.linalg.arguments import choice

PROBIT = math.pi / 8


class Likelihood(ABC):
    """A distribution of targets given outputs f (b, ...)."""

    noisy = False  # whether it has a noise, of which `fit` is divided

    @abstractmethod
    def fit(self, f: Tensor, target: Tensor) -> tuple[Tensor, int]:
        """-log p(target | f) summed, 0-d, and the number of targets; with a noise, half the squares for -log p."""

    @abstractmethod
    def inverse_link(self, f: Tensor) -> Tensor:
        """The mean of the target."""

    @abstractmethod
    def probit(self, f: Tensor, variance: Tensor) -> Tensor:
        """The mean of the target over outputs of this mean and variance, in closed form."""

    def bridge(self, f: Tensor, covariance: Tensor) -> Tensor:
        """The mean of the target by a Dirichlet distribution, for outputs f (b, k) of covariance (b, k, k)."""
        raise ValueError(f'link="bridge" is for several classes, (b, k); outputs are {tuple(f.shape)} here.')

    def log_likelihood(self, fit: Tensor, count: int, noise: Tensor) -> Tensor:
        """log p of all targets, differentiable in the noise."""
        return -fit


class Gaussian(Likelihood):
    """Targets are outputs with noise."""

    noisy = True

    def fit(self, f: Tensor, target: Tensor) -> tuple[Tensor, int]:
        return (f - target.to(f).reshape(f.shape)).square().sum() / 2, f.numel()

    def inverse_link(self, f: Tensor) -> Tensor:
        return f

    def probit(self, f: Tensor, variance: Tensor) -> Tensor:
        return f

    def log_likelihood(self, fit: Tensor, count: int, noise: Tensor) -> Tensor:
        return -fit / noise - count / 2 * (2 * torch.pi * noise).log()


@dataclass(frozen=True)
class Categorical(Likelihood):
    """Targets are classes, outputs their logits along an axis; a target of -100 does not count."""

    axis: int

    def fit(self, f: Tensor, target: Tensor) -> tuple[Tensor, int]:
        logits = f.movedim(self.axis, 1)
        loss = nn.functional.cross_entropy(logits, target, reduction="sum", ignore_index=-100)
        return loss, int((target != -100).sum())

    def inverse_link(self, f: Tensor) -> Tensor:
        return f.softmax(self.axis)

    def probit(self, f: Tensor, variance: Tensor) -> Tensor:
        """Gibbs' (1997) formula: logits are divided by sqrt(1 + pi / 8 variance)."""
        return (f / (1 + PROBIT * variance).sqrt()).softmax(self.axis)

    def bridge(self, f: Tensor, covariance: Tensor) -> Tensor:
        """Hobbhahn et al. (2022), equation 8, for logits that sum to zero, which is all that a softmax sees."""
        if f.ndim != 2:
            return super().bridge(f, covariance)
        k = f.shape[1]
        total = covariance.sum((1, 2))[:, None]
        column = covariance.sum(2)
        f = f - column * f.sum(1, keepdim=True) / total
        variance = covariance.diagonal(dim1=1, dim2=2) - column.square() / total
        alpha = (1 - 2 / k + f.exp() / k**2 * (-f).exp().sum(1, keepdim=True)) / variance
        return alpha / alpha.sum(1, keepdim=True)


class Bernoulli(Likelihood):
    """Targets are 0 or 1, outputs logits."""

    def fit(self, f: Tensor, target: Tensor) -> tuple[Tensor, int]:
        target = target.to(f).reshape(f.shape)
        return nn.functional.binary_cross_entropy_with_logits(f, target, reduction="sum"), f.numel()

    def inverse_link(self, f: Tensor) -> Tensor:
        return f.sigmoid()

    def probit(self, f: Tensor, variance: Tensor) -> Tensor:
        """MacKay (1992)."""
        return (f / (1 + PROBIT * variance).sqrt()).sigmoid()


class Poisson(Likelihood):
    """Targets are counts, outputs the logarithms of their rates."""

    def fit(self, f: Tensor, target: Tensor) -> tuple[Tensor, int]:
        target = target.to(f).reshape(f.shape)
        return (f.exp() - target * f + torch.lgamma(target + 1)).sum(), f.numel()

    def inverse_link(self, f: Tensor) -> Tensor:
        return f.exp()

    def probit(self, f: Tensor, variance: Tensor) -> Tensor:
        """The mean of a log-normal distribution."""
        return (f + variance / 2).exp()


LIKELIHOODS: dict[str, Likelihood] = {
    "regression": Gaussian(),
    "classif_logits": Categorical(-1),
    "token_logits": Categorical(-1),
    "segmentation_logits": Categorical(1),
    "classif_binary_logits": Bernoulli(),
    "poisson_log_rate": Poisson(),
}


def likelihood_of(name: Any) -> Likelihood:
    """By its name, which is that of the variant of its Fisher matrix.

    Raises:
        ValueError: there is none of this name.
    """
    return LIKELIHOODS[choice("likelihood", name, LIKELIHOODS)]
