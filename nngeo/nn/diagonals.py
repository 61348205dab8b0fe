"""How diagonals pass the layers and containers of this package, for `diag_backprop`."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from nngeo.nn.containers import Residual, SkipConnection
from nngeo.nn.layers import Reshape, Sinusoidal, TruncExp
from nngeo.products.diagrules import (
    Collected,
    DiagRule,
    ElementwiseRule,
    Passage,
    SelectionRule,
    Visit,
    register_diag_rule,
)

register_diag_rule(Sinusoidal, TruncExp)(ElementwiseRule)
register_diag_rule(Reshape)(SelectionRule)


class BesideIdentity(DiagRule):
    """A chain F beside the identity."""

    def forward(self, module: Any, x: Tensor, visit: Visit) -> Passage:
        chain = visit(module._F, x)
        return Passage(module, self, x, self.joined(x, chain.y), [chain])

    def pull(self, call: Passage, m: Tensor, found: Collected, below: bool) -> Tensor | None:
        (chain,) = call.children
        direct, inner = self.divided(call, m)
        through = chain.rule.pull(chain, inner, found, below) if below or chain.wanted(found) else None
        return direct if through is None else direct + through

    def push(self, call: Passage, s: Tensor | None, given: Collected) -> Tensor | None:
        (chain,) = call.children
        through = chain.rule.push(chain, s, given)
        if s is None and through is None:
            return None
        return self.joined(_or_zeros(s, call.x), _or_zeros(through, chain.y))

    @abstractmethod
    def joined(self, x: Tensor, y: Tensor) -> Tensor:
        """The output, or its diagonal, from those of x and F(x)."""

    @abstractmethod
    def divided(self, call: Passage, m: Tensor) -> tuple[Tensor, Tensor]:
        """The diagonals at x and at F(x)."""


@register_diag_rule(SkipConnection)
class Concatenation(BesideIdentity):
    """Nothing is lost but in F."""

    def joined(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.cat([x, y], 1)

    def divided(self, call: Passage, m: Tensor) -> tuple[Tensor, Tensor]:
        direct, inner = m.tensor_split([call.x.shape[1]], 1)
        return direct, inner


@register_diag_rule(Residual)
class Addition(BesideIdentity):
    """x and F(x) are taken for independent: `2 m diag(J_F)` is lost."""

    def joined(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y

    def divided(self, call: Passage, m: Tensor) -> tuple[Tensor, Tensor]:
        return m, m


def _or_zeros(s: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if s is None else s
