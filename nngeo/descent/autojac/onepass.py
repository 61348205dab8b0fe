"""The Gramian from one vectorised backward pass that holds the Jacobian of one parameter at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nngeo.descent.autojac.combine import products
from nngeo.descent.autojac.rows import Rows, vectorized_gradients


def streamed_gramian(rows: Rows, inputs: Sequence[Tensor]) -> Tensor:
    """`J J'` (m, m) of rows that vmap can differentiate; the graph is kept.

    The Jacobian (m, *shape) of a leaf is dropped as soon as its inner products are added.
    """
    total = _Total(len(rows))
    handles = [x.register_hook(total.take if x.is_leaf else total.look) for x in inputs]
    try:
        vectorized_gradients(*rows.part(0, len(rows)), inputs, retain_graph=True)
    finally:
        for handle in handles:
            handle.remove()
    return products(inputs[0].new_zeros(len(rows), 0)) if total.gramian is None else total.gramian


class _Total:
    """A Gramian that grows with every gradient that passes by."""

    def __init__(self, m: int) -> None:
        self.m = m
        self.gramian: Tensor | None = None

    def add(self, jacobian: Tensor) -> None:
        new = products(jacobian)
        self.gramian = new if self.gramian is None else self.gramian + new.to(self.gramian)

    def take(self, gradient: Tensor) -> Tensor:
        """A zero in place of the gradient, which then takes no memory: nothing lies below a leaf."""
        _Look.apply(gradient, self)
        return gradient.new_zeros(()).expand(gradient.shape)

    def look(self, gradient: Tensor) -> None:
        _Look.apply(gradient, self)


class _Look(torch.autograd.Function):
    """Shows a total all rows of a gradient at once: what vmap hands to a function with a rule of its own."""

    @staticmethod
    def forward(gradient: Tensor, total: _Total) -> Tensor:
        # Not one of vmap's tensors: the same gradient for every row.
        total.add(gradient.expand(total.m, *gradient.shape))
        return gradient.new_zeros(())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, None], gradient: Tensor, total: _Total) -> tuple[Tensor, None]:
        if in_dims[0] is None:
            return _Look.apply(gradient, total), None
        total.add(gradient.movedim(in_dims[0], 0))
        return gradient.new_zeros(()), None
