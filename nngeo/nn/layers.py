"""Layers that torch.nn does not have, or has with other arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from nngeo.linalg.arguments import count, number
from nngeo.nn.abstract import AbstractDiagonalJacobian
from nngeo.nn.twins import Module, stands_for


@stands_for(nn.Conv2d)
class Conv2d(Module, nn.Conv2d):
    """torch.nn.Conv2d with Jacobian products. `use_vmap_for_backprop` is accepted for NNJ's sake.

    >>> Conv2d(1, 2, 3).jacobian(torch.ones(1, 1, 4, 4)).shape
    torch.Size([1, 8, 16])
    """

    def __init__(self, *args: Any, use_vmap_for_backprop: bool = True, **kwargs: Any):
        super().__init__(*args, **kwargs)


class Reshape(AbstractDiagonalJacobian, Module):
    """Each example in another shape: (b, ...) to (b, *dims). One of `dims` may be -1.

    >>> Reshape(2, 3)(torch.ones(4, 6)).shape
    torch.Size([4, 2, 3])
    """

    def __init__(self, *dims: int):
        super().__init__()
        self.dims = tuple(count("dims", d, least=-1) for d in dims)
        if self.dims.count(-1) > 1:
            raise ValueError(f"`dims` are {self.dims}; only one of them may be -1.")

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(len(x), *self.dims)

    def extra_repr(self) -> str:
        return ", ".join(map(str, self.dims))


class Sinusoidal(AbstractDiagonalJacobian, Module):
    """The sine of each entry.

    >>> Sinusoidal()(torch.zeros(1))
    tensor([0.])
    """

    def forward(self, x: Tensor) -> Tensor:
        return x.sin()


class TruncExp(AbstractDiagonalJacobian, Module):
    """The exponential of each entry, with the derivative `exp(clamp(x, -15, 15))`.

    Large entries then have a gradient that neither overflows nor vanishes.

    >>> TruncExp().jacobian(torch.tensor([[0.0, 50.0]]), diag=True).log()
    tensor([[ 0., 15.]])
    """

    def forward(self, x: Tensor) -> Tensor:
        return _TruncExp.apply(x)


class L2Norm(Module):
    """Each example divided by its Euclidean norm plus `eps`.

    >>> L2Norm()(torch.tensor([[3.0, 4.0]]))
    tensor([[0.6000, 0.8000]])
    """

    def __init__(self, eps: float = 1e-6):
        super().__init__()
        self.eps = number("eps", eps, least=0)

    def forward(self, x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=tuple(range(1, x.ndim)), keepdim=True)
        return x / (norm + self.eps)

    def extra_repr(self) -> str:
        return f"eps={self.eps}"


class _TruncExp(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.exp()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return g * x.clamp(-15, 15).exp()

    @staticmethod
    def jvp(ctx: Any, along: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return along * x.clamp(-15, 15).exp()
