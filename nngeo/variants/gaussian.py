"""Gaussian noise around the outputs, and the identity, which is its metric at unit variance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nngeo.linalg.arguments import number
from nngeo.linalg.decompose import cholesky, cholesky_factors
from nngeo.variants.base import Cotangents, Variant, aligned, keep, working
from nngeo.variants.registry import register_variant


@register_variant("identity")
class Identity(Variant):
    """The Euclidean metric of the outputs; its cotangents, the unit vectors, pull back to the rows of the Jacobian."""

    by_example = True
    reads_targets = False

    def exact(self, outputs: Tensor, targets: tuple[Any, ...] = (), mask: Tensor | None = None) -> Cotangents:
        ones = torch.ones_like(outputs)
        return Cotangents.diagonal(keep(self.counted(outputs, targets, mask), ones))


@register_variant("regression")
class Regression(Variant):
    """Targets drawn from N(outputs, covariance): the metric is the inverse of the covariance.

    `covariance` is a number, (o,) variances or an (o, o) matrix over the o flattened outputs of one example. With a
    covariance of one, -log p is half the squared error, summed over outputs.

    >>> Regression(covariance=4.0).exact(torch.zeros(1, 2)).metric(torch.ones(1, 2))
    tensor([[0.2500, 0.2500]])
    """

    by_example = True
    reads_targets = False

    def __init__(self, covariance: float | Sequence[Any] | Tensor = 1.0):
        self.covariance = _checked(covariance)
        # W with W'W = covariance^-1: a number, (o,), or (o, o) lower triangular.
        if self.covariance.ndim < 2:
            self._whitening = self.covariance.rsqrt()
        else:
            root = cholesky(self.covariance, "covariance")
            self._whitening = torch.linalg.solve_triangular(root, torch.eye(len(root)).to(root), upper=False)

    def exact(self, outputs: Tensor, targets: tuple[Any, ...] = (), mask: Tensor | None = None) -> Cotangents:
        counted, f, w = self.counted(outputs, targets, mask), working(outputs), self._whitening.to(working(outputs))
        if w.ndim < 2:
            root = w.expand(self.n_output(outputs)).reshape(outputs.shape[1:]).expand(outputs.shape)
            return Cotangents.diagonal(keep(counted, root), outputs.dtype)

        def chunk(start: int, stop: int) -> Tensor:
            rows = w[start:stop, None].expand(-1, len(f), -1)
            return keep(counted, rows.reshape(len(rows), *f.shape)).to(outputs.dtype)

        def metric(v: Tensor) -> Tensor:
            return keep(counted, self._precision_times(v.to(f.dtype))).to(v.dtype)

        return Cotangents(len(w), chunk, metric)

    def sample(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        f = working(outputs)
        w = self._whitening.to(f)
        noise = torch.randn(len(f), self.n_output(f), dtype=f.dtype, device=f.device, generator=generator)
        noise = noise / w if w.ndim < 2 else torch.linalg.solve_triangular(w, noise.mT, upper=False).mT
        return f + noise.reshape(f.shape)

    def gradient(self, outputs: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        f = working(outputs)
        residual = f - aligned(target, f, self.name)
        return keep(self.counted(outputs, (), mask), self._precision_times(residual)).to(outputs.dtype)

    def validate(self, outputs: Tensor) -> None:
        super().validate(outputs)
        o = self.n_output(outputs)
        if self.covariance.ndim > 0 and len(self.covariance) != o:
            raise ValueError(
                f"`covariance` of shape {tuple(self.covariance.shape)} does not fit outputs of shape "
                f"{tuple(outputs.shape)}: give a number, ({o},) variances or a ({o}, {o}) matrix."
            )

    def counted(self, outputs: Tensor, targets: tuple[Any, ...] = (), mask: Tensor | None = None) -> Tensor | None:
        counted = super().counted(outputs, targets, mask)
        if counted is not None and self.covariance.ndim == 2 and not _by_example(counted):
            raise NotImplementedError(
                "A mask inside an example is not supported with a covariance matrix: the covariance of what remains "
                "would change from example to example. Give variances (o,), or a mask (b,) over examples."
            )
        return counted

    def _precision_times(self, x: Tensor) -> Tensor:
        flat, w = x.reshape(len(x), self.n_output(x)), self._whitening.to(x)
        return (flat * w.square() if w.ndim < 2 else flat @ w.mT @ w).reshape(x.shape)


def _by_example(mask: Tensor) -> bool:
    flat = mask.flatten(1)
    return bool((flat == flat[:, :1]).all())


def _checked(covariance: Any) -> Tensor:
    """The covariance as a detached floating-point tensor: (), (o,) or (o, o), positive."""
    if not isinstance(covariance, Tensor | Sequence) or isinstance(covariance, str):
        number("covariance", covariance)
    given = (
        covariance.detach()
        if isinstance(covariance, Tensor)
        else torch.as_tensor(covariance, dtype=torch.float64, device="cpu")
    )
    given = given.to(torch.promote_types(given.dtype, torch.float32))
    if given.ndim > 2 or (given.ndim == 2 and given.shape[0] != given.shape[1]):
        raise ValueError(f"`covariance` must be a number, (o,) or (o, o); found shape {tuple(given.shape)}.")
    if given.ndim < 2:
        if not bool((given.isfinite() & (given > 0)).all()):
            raise ValueError(
                f"`covariance` holds variances, which must be positive and finite; found {given.tolist()}."
            )
    elif not torch.allclose(given, given.mT):
        raise ValueError("`covariance` must be symmetric.")
    elif not cholesky_factors(given)[1]:
        raise ValueError("`covariance` must be positive definite.")
    return given
