"""The gradients of a loss, one for each example, as the sweep over the layers gives them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from nngeo.generators import JacobianGenerator
from nngeo.generators.batches import Function
from nngeo.variants import Cotangents, Exact, Variant

Loss = Callable[..., Tensor]


class LossGradient(Variant):
    """One cotangent, the gradient of `loss(outputs, *targets)` in the outputs; the loss is a sum over examples."""

    name = "loss"
    by_example = True

    def __init__(self, loss: Loss):
        self.loss = loss
        self._checked = False

    def exact(self, outputs: Tensor, targets: tuple[Any, ...] = (), mask: Tensor | None = None) -> Cotangents:
        f = outputs.detach().requires_grad_()
        with torch.enable_grad():
            value = self._value(f, targets)
            (c,) = torch.autograd.grad(value, f)
        if len(f) > 1 and not self._checked:
            self._check(value.detach(), f.detach(), targets)
        return Cotangents.from_tensor(c[None])

    def _value(self, f: Tensor, targets: tuple[Any, ...]) -> Tensor:
        value = self.loss(f, *targets)
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad and f.requires_grad:
            found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"`loss(outputs, *targets)` should be one number that depends on the outputs; found {found}."
            )
        return value.reshape(())

    def _check(self, value: Tensor, f: Tensor, targets: tuple[Any, ...]) -> None:
        """Raise unless the loss of a batch is the sum of those of two parts of it."""

        def part(rows: slice) -> Tensor:
            cut = [x[rows] if isinstance(x, Tensor) and x.ndim and len(x) == len(f) else x for x in targets]
            return self._value(f[rows].clone().requires_grad_(), tuple(cut)).detach()

        parts = part(slice(0, 1)) + part(slice(1, None))
        if not torch.allclose(value, parts, rtol=1e-2, atol=1e-6, equal_nan=True):
            raise ValueError(
                f"`loss` should be summed over examples: it is {value:.4g} for a batch of {len(f)}, and {parts:.4g} "
                "for its parts. Use reduction='sum'."
            )
        self._checked = True


def loss_gradients(model: nn.Module, loss: Loss, function: Function | None, verbose: bool) -> JacobianGenerator:
    """What gives a record for each layer, of one cotangent for each example."""
    return JacobianGenerator(model, Exact(LossGradient(loss)), function, verbose=verbose)
