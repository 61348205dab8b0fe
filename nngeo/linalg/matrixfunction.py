"""Functions of a symmetric matrix, differentiable in it also where eigenvalues coincide (Daleckii & Krein, 1965)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nngeo.linalg.decompose import eigh
from nngeo.linalg.spectrum import cleaned


class _MatrixFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, vectors: Tensor, values: Tensor, new: Tensor, slopes: Tensor) -> Tensor:
        ctx.save_for_backward(vectors, values, new, slopes)
        return (vectors * new[..., None, :]) @ vectors.mT

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        vectors, values, new, slopes = ctx.saved_tensors
        gaps = values[..., None] - values[..., None, :]
        # The mean of the slopes is off by the square of the gap, the quotient by rounding divided by it.
        near = gaps.abs() <= torch.finfo(values.dtype).eps ** (1 / 3) * values.abs().amax(-1)[..., None, None]
        quotients = (new[..., None] - new[..., None, :]) / gaps.masked_fill(near, 1.0)
        quotients = torch.where(near, (slopes[..., None] + slopes[..., None, :]) / 2, quotients)
        return vectors @ (quotients * (vectors.mT @ grads[0] @ vectors)) @ vectors.mT, None, None, None, None


def matrix_function(tensor: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
    """(..., p, p), f applied to the eigenvalues of symmetric matrices (..., p, p); differentiable once, O(p^3)."""
    values, vectors = eigh(tensor.detach())
    with torch.enable_grad():
        values = cleaned(values).requires_grad_()
        new = f(values)
        (slopes,) = torch.autograd.grad(new.sum(), values, allow_unused=True, materialize_grads=True)
    return _MatrixFunction.apply(tensor, vectors, values.detach(), new.detach(), slopes)
