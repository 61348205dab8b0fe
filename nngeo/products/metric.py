"""What a product needs of a metric at one side of a Jacobian, and the Euclidean one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from nngeo.products.space import Space
from nngeo.representations import Block
from nngeo.variants import Cotangents


class Signed(NamedTuple):
    """One term `sign * sum_k c_k c_k'` of a symmetric metric, c (k, b, d)."""

    sign: float
    cotangents: Cotangents


class Metric(ABC):
    """A matrix M (d, d) for each of b examples, or one for all: over flat vectors, row by row.

    A subclass needs `check` and `apply`. `factors` is what spares products with whole Jacobians.
    """

    symmetric = True
    is_identity = False

    @abstractmethod
    def check(self, space: Space) -> None:
        """Raise unless this is a metric of the space.

        Raises:
            ValueError: a shape, dtype or device; with what is expected.
        """

    @abstractmethod
    def apply(self, v: Tensor, space: Space) -> Tensor:
        """`M v` for v (m, b, d). Differentiable in v and in the tensors of the metric."""

    def cost(self, space: Space) -> float:
        """Multiplications of `M v` for one vector."""
        return float(space.d)

    def rank(self, space: Space) -> int:
        """How many cotangents the factors have, an upper bound."""
        return space.d

    def factors_cost(self, space: Space) -> float:
        """Multiplications of `factors`, for one example."""
        return 0.0

    def factors(self, space: Space) -> list[Signed]:
        """Terms that add up to M; it must be symmetric."""
        raise NotImplementedError(f"A {type(self).__name__} metric has no factor V with M = V V'.")

    def columns(self, space: Space) -> Tensor:
        """(r, b, d), the columns of V where M = V V', differentiable in the tensors of the metric."""
        raise NotImplementedError(
            f"A {type(self).__name__} metric has no differentiable factor: with create_graph=True, result='factor' "
            "takes None, Diagonal or Factor."
        )

    def signed(self, signs: Tensor, space: Space) -> Tensor | None:
        """V s (m, b, d) for random signs s (m, b, r), where M = V V' and V is at hand; None where it is not."""
        return None

    def sign_count(self, space: Space) -> int:
        """The r of `signed`."""
        return space.d

    def examples(self, rows: slice) -> Metric:
        """The metric of some of the examples."""
        return self

    def by_layer(self, space: Space) -> Mapping[str, Block] | None:
        """One for each block of the space, where M is block-diagonal over layers and they are at hand; else None."""
        return None

    def transposed(self) -> Metric:
        """M'."""
        return self

    def symmetric_part(self) -> Metric:
        """A metric with the same v' M v; (M + M') / 2 where that is as cheap to hold."""
        return self


@dataclass(frozen=True)
class Identity(Metric):
    """The Euclidean metric."""

    is_identity = True

    def check(self, space: Space) -> None:
        pass

    def apply(self, v: Tensor, space: Space) -> Tensor:
        return v

    def factors(self, space: Space) -> list[Signed]:
        return [Signed(1.0, diagonal(space.like.new_ones(1, 1).expand(space.b, space.d)))]

    def cost(self, space: Space) -> float:
        return 0.0

    def columns(self, space: Space) -> Tensor:
        return torch.eye(space.d).to(space.like)[:, None].expand(-1, space.b, -1)

    def signed(self, signs: Tensor, space: Space) -> Tensor | None:
        return signs


def of_examples(tensor: Tensor, axes: int, rows: slice) -> Tensor:
    """Some examples of a tensor that has an axis of examples in front of `axes` others; or the tensor that has none."""
    return tensor[rows] if tensor.ndim > axes else tensor


def cotangents(v: Tensor, space: Space) -> Cotangents:
    """The columns of v (b, d, r) or (d, r) as cotangents (r, b, d)."""
    return Cotangents.from_tensor(rows_of(v, space))


def rows_of(v: Tensor, space: Space) -> Tensor:
    """(r, b, d) of (b, d, r) or (d, r)."""
    rows = v.movedim(-1, 0)
    return rows if v.ndim == 3 else rows[:, None].expand(-1, space.b, -1)


def check_shape(tensor: Tensor, kind: str, name: str, space: Space, shape: tuple[int, ...]) -> None:
    """Raise unless a tensor of a metric has this shape, or the same behind an axis of examples."""
    space.check_kind(tensor, f"{kind}.{name}")
    if tensor.shape not in (shape, (space.b, *shape)):
        raise ValueError(
            f"The metric {kind} has `{name}` of shape {tuple(tensor.shape)}; for the {space.what} ({space.d} of "
            f"each of {space.b} examples) it should be {shape} or {(space.b, *shape)}."
        )


def diagonal(root: Tensor) -> Cotangents:
    """Those of the metric diag(root^2), for root (b, d)."""
    return Cotangents.diagonal(root)
