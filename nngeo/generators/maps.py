"""Maps B(x, w) + b, linear in w and affine in x, with their derivatives written out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Part = Tensor | None


class Affine(ABC):
    """A map of x (b, ...) with a weight w and a bias b, or none."""

    @abstractmethod
    def __call__(self, x: Tensor, w: Tensor, b: Part) -> Tensor:
        """B(x, w) + b."""

    @abstractmethod
    def pull(self, g: Tensor, x: Tensor, w: Tensor, needed: Sequence[bool]) -> tuple[Part, Part, Part]:
        """Gradients by x, w and b from that by the result; None where not needed."""

    def along(self, tx: Tensor, w: Tensor) -> Tensor:
        """The derivative along a tangent of x."""
        return self(tx, w, None)

    def push(self, x: Tensor, w: Tensor, tx: Part, tw: Part, tb: Part) -> Part:
        """The derivative along tangents of x, w and b, of which None is zero."""
        found = None if tx is None else self.along(tx, w)
        if tw is None and tb is not None:
            tw = torch.zeros_like(w)
        if tw is None:
            return found
        other = self(x, tw, tb)
        return other if found is None else found.add_(other)


class Linear(Affine):
    """x (..., i), w (o, i)."""

    def __call__(self, x: Tensor, w: Tensor, b: Part) -> Tensor:
        return F.linear(x, w, b)

    def pull(self, g: Tensor, x: Tensor, w: Tensor, needed: Sequence[bool]) -> tuple[Part, Part, Part]:
        rows = g.reshape(-1, g.shape[-1])
        return (
            g @ w if needed[0] else None,
            rows.mT @ x.reshape(-1, x.shape[-1]) if needed[1] else None,
            rows.sum(0) if needed[2] else None,
        )


class Convolution(Affine):
    """x (b, i, ...), w (o, i / groups, ...)."""

    def __init__(self, stride: list[int], padding: list[int], dilation: list[int], groups: int):
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups

    def __call__(self, x: Tensor, w: Tensor, b: Part) -> Tensor:
        return torch.convolution(
            x, w, b, self.stride, self.padding, self.dilation, False, [0] * len(self.stride), self.groups
        )

    def pull(self, g: Tensor, x: Tensor, w: Tensor, needed: Sequence[bool]) -> tuple[Part, Part, Part]:
        return torch.ops.aten.convolution_backward(
            g, x, w, [len(w)], self.stride, self.padding, self.dilation, False, [0] * len(self.stride), self.groups,
            list(needed),
        )  # fmt: skip


class Norm(Affine):
    """x (b, c, ...) less a mean and divided by a standard deviation, both fixed, w (c)."""

    def __init__(self, mean: Tensor, variance: Tensor, eps: float):
        self.mean, self.variance, self.eps = mean, variance, eps

    def __call__(self, x: Tensor, w: Tensor, b: Part) -> Tensor:
        return F.batch_norm(x, self.mean, self.variance, w, b, eps=self.eps)

    def along(self, tx: Tensor, w: Tensor) -> Tensor:
        return F.batch_norm(tx, torch.zeros_like(self.mean), self.variance, w, None, eps=self.eps)

    def pull(self, g: Tensor, x: Tensor, w: Tensor, needed: Sequence[bool]) -> tuple[Part, Part, Part]:
        if len(x) == 1:  # see `any_strides`
            g, x = g.contiguous(), x.contiguous()
        return torch.ops.aten.native_batch_norm_backward(
            g, x, w, self.mean, self.variance, None, None, False, self.eps, list(needed)
        )
