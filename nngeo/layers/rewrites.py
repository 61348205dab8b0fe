"""Operations that are carried as others, by their definitions: norms, normalisations, gated units.

Nested derivatives of torch's own are wrong for some of them (torch 2.13: layer_norm), and can't be differentiated again
for others (vector_norm).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def layer_norm(
    x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised over the last axes; with the mean and the reciprocal of the standard deviation."""
    axes = tuple(range(-len(shape), 0))
    y, mean, scale = _normalised(x, axes, eps)
    return _scaled(y, weight, bias), mean, scale


def rms_norm(x: Tensor, shape: Sequence[int], weight: Tensor | None, eps: float | None) -> tuple[Tensor, Tensor]:
    """Divided by the root of the mean square over the last axes; with the reciprocal of it."""
    axes = tuple(range(-len(shape), 0))
    scale = ((x * x).mean(axes, keepdim=True) + (torch.finfo(x.dtype).eps if eps is None else eps)).rsqrt()
    return _scaled(x * scale, weight, None), scale


def group_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, n: int, c: int, positions: int, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised over groups of channels and all positions."""
    y, mean, scale = _normalised(x.reshape(n, groups, -1), (-1,), eps)
    return _scaled(y.reshape(x.shape), weight, bias, channels=x.ndim), mean.squeeze(-1), scale.squeeze(-1)


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    *_: Any,
) -> tuple[Tensor, ...]:
    """By running statistics or, as instance norm uses it, over everything but the channels."""
    if training:
        if mean is not None or variance is not None:
            raise NotImplementedError("batch normalisation that updates its statistics")
        y, found, scale = _normalised(x, (0, *range(2, x.ndim)), eps)
    elif mean is None or variance is None:
        raise NotImplementedError("batch normalisation without statistics")
    else:
        shape = (-1, *[1] * (x.ndim - 2))
        found, scale = mean.reshape(shape), (variance.reshape(shape) + eps).rsqrt()
        y = (x - found) * scale
    # Others may follow in torch: kept for a backward pass that is not taken.
    return _scaled(y, weight, bias, channels=x.ndim), found.flatten(), scale.flatten(), x.new_empty(0)


def instance_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Normalised over all positions of each example and channel."""
    return _scaled(_normalised(x, tuple(range(2, x.ndim)), eps)[0], weight, bias, channels=x.ndim)


def batch_norm_no_training(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, variance: Tensor, momentum: float, eps: float
) -> tuple[Tensor, ...]:
    """By running statistics."""
    return batch_norm(x, weight, bias, mean, variance, False, momentum, eps)[:3]


def glu(x: Tensor, dim: int = -1) -> Tensor:
    """The first half times the sigmoid of the second."""
    a, b = x.chunk(2, dim)
    return a * b.sigmoid()


def hard_sigmoid(x: Tensor) -> Tensor:
    """`min(max(x + 3, 0), 6) / 6`; torch's has no second derivative."""
    return (x + 3).clamp(0, 6) / 6


def log_sigmoid(x: Tensor) -> tuple[Tensor, Tensor]:
    """`-log(1 + exp(-x))`; with a buffer that torch returns."""
    return -torch.nn.functional.softplus(-x), x.new_empty(0)


def vector_norm(
    x: Tensor, ord: float = 2, dim: Sequence[int] | None = None, keepdim: bool = False, *, dtype: Any = None
) -> Tensor:
    """`(sum |x|^p)^(1/p)`, with the derivative zero where all is zero."""
    axes = tuple(range(x.ndim)) if dim is None else tuple(dim)
    if ord in (float("inf"), -float("inf")):
        return x.abs().amax(axes, keepdim) if ord > 0 else x.abs().amin(axes, keepdim)
    if ord <= 0 or (dtype is not None and dtype != x.dtype):
        raise NotImplementedError(f"a norm of order {ord}, as {dtype}")
    total = (x * x if ord == 2 else x.abs() if ord == 1 else x.abs() ** ord).sum(axes, keepdim)
    if ord == 1:
        return total
    zero = total == 0
    total = total.masked_fill(zero, 1)
    return (total.sqrt() if ord == 2 else total ** (1 / ord)).masked_fill(zero, 0)


def variance(
    x: Tensor, dim: Sequence[int] | None = None, *, correction: float | None = None, keepdim: bool = False
) -> Tensor:
    """The mean square of the centred entries, but divided by their number less the correction."""
    return _moments(x, dim, correction, keepdim)[0]


def log_sum_exp(x: Tensor, dim: Sequence[int], keepdim: bool = False) -> Tensor:
    """`log sum exp(x)`, shifted by the largest entries."""
    top = x.amax(tuple(dim), keepdim=True).detach()
    found = (x - top).exp().sum(tuple(dim), keepdim=True).log() + top
    return found if keepdim else found.squeeze(tuple(dim))


REWRITES: dict[str, Callable[..., Any]] = {
    "native_layer_norm": layer_norm,
    "_fused_rms_norm": rms_norm,
    "native_group_norm": group_norm,
    "native_batch_norm": lambda *args: batch_norm(*args)[:3],
    "_native_batch_norm_legit": lambda *args: batch_norm(*args)[:3],
    "_native_batch_norm_legit_no_training": batch_norm_no_training,
    "cudnn_batch_norm": batch_norm,
    "miopen_batch_norm": lambda *args: batch_norm(*args)[:3],
    "glu": glu,
    "hardsigmoid": hard_sigmoid,
    "hardswish": lambda x: x * hard_sigmoid(x),
    "log_sigmoid_forward": log_sigmoid,
    "linalg_vector_norm": vector_norm,
    "logsumexp": log_sum_exp,
    "var": variance,
    "std": lambda *args, **kwargs: variance(*args, **kwargs).sqrt(),
    "var_mean": lambda x, dim=None, *, correction=None, keepdim=False: _moments(x, dim, correction, keepdim),
    "std_mean": lambda x, dim=None, *, correction=None, keepdim=False: _roots(_moments(x, dim, correction, keepdim)),
}


def _normalised(x: Tensor, axes: tuple[int, ...], eps: float) -> tuple[Tensor, Tensor, Tensor]:
    mean = x.mean(axes, keepdim=True)
    centred = x - mean
    scale = ((centred * centred).mean(axes, keepdim=True) + eps).rsqrt()
    return centred * scale, mean, scale


def _scaled(y: Tensor, weight: Tensor | None, bias: Tensor | None, channels: int = 0) -> Tensor:
    """Times the weight, plus the bias; along the second of so many axes, if `channels` is given."""
    shape = (-1, *[1] * (channels - 2))
    weight, bias = (p if p is None or not channels else p.reshape(shape) for p in (weight, bias))
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def _moments(x: Tensor, dim: Sequence[int] | None, correction: float | None, keepdim: bool) -> tuple[Tensor, Tensor]:
    """Variance and mean."""
    axes = tuple(range(x.ndim)) if dim is None else tuple(dim)
    mean = x.mean(axes, keepdim=True)
    count = math.prod(x.shape[axis] for axis in axes)
    found = ((x - mean) * (x - mean)).sum(axes, keepdim=keepdim) / (count - (1 if correction is None else correction))
    return found, mean if keepdim else mean.squeeze(axes)


def _roots(moments: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return moments[0].sqrt(), moments[1]
