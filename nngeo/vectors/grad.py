"""Gradients with respect to vectors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nngeo.linalg.arguments import flag, instance, tensor
from nngeo.linalg.precision import full_precision
from nngeo.vectors.pvector import PVector


@full_precision
def grad(scalar: Tensor, pvector: PVector, *, allow_unused: bool = False, **options: Any) -> PVector:
    """The gradient of a scalar with respect to a PVector, in the PVector's representation.

    The scalar must have been computed from the PVector's own tensors: the flat one, or those of the parameters. One
    that it does not depend on is an error, or zero with `allow_unused=True`. Other options (`create_graph`,
    `retain_graph`) go to torch.autograd.grad.

    >>> model = torch.nn.Linear(2, 1)
    >>> w = PVector.from_model(model)
    >>> (grad(w.dot(w), w) - 2 * w).norm() < 1e-6
    tensor(True)
    """
    instance("pvector", pvector, PVector)
    flag("allow_unused", allow_unused)
    if tensor("scalar", scalar, "with one number").numel() != 1:
        raise ValueError(f"`scalar` must hold one number; found shape {tuple(scalar.shape)}.")
    names = ["vector_repr"] if pvector.vector_repr is not None else pvector.layer_collection.names
    tensors = dict(zip(names, pvector._tensors(), strict=True))
    used = {name: x for name, x in tensors.items() if x.requires_grad}
    if not used or not scalar.requires_grad:
        raise ValueError(
            "The scalar does not depend on the PVector: "
            + ("none of its tensors requires a gradient." if not used else "it has no graph.")
        )
    found = torch.autograd.grad(scalar, list(used.values()), allow_unused=True, **options)
    grads = {name: g for name, g in zip(used, found, strict=True) if g is not None}
    unused = [name for name in tensors if name not in grads]
    if unused and not allow_unused:
        raise ValueError(f"The scalar does not depend on {', '.join(unused)}: pass allow_unused=True for zeros there.")
    return pvector._with(
        [grads[name] if name in grads else torch.zeros_like(x).detach() for name, x in tensors.items()]
    )
