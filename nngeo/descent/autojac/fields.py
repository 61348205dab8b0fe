"""The fields `.jac` and `.grad` of tensors, written only once all is known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor


def jac_of(tensor: Tensor) -> Tensor | None:
    """The Jacobian (m, *shape) that a tensor holds."""
    return getattr(tensor, "jac", None)


def accumulate_jacs(name: str, tensors: Sequence[Tensor], jacobians: Sequence[Tensor]) -> None:
    """Adds Jacobians to `.jac`, none where one of them does not fit."""
    for i, (tensor, jacobian) in enumerate(zip(tensors, jacobians, strict=True)):
        held = jac_of(tensor)
        if held is not None and held.shape != jacobian.shape:
            raise ValueError(
                f"{name}[{i}].jac has shape {tuple(held.shape)} from an earlier backward, and {tuple(jacobian.shape)} "
                "cannot be added to it: call jac_to_grad first, which clears it, or set it to None."
            )
    for tensor, jacobian in zip(tensors, jacobians, strict=True):
        held = jac_of(tensor)
        # Not in place: what is held may be shared, and this takes the memory of one tensor at a time only.
        cast(Any, tensor).jac = jacobian if held is None else held + jacobian


def clear_jacs(tensors: Sequence[Tensor]) -> None:
    """Removes `.jac`."""
    for tensor in tensors:
        del cast(Any, tensor).jac


@torch.no_grad()
def accumulate_grads(tensors: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    """Adds gradients to `.grad`, in place where there is one."""
    for tensor, gradient in zip(tensors, gradients, strict=True):
        if tensor.grad is None:
            tensor.grad = gradient
        elif tensor.grad.layout == torch.strided:
            tensor.grad += gradient
        else:
            tensor.grad = gradient + tensor.grad
