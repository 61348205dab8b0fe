"""What all scalarizers have in common: a tensor of losses in, one number out."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from nngeo.descent.aggregation.options import Option, describe
from nngeo.linalg.precision import full_precision


class Scalarizer(ABC, nn.Module):
    """One loss (), with its graph, from losses of any shape: `forward(values)`."""

    def __init__(self) -> None:  # no arguments, where a subclass does not say so
        super().__init__()

    @abstractmethod
    def forward(self, values: Tensor, /) -> Tensor:
        """One loss () from losses (*shape), at least one."""

    @full_precision
    def __call__(self, values: Tensor, /) -> Tensor:
        if not isinstance(values, Tensor):
            hint = " Stack the losses: torch.stack(losses)." if isinstance(values, (list, tuple)) else ""
            raise TypeError(f"values should be a tensor of losses, found {type(values).__name__}.{hint}")
        if not values.numel():
            raise ValueError(f"values has no losses, its shape is {tuple(values.shape)}: was the batch empty?")
        return super().__call__(values)

    def __repr__(self) -> str:
        return describe(self)

    def __str__(self) -> str:
        return type(self).__name__


def losses_like(*, optional: bool = False) -> Option:
    """A tensor of the shape of the losses, or None where that is an option."""

    def check(name: str, value: Tensor | None) -> Tensor | None:
        if not isinstance(value, Tensor) and not (value is None and optional):
            raise TypeError(f"{name} should be a tensor of the shape of the losses, found {type(value).__name__}.")
        return value

    return Option(check)


def matching(name: str, tensor: Tensor, values: Tensor) -> Tensor:
    """The tensor, which has to have the shape of the losses, in their dtype and on their device."""
    if tensor.shape != values.shape:
        raise ValueError(f"{name} has the shape {tuple(tensor.shape)}, and the losses {tuple(values.shape)}.")
    return tensor.to(values)
