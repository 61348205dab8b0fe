"""Tangents pushed forward through a function of tensors, in the cheapest way that agrees with its gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import jvp, vmap

from nngeo.products.facts import Facts

Run = Callable[..., Tensor]  # (*leaves) -> outputs (b, ...)
Pull = Callable[[Tensor], Sequence[Tensor]]  # w (b, ...) -> the gradient by each leaf


class CannotPush(Exception):
    """The function has neither forward-mode nor second derivatives."""


class Tangents:
    """Derivatives (m, b, ...) of a function along tangents (m, *shape) of its leaves.

    By forward mode, vectorised over the m rows or in a loop; or, where an operation has no forward-mode derivative or
    another one than its gradient (torch.no_grad and `padding_idx` stop gradients, but not tangents), by the derivative
    of a backward pass, linear in its cotangent. The first time, one way after the other is held to
    <w, J v> = <J' w, v> for random v and w.

    Args:
        like: the outputs.
        pull: gradients; used here only, the first time.
    """

    def __init__(self, facts: Facts, run: Run, leaves: Sequence[Tensor], like: Tensor, pull: Pull):
        self.facts, self.run, self.leaves, self.like = facts, run, list(leaves), like
        self._graph: tuple[Tensor, list[Tensor | None]] | None = None
        self._random: tuple[Tensor, list[Tensor], Tensor] | None = None
        if facts.way is None:
            generator = torch.Generator("cpu").manual_seed(0)
            w = torch.randn(like.shape, generator=generator, device="cpu").to(like)
            v = [torch.randn(2, *x.shape, generator=generator, device="cpu").to(x) for x in leaves]
            inner = [(g * t).double().reshape(2, -1) for g, t in zip(pull(w), v, strict=True)]
            self._random = w, v, torch.cat(inner, 1)

    def __call__(self, tangents: Sequence[Tensor]) -> Tensor:
        """(m, b, ...).

        Raises:
            CannotPush: the model has no derivative that could do it.
        """
        if self._random is not None and self.facts.way is None:
            self.facts.way = next((way for way in _WAYS if self._agrees(way, *self._random)), "none")
        if self.facts.way is None or self.facts.way == "none":
            raise CannotPush
        return _WAYS[self.facts.way](self, tangents)

    @property
    def forward(self) -> bool:
        """Whether forward mode is known to do."""
        return self.facts.way in ("vectorized", "looped")

    def vectorized(self, tangents: Sequence[Tensor]) -> Tensor:
        """In forward mode, all rows at once."""
        if len(tangents[0]) > 1:
            try:
                return vmap(self._one)(*tangents)
            except RuntimeError:  # of other inputs than those that it was tried on, or of too many rows for the memory
                if self._random is not None:
                    raise
        return self.looped(tangents)

    def looped(self, tangents: Sequence[Tensor]) -> Tensor:
        """In forward mode, row by row."""
        return torch.stack([self._one(*(t[j] for t in tangents)) for j in range(len(tangents[0]))])

    def reverse(self, tangents: Sequence[Tensor]) -> Tensor:
        """By a backward through the graph of a backward."""
        if self._graph is None:
            leaves = [leaf.detach().requires_grad_() for leaf in self.leaves]
            with torch.enable_grad():
                outputs = self.run(*leaves)
                w = torch.zeros_like(outputs, requires_grad=True)
                grads: Sequence[Tensor | None] = [None] * len(leaves)
                if outputs.requires_grad:
                    grads = torch.autograd.grad(outputs, leaves, w, create_graph=True, allow_unused=True)
            self._graph = w, list(grads)
        w, pulled = self._graph
        pairs = [(g, t) for g, t in zip(pulled, tangents, strict=True) if g is not None and g.requires_grad]
        found = None
        if pairs:
            (found,) = self.facts.push([g for g, _ in pairs], [w], [t for _, t in pairs], 1)
        return self.like.new_zeros(len(tangents[0]), *self.like.shape) if found is None else found.detach()

    def _one(self, *tangents: Tensor) -> Tensor:
        found: Any = jvp(self.run, tuple(self.leaves), tangents)
        return found[1]

    def _agrees(self, way: str, w: Tensor, v: list[Tensor], inner: Tensor) -> bool:
        """Whether derivatives along random tangents agree with the gradients."""
        try:
            found = (_WAYS[way](self, v) * w).double().flatten(1)
        except (RuntimeError, NotImplementedError, ValueError, IndexError):
            return False  # torch can't, in this way
        tolerance = 10 * torch.finfo(self.like.dtype).eps ** 0.5 * (found.norm(dim=1) + inner.norm(dim=1))
        return bool(((found.sum(1) - inner.sum(1)).abs() <= tolerance).all())


_WAYS: dict[str, Callable[[Tangents, Sequence[Tensor]], Tensor]] = {
    "vectorized": Tangents.vectorized,
    "looped": Tangents.looped,
    "reverse": Tangents.reverse,
}
