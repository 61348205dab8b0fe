"""Priority-constrained descent (PCD, 2026)."""

from __future__ import annotations

from numbers import Real
from typing import Any

import torch
from scipy.optimize import nnls
from torch import Tensor

from nngeo.descent.aggregation.base import GramianWeightedAggregator, GramianWeighting
from nngeo.descent.aggregation.options import Option, number
from nngeo.descent.aggregation.stateful import Memory
from nngeo.linalg.arguments import shown
from nngeo.linalg.decompose import eigh
from nngeo.linalg.dualcone import symmetric
from nngeo.linalg.gramian import rounding


def _fractions(name: str, value: Any) -> Any:
    real = isinstance(value, Real) or (isinstance(value, Tensor) and not value.is_complex())
    if not real or isinstance(value, bool):
        raise TypeError(f"{name} should be a number or a tensor (m - 1,), found {shown(value)}.")
    entries = torch.as_tensor(value)
    if entries.dim() > 1:
        raise ValueError(f"{name} should be a number or a tensor (m - 1,), found the shape {tuple(entries.shape)}.")
    if not ((entries >= 0) & (entries <= 1)).all():
        raise ValueError(f"{name} should be at least 0 and at most 1, found {value!r}.")
    return value


class PCDWeighting(Memory, GramianWeighting):
    """Weights of the d nearest to the first gradient, the primary one, with `g_j.d >= tau_j |g_j|^2` for the others.

    The gradients are first divided by moving averages of their lengths, and d gets the length of the primary gradient
    in the end. It is that gradient where the constraints contradict each other, and zero where that is. Remembers the
    averages. Exact, by non-negative least squares (Lawson & Hanson, 1974, chapter 23) in double precision on the CPU.

    Args:
        tau: the share of its own progress that each secondary objective gets, in [0, 1]; one for all or (m - 1,).
        beta: share of the past in the averages of squared lengths.
        eps: added to these averages; with 0 the result is linear in the scale of the gradients.
    """

    tau = Option(_fractions)
    beta = number(0, 1, open_ends="highest")
    eps = number(0)

    def __init__(self, tau: float | Tensor = 0.02, beta: float = 0.999, eps: float = 1e-8) -> None:
        super().__init__()
        self.tau = tau
        self.beta = beta
        self.eps = eps

    def weights(self, gramian: Tensor) -> Tensor:
        g = symmetric(gramian.to("cpu", torch.float64))
        tau = torch.as_tensor(self.tau, dtype=torch.float64, device="cpu")
        if tau.dim() and len(tau) != len(g) - 1:
            raise ValueError(f"tau has {len(tau)} entries for {len(g) - 1} secondary objectives.")
        squares = g.diagonal()
        s = self._scales(squares)
        unit = g * s * s[:, None]
        w = torch.ones_like(s)
        w[1:] = _multipliers(unit[1:, 1:], tau * unit.diagonal()[1:] - unit[1:, 0])
        squared_norm = w @ unit @ w
        # The squared norm is a difference of larger numbers: below their rounding it is zero.
        least = 10 * rounding(gramian.dtype) * (w @ unit.diagonal().sqrt()) ** 2
        scale = (squares[0] / squared_norm).sqrt() if squared_norm > least else 0.0
        return (w * s * scale).to(gramian)

    def _scales(self, squares: Tensor) -> Tensor:
        """One over the average lengths of the gradients (m,), this call's included."""
        average, steps = self.recall(squares, (len(squares),), average=torch.zeros_like(squares), steps=0)
        average = self.beta * average + (1 - self.beta) * squares
        self.remember(average=average, steps=steps + 1)
        lengths = (average / (1 - self.beta ** (steps + 1)) + self.eps).sqrt()
        return torch.where(lengths > 0, 1 / lengths, 0)


def _multipliers(g: Tensor, b: Tensor) -> Tensor:
    """The mu >= 0 (k,) of the shortest x = J'mu with `J x >= b`, G = J J'; zero where no x satisfies that."""
    if not (b > 0).any():
        return torch.zeros_like(b)
    # Unit rows, and b of size 1, make the test for contradictions free of scale.
    lengths = torch.where(g.diagonal() > 0, g.diagonal(), 1).sqrt()
    b = b / lengths
    size = b.abs().amax()
    eigenvalues, vectors = eigh(g / lengths / lengths[:, None], "Gramian")
    kept = eigenvalues > 1e-14 * len(g) * eigenvalues[-1]
    factor = torch.cat([eigenvalues[kept].sqrt()[:, None] * vectors[:, kept].T, (b / size)[None]])
    target = torch.zeros(len(factor), dtype=factor.dtype)
    target[-1] = 1
    solution = torch.from_numpy(nnls(factor.numpy(), target.numpy(), maxiter=100 * len(g))[0])
    left = 1 - factor[-1] @ solution  # 1 / (1 + |x|^2), with b of size 1
    return solution / left * size / lengths if left > 1e-9 else torch.zeros_like(b)


class PCD(GramianWeightedAggregator, of=PCDWeighting):
    """The primary gradient (the first row), changed as little as lets every secondary objective make some progress.

    "Not all objectives are born equal: priority-constrained descent for hierarchical multi-objective optimization"
    (2026). Stateful.

    >>> PCD()(torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]))
    tensor([-0.8200,  2.9434,  2.9434])
    """
