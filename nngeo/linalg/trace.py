"""The trace of a symmetric matrix, estimated from products with random vectors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nngeo.linalg.arguments import choice, random_source
from nngeo.linalg.leaveoneout import LeaveOneOut
from nngeo.linalg.operator import Estimated, Operator, check_samples, groups, normal, rademacher
from nngeo.linalg.precision import full_precision


@full_precision
def estimate_trace(
    matrix: Operator, samples: int = 30, *, method: str = "xtrace", generator: torch.Generator | None = None
) -> Estimated:
    """The trace and its standard error, both 0-d, from `samples` products.

    Args:
        method: "hutchinson", "hutch++" or "xtrace".
        generator: of the random vectors; torch's global one if None.
    """
    random_source(generator)
    return TRACE_ESTIMATORS[choice("method", method, TRACE_ESTIMATORS)](matrix, samples, generator=generator)


@full_precision
@torch.no_grad()
def hutchinson(matrix: Operator, samples: int = 30, *, generator: torch.Generator | None = None) -> Estimated:
    """The mean of `v' A v` over random signs v (Girard, 1989; Hutchinson, 1990): unbiased.

    Its variance is `2 (|A|_F^2 - sum_i A_ii^2) / samples`; the error shrinks as 1 / sqrt(samples). Memory: as many
    vectors as fit a budget.
    """
    check_samples(samples, 2, "Hutchinson's estimate")
    return Estimated.mean(torch.cat([_forms(matrix, v) for v in _signs(matrix, samples, generator)]))


@full_precision
@torch.no_grad()
def hutch_plus_plus(matrix: Operator, samples: int = 30, *, generator: torch.Generator | None = None) -> Estimated:
    """The exact trace on a random subspace that holds most of A, and Hutchinson's estimate of the rest.

    `tr(Q'AQ) + mean of v'(I - QQ') A (I - QQ')v`, Q (P, samples / 3) an orthonormal basis of A times random signs
    (Meyer, Musco, Musco & Woodruff, 2021, algorithm 1). Unbiased; for a positive semidefinite matrix the error shrinks
    as 1 / samples, faster where the spectrum decays. Memory: samples / 3 vectors twice, for the basis and its products.
    """
    check_samples(samples, 6, "Hutch++")
    p, third = int(matrix.size(0)), samples // 3
    if p <= third:
        return _exact(matrix)
    q = torch.linalg.qr(matrix.mv(rademacher(third, matrix, generator)).mT)[0].mT
    forms = [_forms(matrix, v - (v @ q.mT) @ q) for v in _signs(matrix, samples - 2 * third, generator)]
    rest = Estimated.mean(torch.cat(forms))
    return Estimated(_forms(matrix, q).sum() + rest.value, rest.error)


@full_precision
@torch.no_grad()
def xtrace(matrix: Operator, samples: int = 30, *, generator: torch.Generator | None = None) -> Estimated:
    """The mean over m = samples / 2 vectors of what Hutch++ says with a basis of the others, each vector used twice.

    With unit-length normalization of the remainders (XTrace: Epperly, Tropp & Webber, 2024).
    Unbiased for a symmetric matrix; as Hutch++ with a smaller constant. The standard error is sqrt(2) times that of
    the paper (`LeaveOneOut.mean`): measured, 1 to 1.3 times the true one, and too small where the rank is
    about m. Memory: three times m vectors. Exact if the rank is below m.
    """
    check_samples(samples, 4, "XTrace")
    p, m = int(matrix.size(0)), samples // 2
    if p <= m:
        return _exact(matrix)
    found = LeaveOneOut.of(matrix, normal(m, matrix, generator))
    h, w, s = found.h, found.w, found.s
    inside = (s * w).sum(0)  # s_i' Q' omega_i
    x = w - s * inside  # coordinates of P_i omega_i
    forms = (w * found.r).sum(0) - 2 * (x * found.r).sum(0) + (x * (h @ x)).sum(0)
    lengths = found.omega.square().sum(-1) - x.square().sum(0)
    draws = h.trace() - (s * (h @ s)).sum(0) + forms * (p - m + 1) / lengths
    return found.mean(draws)


def _exact(matrix: Operator) -> Estimated:
    eye = torch.eye(int(matrix.size(0)), dtype=matrix.dtype, device=matrix.device)
    trace = matrix.mv(eye).diagonal().sum()
    return Estimated(trace, torch.zeros_like(trace))


def _signs(matrix: Operator, samples: int, generator: torch.Generator | None) -> list[Tensor]:
    return [rademacher(m, matrix, generator) for m in groups(samples, int(matrix.size(0)))]


def _forms(matrix: Operator, v: Tensor) -> Tensor:
    """(m,), `v' A v` for the rows v of (m, P)."""
    return (v * matrix.mv(v)).sum(-1)


TRACE_ESTIMATORS: dict[str, Callable[..., Estimated]] = {
    "hutchinson": hutchinson,
    "hutch++": hutch_plus_plus,
    "xtrace": xtrace,
}
