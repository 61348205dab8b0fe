"""Random estimates of A' M A, with standard errors: no more vectors are carried than there are samples."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from nngeo.products.differential import Differential
from nngeo.products.metrics import Metric
from nngeo.products.sandwich import Pair


class Sampled(NamedTuple):
    """A random estimate and its standard error, of the same shape; not a number for a single sample.

    >>> found = Sampled(torch.tensor(2.0), torch.tensor(0.1))
    >>> found.value, found.standard_error
    (tensor(2.), tensor(0.1000))
    """

    value: Tensor
    error: Tensor

    @property
    def standard_error(self) -> Tensor:
        """The estimated deviation of the mean over the samples."""
        return self.error


def sampled(
    pair: Pair, metric: Metric, result: str, reduce: str | None, samples: int, generator: torch.Generator | None
) -> Any:
    """The mean over random signs s, for each example, of z z' with z = A' V s, M = V V': unbiased (Hutchinson, 1990).

    Where V is not at hand, of `(A' M s) (A' s)'`, at twice the cost and with more variance. A Sampled, or a dict of
    them for "blocks". `generator` None is one seeded with 0: the global random numbers are not touched.
    """
    at, other = pair
    space, count = at.codomain, metric.sign_count(at.codomain)
    generator = generator or torch.Generator("cpu").manual_seed(0)
    names = at.domain.slices() if result == "blocks" else {"": slice(None)}
    means = {name: _Mean() for name in names}
    step = max(1, at.budget // (2 * space.b * (at.domain.d + count)))
    for start in range(0, samples, step):
        bits = torch.randint(
            2, (min(step, samples - start), space.b, count), generator=generator, device=generator.device
        )
        signs = (2 * bits - 1).to(space.like)
        z = metric.signed(signs, space)
        if z is not None and other is at and (draws := _direct(at, z, result, reduce)) is not None:
            means[""].add(draws)
            continue
        left = at.pull(metric.apply(signs, space) if z is None else z)
        same = z is not None and other is at
        right = left if same else other.pull(signs if z is None else z)
        for name, place in names.items():
            means[name].add(_formed(left[..., place], right[..., place], result, reduce))
    found = {name: mean.result() for name, mean in means.items()}
    return found if result == "blocks" else found[""]


def _direct(at: Differential, z: Tensor, result: str, reduce: str | None) -> Tensor | None:
    """(k, ...), the result of each draw, where that takes no rows A' z; else None."""
    if result == "trace":
        return _reduced(at.norms(z), reduce)
    if result == "diag" and reduce is not None:
        total = torch.stack([at.total_squares(row[None]) for row in z])
        return total / at.domain.b if reduce == "mean" else total
    return None


def _formed(left: Tensor, right: Tensor, result: str, reduce: str | None) -> Tensor:
    """(k, ...), the result of each draw from rows (k, b, e)."""
    if result == "diag":
        return _reduced(left * right, reduce)
    if result == "trace":
        return _reduced((left * right).sum(-1), reduce)
    if reduce is None:
        return left[..., :, None] * right[..., None, :]
    total = left.mT @ right
    return total / left.shape[1] if reduce == "mean" else total


def _reduced(draws: Tensor, reduce: str | None) -> Tensor:
    return draws if reduce is None else draws.sum(1) if reduce == "sum" else draws.mean(1)


class _Mean:
    """The mean of draws and its standard error, chunk after chunk (Chan, Golub & LeVeque, 1979)."""

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0, torch.zeros(()), torch.zeros(())

    def add(self, draws: Tensor) -> None:
        k, mean = len(draws), draws.mean(0)
        squares = (draws - mean).square().sum(0)
        n = self.count + k
        if self.count:
            step = mean - self.mean
            squares = self.squares + squares + step.square() * (self.count * k / n)
            mean = self.mean + step * (k / n)
        self.count, self.mean, self.squares = n, mean, squares

    def result(self) -> Sampled:
        if self.count < 2:
            return Sampled(self.mean, torch.full_like(self.mean, torch.nan))
        return Sampled(self.mean, (self.squares / (self.count - 1) / self.count).sqrt())
