"""Modules known from NNGeometry, with its names: scaling, and linear maps with normalized weights."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nngeo.layers.norm import TrailingAxesRule
from nngeo.layers.rule import register_rule
from nngeo.linalg.arguments import count, flag, number, sizes


class Affine1d(nn.Module):
    """`weight * x + bias` by feature, on (..., features).

    >>> Affine1d(3)(torch.ones(2, 3)).shape
    torch.Size([2, 3])
    """

    def __init__(self, num_features: int, bias: bool = True):
        super().__init__()
        self.num_features = count("num_features", num_features)
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features)) if flag("bias", bias) else None

    def forward(self, x: Tensor) -> Tensor:
        scaled = x * self.weight
        return scaled if self.bias is None else scaled + self.bias


@register_rule(Affine1d)
class AffineRule(TrailingAxesRule):
    """Affine1d: nothing is normalized."""

    def normalized(self, module: Any, x: Tensor) -> Tensor:
        return x


class WeightNorm1d(nn.Linear):
    """A linear map without bias whose rows have unit length: `x @ W.T` with `W = weight / sqrt(|weight|^2 + eps)`."""

    def __init__(self, in_features: int, out_features: int, eps: float = 1e-5):
        super().__init__(count("in_features", in_features), count("out_features", out_features), bias=False)
        self.eps = number("eps", eps, least=0)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, _unit(self.weight, self.eps))


class Cosine1d(WeightNorm1d):
    """Cosines between inputs and rows of the weight: WeightNorm1d of inputs of unit length."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * (x.square().sum(-1, keepdim=True) + self.eps).rsqrt())


class WeightNorm2d(nn.Conv2d):
    """A convolution without bias whose filters have unit length, as in WeightNorm1d."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, eps: float = 1e-5, **options: Any):
        channels = count("in_channels", in_channels), count("out_channels", out_channels)
        size = sizes("kernel_size", kernel_size)
        super().__init__(*channels, (size[0], size[-1]), bias=False, **options)
        self.eps = number("eps", eps, least=0)

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, _unit(self.weight, self.eps), None)


def _unit(weight: Tensor, eps: float) -> Tensor:
    """The weight with each of its first axis' entries divided by its length."""
    axes = tuple(range(1, weight.ndim))
    return weight * (weight.square().sum(axes, keepdim=True) + eps).rsqrt()
