"""Tangents pushed forward through a function of tensors, in the cheapest way that agrees with its gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import jvp, vmap

from nngeo.products.facts import Facts
from nngeo.products.stops import GradientStops

Run = Callable[..., Tensor]  # (*leaves) -> outputs (b, ...)
Probe = tuple[Tensor, list[Tensor]]  # w (b, ...), and the gradient J' w by each leaf


class CannotPush(Exception):
    """The function has neither forward-mode nor second derivatives."""


class Tangents:
    """Derivatives (m, b, ...) of a function along tangents (m, *shape) of its leaves.

    By forward mode, vectorised over the m rows or in a loop; or, where an operation has no forward-mode derivative or
    another one than its gradient (torch.no_grad and `padding_idx` stop gradients, but not tangents), by the derivative
    of a backward pass, linear in its cotangent. The first time, one way after the other is held to
    <w, J v> = <J' w, v> for random v and w. Where the function stops a gradient on the way, what forward mode finds is
    held to it for every batch: the data may decide where.

    Args:
        like: the outputs.
        probe: returns random w, see `random_cotangent`, and J' w.
    """

    def __init__(self, facts: Facts, run: Run, leaves: Sequence[Tensor], like: Tensor, probe: Callable[[], Probe]):
        self.facts, self.run, self.leaves, self.like, self.probe = facts, run, list(leaves), like, probe
        self._graph: tuple[Tensor, list[Tensor | None]] | None = None
        self._random: list[Tensor] | None = None
        if facts.way is None:
            generator = torch.Generator("cpu").manual_seed(1)
            self._random = [torch.randn(2, *x.shape, generator=generator, device="cpu").to(x) for x in leaves]
            probe()

    def __call__(self, tangents: Sequence[Tensor]) -> Tensor:
        """(m, b, ...).

        Raises:
            CannotPush: the model has no derivative that could do it, or another one for these data.
        """
        if self._random is not None and self.facts.way is None:
            self.facts.way = next((way for way in _WAYS if self._works(way, self._random)), "none")
        if self.facts.way is None or self.facts.way == "none":
            raise CannotPush
        with GradientStops() as stops:
            found = _WAYS[self.facts.way](self, tangents)
        if stops.found and self.forward and not self._agree(found, tangents):
            self.facts.way = None  # to be looked for anew
            raise CannotPush
        return found

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

    def _works(self, way: str, v: list[Tensor]) -> bool:
        """Whether derivatives along random tangents agree with the gradients."""
        try:
            return self._agree(_WAYS[way](self, v), v)
        except (RuntimeError, NotImplementedError, ValueError, IndexError):
            return False  # torch can't, in this way

    def _agree(self, found: Tensor, tangents: Sequence[Tensor]) -> bool:
        """Whether found (m, b, ...) are derivatives along these tangents, by the gradients."""
        w, pulled = self.probe()
        left = (found * w).flatten(1)
        right = torch.cat([(g * t).flatten(1) for g, t in zip(pulled, tangents, strict=True)], 1)
        tolerance = 10 * torch.finfo(self.like.dtype).eps ** 0.5 * (left.norm(dim=1) + right.norm(dim=1))
        difference = left.sum(1, dtype=torch.float64) - right.sum(1, dtype=torch.float64)
        return bool((difference.abs() <= tolerance).all())


def random_cotangent(like: Tensor) -> Tensor:
    """Random w (b, ...), the same for the same shape."""
    generator = torch.Generator("cpu").manual_seed(0)
    return torch.randn(like.shape, generator=generator, device="cpu").to(like)


_WAYS: dict[str, Callable[[Tangents, Sequence[Tensor]], Tensor]] = {
    "vectorized": Tangents.vectorized,
    "looped": Tangents.looped,
    "reverse": Tangents.reverse,
}
