"""Functions of the spectrum of a symmetric matrix by stochastic Lanczos quadrature."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from nngeo.linalg.arguments import callback, count, number
from nngeo.linalg.decompose import eigh
from nngeo.linalg.lanczos import tridiagonal
from nngeo.linalg.operator import Estimated, Operator, check_samples, groups, rademacher
from nngeo.linalg.precision import full_precision


class SpectralDensity(NamedTuple):
    """Eigenvalues for each unit of length, as a fraction of all: smoothed by Gaussians of deviation `broadening`."""

    grid: Tensor
    density: Tensor
    broadening: float


class Quadrature(NamedTuple):
    """Gauss rules for `v' f(A) v / |v|^2`, one for each of a few random vectors; weights are positive and sum to 1."""

    nodes: Tensor  # (samples, steps), float64
    weights: Tensor  # (samples, steps)
    size: int  # P

    @classmethod
    @torch.no_grad()
    def of(
        cls, matrix: Operator, samples: int = 10, steps: int = 50, *, generator: torch.Generator | None = None
    ) -> Quadrature:
        """From `steps` steps of Lanczos on `samples` random signs: samples x steps products (Ubaru, Chen & Saad, 2017).

        All vectors advance together. The rule is exact for polynomials of degree 2 steps - 1, so exact from P steps on.
        Memory: samples x steps vectors, in groups that fit a budget.
        """
        p = int(matrix.size(0))
        steps = min(steps, p)
        found = [tridiagonal(matrix, rademacher(m, matrix, generator), steps) for m in groups(samples, steps * p)]
        nodes, vectors = eigh(torch.cat([t.to_torch() for t in found]), "tridiagonal matrix")
        return cls(nodes, vectors[:, 0].square(), p)

    def trace_of(self, f: Callable[[Tensor], Tensor]) -> Estimated:
        """`tr f(A)` for a function of eigenvalues, with its standard error over the random vectors.

        The error of the quadrature, which `steps` control, is not in it: small for smooth functions; for log and
        powers of a matrix of condition number c it needs about sqrt(c) steps.
        """
        counted = self.weights > torch.finfo(self.weights.dtype).eps ** 2
        values = f(torch.where(counted, self.nodes, self.nodes[:, -1:]))
        return Estimated.mean(self.size * (self.weights * values).sum(-1))

    def density(self, points: int = 1000, broadening: float | None = None) -> SpectralDensity:
        """The spectral density on a grid (Lin, Saad & Yang, 2016): the nodes by their weights, smoothed.

        Args:
            broadening: deviation of the Gaussians; a hundredth of the span of the spectrum if None, and at least
                1e-4 of its end.
        """
        low, high = float(self.nodes.min()), float(self.nodes.max())
        width = broadening or max((high - low) / 100, 1e-4 * max(abs(low), abs(high)), 1e-12)
        grid = torch.linspace(
            low - 4 * width, high + 4 * width, points, dtype=self.nodes.dtype, device=self.nodes.device
        )
        bells = torch.exp(-0.5 * ((grid - self.nodes[..., None]) / width) ** 2) / (width * math.sqrt(2 * math.pi))
        return SpectralDensity(grid, torch.einsum("sj,sjg->g", self.weights, bells) / len(self.nodes), width)


@full_precision
def trace_of(
    matrix: Operator,
    f: Callable[[Tensor], Tensor],
    *,
    samples: int = 10,
    steps: int = 50,
    generator: torch.Generator | None = None,
) -> Estimated:
    """`tr f(A)` from samples x steps products; see `Quadrature.trace_of`."""
    check_samples(samples, 2, "The quadrature")
    callback("f", f, "of the eigenvalues, as torch.log")
    return Quadrature.of(matrix, samples, count("steps", steps), generator=generator).trace_of(f)


@full_precision
def logdet(
    matrix: Operator, *, samples: int = 10, steps: int = 50, generator: torch.Generator | None = None
) -> Estimated:
    """`log det A = tr log A` of a positive definite matrix, from samples x steps products.

    Raises:
        ValueError: an eigenvalue of zero or less was met.
    """
    check_samples(samples, 2, "The quadrature")
    rule = Quadrature.of(matrix, samples, count("steps", steps), generator=generator)
    least, largest = rule.nodes[rule.weights > torch.finfo(rule.weights.dtype).eps].aminmax()
    if not least > torch.finfo(matrix.dtype).eps * largest:
        raise ValueError(
            f"The matrix is not positive definite (an eigenvalue near {least:.1e} was found, the largest is "
            f"{largest:.1e}): add damping, `(F + damping).logdet()`."
        )
    return rule.trace_of(torch.log)


@full_precision
def spectral_density(
    matrix: Operator,
    *,
    points: int = 1000,
    broadening: float | None = None,
    samples: int = 10,
    steps: int = 50,
    generator: torch.Generator | None = None,
) -> SpectralDensity:
    """The smoothed density of the eigenvalues from samples x steps products; see `Quadrature.density`."""
    count("points", points, least=2)
    if broadening is not None and not number("broadening", broadening, least=0):
        raise ValueError("`broadening` should be positive; got 0.")
    samples, steps = count("samples", samples), count("steps", steps)
    return Quadrature.of(matrix, samples, steps, generator=generator).density(points, broadening)
