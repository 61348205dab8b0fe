"""Containers: a chain, and a chain beside the identity, concatenated or added."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nngeo.nn.blocks import Branch
from nngeo.nn.twins import Module, stands_for


@stands_for(nn.Sequential)
class Sequential(Module, nn.Sequential):
    """torch.nn.Sequential with Jacobian products. Children may be of this package, of torch.nn, or any modules.

    Its full metric on weights is the list of its children's blocks (see `jTmjp`). `add_hooks` is accepted for NNJ's
    sake; there are no hooks.

    >>> from nngeo.nn import Linear, Tanh
    >>> model = Sequential(Linear(4, 3), Tanh(), Linear(3, 2))
    >>> [block.shape for block in model.jTmjp(torch.ones(5, 4), None, None, wrt="weight")]
    [torch.Size([5, 15, 15]), torch.Size([5, 8, 8])]
    """

    def __init__(self, *modules: Any, add_hooks: bool = True):
        super().__init__(*modules)

    def __add__(self, other: nn.Sequential) -> Sequential:
        return Sequential(*super().__add__(other))

    def __mul__(self, other: int) -> Sequential:
        return Sequential(*super().__mul__(other))


class SkipConnection(Branch, Module):
    """`[x, F(x)]`, concatenated on axis 1, for the chain F of the modules, kept as `_F`.

    >>> from nngeo.nn import Linear
    >>> SkipConnection(Linear(3, 2))(torch.ones(4, 3)).shape
    torch.Size([4, 5])
    """

    def __init__(self, *modules: Any, add_hooks: bool = True):
        super().__init__()
        self._F = Sequential(*modules)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self._F(x)], dim=1)


class Residual(Branch, Module):
    """`x + F(x)` for the chain F of the modules, kept as `_F`.

    >>> from nngeo.nn import Linear
    >>> Residual(Linear(3, 3))(torch.ones(4, 3)).shape
    torch.Size([4, 3])
    """

    def __init__(self, *modules: Any, add_hooks: bool = True):
        super().__init__()
        self._F = Sequential(*modules)

    def forward(self, x: Tensor) -> Tensor:
        return x + self._F(x)
