"""Normalization layers: a normalized input, scaled and shifted."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from nngeo.layers.rule import ScaleRule, register_rule


class TrailingAxesRule(ScaleRule):
    """Layers whose weight spans the last axes."""

    def positions(self, module: Any, tensor: Tensor) -> Tensor:
        return tensor.flatten(-module.weight.ndim).flatten(2, -2)


class ChannelRule(ScaleRule):
    """Layers with one weight a channel, the axis after the batch."""

    def positions(self, module: Any, tensor: Tensor) -> Tensor:
        return tensor.movedim(3, -1).flatten(2, -2)


@register_rule(nn.LayerNorm)
class LayerNormRule(TrailingAxesRule):
    """Mean and variance over the last axes."""

    def normalized(self, module: Any, x: Tensor) -> Tensor:
        return F.layer_norm(x, module.normalized_shape, eps=module.eps)


@register_rule(nn.RMSNorm)
class RMSNormRule(TrailingAxesRule):
    """Root mean square over the last axes."""

    parameters = ("weight",)

    def normalized(self, module: Any, x: Tensor) -> Tensor:
        return F.rms_norm(x, module.normalized_shape, eps=module.eps)


@register_rule(nn.GroupNorm)
class GroupNormRule(ChannelRule):
    """Mean and variance over groups of channels."""

    def normalized(self, module: Any, x: Tensor) -> Tensor:
        return F.group_norm(x, module.num_groups, eps=module.eps)


@register_rule(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
class BatchNormRule(ChannelRule):
    """Running statistics: a fixed scale and shift in eval mode."""

    def serves(self, module: Any) -> bool:
        return super().serves(module) and module.running_mean is not None  # else examples are normalized together

    def normalized(self, module: Any, x: Tensor) -> Tensor:
        mean, var = module.running_mean.to(x.dtype), module.running_var.to(x.dtype)
        return F.batch_norm(x, mean, var, eps=module.eps)


@register_rule(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
class InstanceNormRule(ChannelRule):
    """Statistics of each example's channels, or running ones."""

    def normalized(self, module: Any, x: Tensor) -> Tensor:
        if module.running_mean is None:
            return F.instance_norm(x, eps=module.eps)
        mean, var = module.running_mean.to(x.dtype), module.running_var.to(x.dtype)
        return F.batch_norm(x, mean, var, eps=module.eps)  # torch 2.6's instance norm writes to what it reads
