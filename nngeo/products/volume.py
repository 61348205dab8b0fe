"""Volumes under the metric that a model pulls back to its inputs or weights."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from nngeo.linalg.decompose import svd
from nngeo.linalg.precision import full_precision
from nngeo.products.evaluation import Wrt
from nngeo.products.functions import Options
from nngeo.products.metrics import Identity
from nngeo.products.opening import differential
from nngeo.products.outputmetric import OutputMetric, metric_at, outputs_of

try:
    from typing import Unpack
except ImportError:  # Python 3.10
    from typing_extensions import Unpack


@full_precision
def volume(
    model: nn.Module, x: Any, metric: OutputMetric = None, wrt: Wrt = "input", **options: Unpack[Options]
) -> Tensor:
    """sqrt(det(J' M J)) (b,): by how much the model stretches volumes of its inputs.

    Zero where J has no full column rank: always where there are fewer outputs than inputs, or where the outputs stand
    still along some direction. There its gradient is not defined (NaN with `create_graph`).

    >>> volume(nn.Linear(2, 3), torch.ones(4, 2)).shape
    torch.Size([4])
    """
    return log_volume(model, x, metric, wrt, **options).exp()


@full_precision
def log_volume(
    model: nn.Module, x: Any, metric: OutputMetric = None, wrt: Wrt = "input", **options: Unpack[Options]
) -> Tensor:
    """log sqrt(det(J' M J)) (b,); -inf where J has no full column rank.

    J = QR, so that the sum of log |R_ii| and half of log det(Q' M Q) lose no digits to the condition of J squared.

    Args:
        metric: M, of the kinds that all products take, or a function of the outputs (b, ...) that returns one; positive
            semidefinite.

    Raises:
        ValueError: a determinant is negative, so that M is not positive semidefinite.

    >>> log_volume(nn.Tanh(), torch.zeros(1, 2))
    tensor([0.])
    """
    create_graph = options.get("create_graph", False)
    with differential(model, x, wrt, **options) as at:
        m = metric_at(metric, at.codomain, model, x, options.get("function"), create_graph)
        if at.codomain.d < at.domain.d:
            outputs_of(model, x, options.get("function"), False)  # which checks them
            return at.codomain.like.new_full((at.codomain.b,), -torch.inf)
        q, r = torch.linalg.qr(at.jacobian())
        edges = r.diagonal(dim1=-2, dim2=-1).abs()
        full = edges.detach().amin(-1) > _rounding(edges)
        logs = edges.log().sum(-1)
        if not isinstance(m, Identity):
            inner = q.mT @ m.apply(q.permute(2, 0, 1), at.codomain).permute(1, 2, 0)
            sign, logdet = torch.linalg.slogdet(inner)
            largest = svd(inner.detach().where(inner.isfinite(), 0), "metric")[0][..., 0]
            small = largest.log() * inner.shape[-1] + math.log(_eps(inner))
            if bool(((sign < 0) & (logdet > small) & full).any()):
                raise ValueError("`metric` is not positive semidefinite: det(J' M J) is negative for some examples.")
            logs, full = logs + logdet / 2, full & (sign > 0)
        return torch.where(full, logs, -torch.inf)


def _rounding(edges: Tensor) -> Tensor:
    """(b,), what is zero up to rounding beside the largest."""
    return edges.detach().amax(-1) * _eps(edges)


def _eps(x: Tensor) -> float:
    return x.shape[-1] * torch.finfo(x.dtype).eps
