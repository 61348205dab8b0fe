"""The diagonal of a symmetric matrix, estimated from products with random vectors."""

from __future__ import annotations

from collections.abc import Callable

import torch

from nngeo.linalg.arguments import choice, random_source
from nngeo.linalg.leaveoneout import LeaveOneOut
from nngeo.linalg.length import length
from nngeo.linalg.operator import Estimated, Operator, check_samples, groups, rademacher
from nngeo.linalg.precision import full_precision


@full_precision
def estimate_diag(
    matrix: Operator, samples: int = 30, *, method: str = "xdiag", generator: torch.Generator | None = None
) -> Estimated:
    """The diagonal and the standard error of each entry, both (P,), from `samples` products.

    Args:
        method: "hutchinson" or "xdiag".
        generator: of the random vectors; torch's global one if None.
    """
    random_source(generator)
    return DIAG_ESTIMATORS[choice("method", method, DIAG_ESTIMATORS)](matrix, samples, generator=generator)


@full_precision
@torch.no_grad()
def hutchinson_diagonal(matrix: Operator, samples: int = 30, *, generator: torch.Generator | None = None) -> Estimated:
    """The mean of `v * (A v)` over random signs v (Bekas, Kokiopoulou & Saad, 2007): unbiased.

    Entry i has the variance `sum of A_ij^2 over j != i / samples`; the error shrinks as 1 / sqrt(samples). Memory: as
    many vectors as fit a budget.
    """
    check_samples(samples, 2, "Hutchinson's estimate")
    p = int(matrix.size(0))
    mean = torch.zeros(p, dtype=matrix.dtype, device=matrix.device)
    squares = torch.zeros_like(mean, dtype=torch.float64)
    n = 0
    for m in groups(samples, p):
        v = rademacher(m, matrix, generator)
        draws = v * matrix.mv(v)
        # Sums of squared deviations of two groups, about their common mean (Chan, Golub & LeVeque, 1979).
        gap, n = draws.mean(0) - mean, n + m
        squares += length(draws - draws.mean(0), 0).double().square() + gap.double().square() * (m * (n - m) / n)
        mean = mean + gap * (m / n)
    return Estimated(mean, (squares / (samples - 1) / samples).sqrt().to(mean))


@full_precision
@torch.no_grad()
def xdiag(matrix: Operator, samples: int = 30, *, generator: torch.Generator | None = None) -> Estimated:
    """The exact diagonal on a random subspace, and an estimate of the rest from a vector that the subspace leaves out.

    The mean over m = samples / 2 random signs omega_i of `diag(P_i A) + omega_i * ((I - P_i) A omega_i)`, P_i the
    projector on A times the others (Epperly, Tropp & Webber, 2024). Unbiased; better than Hutchinson's the
    faster the spectrum decays. The error is as for XTrace. Memory: six times m vectors.
    """
    check_samples(samples, 4, "XDiag")
    p, m = int(matrix.size(0)), samples // 2
    if p <= m:
        diagonal = matrix.mv(torch.eye(p, dtype=matrix.dtype, device=matrix.device)).diagonal().clone()
        return Estimated(diagonal, torch.zeros_like(diagonal))
    found = LeaveOneOut.of(matrix, rademacher(m, matrix, generator))
    qs, zs = found.s.mT @ found.q, found.s.mT @ found.z  # (m, P): Q s_i and A Q s_i
    outside = (found.s * found.r).sum(0)[:, None] * qs  # (I - P_i) A omega_i
    return found.mean((found.q * found.z).sum(0) - qs * zs + found.omega * outside)


DIAG_ESTIMATORS: dict[str, Callable[..., Estimated]] = {"hutchinson": hutchinson_diagonal, "xdiag": xdiag}
