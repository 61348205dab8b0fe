"""The user's model comes back as it was; also after an exception."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Restore buffers, `requires_grad` flags, `.grad` and tensors kept as attributes of the model on leaving.

    Parameters are never written to by nngeo. Buffers are copied, because a model's forward may write to them.
    """
    parameters = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    attributes = [(vars(module), _tensors(module)) for module in model.modules()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in buffers:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)
        for p, flag, grad in parameters:
            p.requires_grad_(flag)
            p.grad = grad
        for values, before in attributes:
            for name in [name for name, value in values.items() if isinstance(value, Tensor) and name not in before]:
                del values[name]
            values.update(before)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in vars(module).items() if isinstance(value, Tensor)}
