"""Convolutions: one matrix applied to every patch of the padded input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nngeo.layers.rule import LinearMapRule, register_rule

# Positions in a row below which copying patches row by row takes longer than a copy of the input for each column.
SHORT = 12


def patches(x: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> Tensor:
    """(b, c, *space) -> (b, c, *positions, *kernel), a view: of x or, where rows are short, of a copy of x."""
    last = x.ndim - 1
    for axis, size, step, spread in reversed(list(zip(range(2, x.ndim), kernel, stride, dilation, strict=True))):
        x = x.unfold(axis, (size - 1) * spread + 1, step)[..., ::spread]
        if axis == last > 2 and size > 1 and x.shape[last] < SHORT and x.device.type == "cpu":
            x = x.movedim(-1, 2).contiguous().movedim(2, -1)
    return x.permute(*range(last + 1), *range(x.ndim - 1, last, -1))


class ConvolutionRule(LinearMapRule):
    """Convolutions over any number of axes; grouped ones are n maps side by side."""

    def groups(self, module: Any) -> int:
        return module.groups

    def windows(self, module: Any, x: Tensor) -> Tensor:
        """(b, c, *space) -> (b, c, *positions, *kernel)."""
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        pads = _padding(module)
        return patches(F.pad(x, pads, mode) if any(pads) else x, module.kernel_size, module.stride, module.dilation)

    def inputs(self, module: Any, x: Tensor) -> Tensor:
        return self.with_room(module, x, bias=False)

    def with_room(self, module: Any, x: Tensor, bias: bool, by_example: bool = False) -> Tensor:
        b, m, c = x.shape[:3]
        n, space = module.groups, len(module.kernel_size)
        windows = self.windows(module, x.flatten(0, 1)).unflatten(0, (b, m)).unflatten(2, (n, c // n))
        positions, kernel = range(4, 4 + space), range(4 + space, 4 + 2 * space)
        # One copy, in which the positions come last: products over positions need them so.
        windows = windows.permute(2, 3, *kernel, 0, 1, *positions)
        i, t = windows.shape[1 : 2 + space].numel(), windows.shape[3 + space :].numel()
        out = x.new_empty(n, b, i + bias, t).transpose(1, 2) if by_example else x.new_empty(n, i + bias, b, t)
        out[:, :i].view(windows.shape).copy_(windows)
        return out.permute(0, 2, 3, 1)

    def outgrads(self, module: Any, g: Tensor) -> Tensor:
        k, b, m, c = g.shape[:4]
        n = module.groups
        g = g.reshape(k, b, m, n, c // n, -1)
        return g.permute(3, 0, 1, 2, 5, 4).flatten(3, 4)


@register_rule(nn.Conv1d, nn.Conv2d, nn.Conv3d)
class ConvRule(ConvolutionRule):
    """Convolutions with any stride, padding, padding_mode, dilation and groups."""


@register_rule(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
class ConvTransposeRule(ConvolutionRule):
    """Transposed convolutions: a convolution, by the mirrored kernel, of the input with zeros between its entries."""

    transposed = True

    def kernel(self, module: Any) -> int:
        return torch.Size(module.kernel_size).numel()

    def windows(self, module: Any, x: Tensor) -> Tensor:
        kernel, stride, dilation = module.kernel_size, module.stride, module.dilation
        sizes = [(size - 1) * step + 1 for size, step in zip(x.shape[2:], stride, strict=True)]
        spread = x.new_zeros(*x.shape[:2], *sizes)
        entries: Any = (..., *(slice(None, None, step) for step in stride))
        spread[entries] = x
        pads: list[int] = []
        for size, step, pad, extra in zip(kernel, dilation, module.padding, module.output_padding, strict=True):
            margin = (size - 1) * step - pad
            pads = [margin, margin + extra, *pads]
        axes = tuple(range(-len(kernel), 0))
        return patches(F.pad(spread, pads), kernel, (1,) * len(kernel), dilation).flip(axes)


def _padding(module: Any) -> list[int]:
    """The arguments of F.pad, last axis first."""
    pads: list[int] = []
    for axis, (size, spread) in enumerate(zip(module.kernel_size, module.dilation, strict=True)):
        if module.padding == "same":
            total = (size - 1) * spread
            pads = [total // 2, total - total // 2, *pads]
        elif module.padding == "valid":
            pads = [0, 0, *pads]
        else:
            pads = [module.padding[axis]] * 2 + pads
    return pads
