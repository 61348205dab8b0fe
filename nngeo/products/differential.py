"""The Jacobian of a batch, example by example, as a map that carries vectors in both directions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from nngeo.products.space import Space
from nngeo.representations import Block

# Elements that may be held at once, unless the caller says otherwise: 2**24 are 64 MiB in float32.
BUDGET = 2**24


class Differential(ABC):
    """J (b, o, n) of the outputs of b examples by their inputs, or by the weights that all share."""

    domain: Space  # n
    codomain: Space  # o
    budget: int
    differentiable = False  # whether what is computed has a graph

    @abstractmethod
    def push(self, v: Tensor) -> Tensor:
        """J v (m, b, o) for v (m, b, n), or (m, 1, n) where all examples have the same."""

    @abstractmethod
    def pull(self, w: Tensor) -> Tensor:
        """J' w (k, b, n) for w (k, b, o)."""

    @abstractmethod
    def push_cost(self) -> float:
        """Multiplications of one more row of `push`, for each example."""

    @abstractmethod
    def pull_cost(self) -> float:
        """Multiplications of one more row of `pull`, for each example."""

    def _push_by_rows(self, v: Tensor) -> Tensor:
        """The same by the rows of J, where tangents can't be pushed or rows are few."""
        space = self.codomain
        step = max(1, self.budget // (space.b * self.domain.d))
        chunks = [self.pull(unit_vectors(space, start, start + step)) for start in range(0, space.d, step)]
        rows = v.expand(-1, space.b, -1)
        return torch.cat([torch.einsum("obn,mbn->mbo", chunk, rows) for chunk in chunks], -1)

    def squares(self, w: Tensor) -> Tensor:
        """(b, n), the entries of J' w squared and summed over k, for w (k, b, o)."""
        return self.pull(w).square().sum(0)

    def held(self, squared: bool = False) -> int:
        """Elements that one row of `pull`, or of `squares` and `norms`, holds for each example."""
        return self.domain.d

    def total_squares(self, w: Tensor) -> Tensor:
        """(n,), the same summed over the examples."""
        return self.squares(w).sum(0)

    def squares_cost(self) -> float:
        """Multiplications of one more row of `squares`, for each example."""
        return self.pull_cost() + self.domain.d

    def norms(self, w: Tensor) -> Tensor:
        """(k, b), |J' w|^2 for w (k, b, o)."""
        return self.pull(w).square().sum(2)

    has_kernel = False  # whether `kernel` takes no rows of J

    def kernel(self, other: Differential, blocks: Mapping[str, Block] | None = None, diag: bool = False) -> Tensor:
        """J M J' (b, o, o), or J1 M J2' with the J of another batch; with `diag`, its diagonal (b, o).

        M has a block for every block of the domain; it is the identity for None, which has no `diag`.
        """
        raise NotImplementedError

    def examples(self, rows: slice) -> Differential:
        """That of some of the examples."""
        raise NotImplementedError

    @cached_property
    def by_columns(self) -> bool:
        """Whether the whole Jacobian is had for less by columns, pushed forward, than by rows, pulled back."""
        return self.domain.d * self.push_cost() < self.codomain.d * self.pull_cost()

    def jacobian(self) -> Tensor:
        """(b, o, n)."""
        if self.by_columns:
            return self.push(unit_vectors(self.domain, 0, self.domain.d, shared=True)).permute(1, 2, 0)
        return self.pull(unit_vectors(self.codomain, 0, self.codomain.d)).transpose(0, 1)

    @property
    def T(self) -> Differential:
        """The transpose, which carries backwards what this one carries forwards."""
        return Transposed(self)


class Transposed(Differential):
    """J' (b, n, o) as a map."""

    def __init__(self, of: Differential):
        self.of = of
        self.domain, self.codomain, self.budget = of.codomain, of.domain, of.budget
        self.differentiable = of.differentiable

    def push(self, v: Tensor) -> Tensor:
        return self.of.pull(v.expand(-1, self.domain.b, -1))

    def pull(self, w: Tensor) -> Tensor:
        return self.of.push(w)

    def push_cost(self) -> float:
        return self.of.pull_cost()

    def pull_cost(self) -> float:
        return self.of.push_cost()

    def jacobian(self) -> Tensor:
        return self.of.jacobian().mT

    def examples(self, rows: slice) -> Differential:
        return Transposed(self.of.examples(rows))

    @property
    def T(self) -> Differential:
        return self.of


def finished(result: Any, at: Differential) -> Any:
    """The tensors of a result, without a graph unless it was asked for."""
    return result if at.differentiable else tree_map(Tensor.detach, result)


def unit_vectors(space: Space, start: int, stop: int, shared: bool = False) -> Tensor:
    """(stop - start, b, d), some rows of the identity for every example; with `shared`, b is 1."""
    stop = min(stop, space.d)
    rows = space.like.new_zeros(stop - start, space.d)
    rows[:, start:stop].fill_diagonal_(1)
    return rows[:, None].expand(-1, 1 if shared else space.b, -1)
