"""Metrics with a structure: block-diagonal, Kronecker, the matrices over parameters; and what is taken for a metric."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor

from nngeo.linalg.arguments import shown
from nngeo.products.metrics import Dense, Identity, Metric, Signed, check_shape, of_examples
from nngeo.products.space import Space
from nngeo.representations import Block, LayerwisePMat, PFMapDense, PMat
from nngeo.representations.estimate import check_kind
from nngeo.variants import Cotangents


@dataclass(frozen=True)
class BlockDiagonal(Metric):
    """A matrix (b, p, p), or (p, p), for each layer, by its name; for the inputs, by the names of the arguments.

    >>> from nngeo.products import jmjTp
    >>> model = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Linear(1, 1))
    >>> jmjTp(model, torch.zeros(1, 1), BlockDiagonal({"0": torch.zeros(2, 2), "1": 3 * torch.eye(2)}), "weight").shape
    torch.Size([1, 1, 1])
    """

    blocks: Mapping[str, Tensor]

    @property
    def symmetric(self) -> bool:  # type: ignore[override]
        """Whether all blocks equal their transposes."""
        return all(Dense(block).symmetric for block in self.blocks.values())

    def check(self, space: Space) -> None:
        if not isinstance(self.blocks, Mapping):
            raise TypeError(f"BlockDiagonal should have a dict of blocks (p, p) by name; got {shown(self.blocks)}.")
        if set(self.blocks) != set(space.sizes):
            raise ValueError(
                f"The metric BlockDiagonal has blocks {list(self.blocks)}; for the {space.what} they should be "
                f"{list(space.sizes)}."
            )
        for name, size in space.sizes.items():
            check_shape(self.blocks[name], "BlockDiagonal", f"blocks[{name!r}]", space, (size, size))

    def apply(self, v: Tensor, space: Space) -> Tensor:
        parts = v.split(list(space.sizes.values()), -1)
        return torch.cat([Dense(self.blocks[n]).apply(x, space) for n, x in zip(space.sizes, parts, strict=True)], -1)

    def factors(self, space: Space) -> list[Signed]:
        """By an eigendecomposition of every block."""
        found = []
        for name, place in space.slices().items():
            own = Space(space.what, space.b, {name: space.sizes[name]}, space.like)
            for sign, c in Dense(self.blocks[name]).factors(own):
                found.append(Signed(sign, _embedded(c, place, space)))
        return found

    def cost(self, space: Space) -> float:
        return float(sum(size**2 for size in space.sizes.values()))

    def factors_cost(self, space: Space) -> float:
        return 25.0 * sum(size**3 for size in space.sizes.values())

    def examples(self, rows: slice) -> BlockDiagonal:
        return BlockDiagonal({name: of_examples(block, 2, rows) for name, block in self.blocks.items()})

    def transposed(self) -> BlockDiagonal:
        return BlockDiagonal({name: block.mT for name, block in self.blocks.items()})

    def symmetric_part(self) -> BlockDiagonal:
        return BlockDiagonal({name: (block + block.mT) / 2 for name, block in self.blocks.items()})


def _embedded(c: Cotangents, place: slice, space: Space) -> Cotangents:
    """Those of one block, zero elsewhere."""

    def chunk(start: int, stop: int) -> Tensor:
        part = c.chunk(start, stop)
        whole = part.new_zeros(len(part), space.b, space.d)
        whole[..., place] = part
        return whole

    def metric(v: Tensor) -> Tensor:
        product = torch.zeros_like(v)
        product[..., place] = c.metric(v[..., place])
        return product

    return Cotangents(c.count, chunk, metric)


@dataclass(frozen=True)
class Kronecker(Metric):
    """The Kronecker product of a (b, i, i) or (i, i) and b (b, j, j) or (j, j), n = i j: `M (x y') = (a x) (b y)'`.

    >>> from nngeo.products import jTmjp
    >>> jTmjp(torch.nn.Identity(), torch.zeros(1, 2), Kronecker(torch.tensor([[4.0]]), torch.eye(2)))
    tensor([[[4., 0.],
             [0., 4.]]])
    """

    a: Tensor
    b: Tensor

    @property
    def symmetric(self) -> bool:  # type: ignore[override]
        """Whether both factors equal their transposes."""
        return Dense(self.a).symmetric and Dense(self.b).symmetric

    def check(self, space: Space) -> None:
        for name, part in (("a", self.a), ("b", self.b)):
            size = part.shape[-1] if isinstance(part, Tensor) and part.ndim else 0
            check_shape(part, "Kronecker", name, space, (size, size))
        if self.a.shape[-1] * self.b.shape[-1] != space.d:
            raise ValueError(
                f"The metric Kronecker has factors of {self.a.shape[-1]} and {self.b.shape[-1]} rows; for the "
                f"{space.what} their product should be {space.d}."
            )

    def apply(self, v: Tensor, space: Space) -> Tensor:
        m, b, _ = v.shape
        x = v.reshape(m, b, self.a.shape[-1], self.b.shape[-1])
        return (self.a @ x @ self.b.mT).reshape(m, b, -1)

    def factors(self, space: Space) -> list[Signed]:
        found = []
        for s, x in self._roots(self.a):
            for t, y in self._roots(self.b):
                found.append(Signed(s * t, self._products(x, y, space)))
        return found

    def _roots(self, part: Tensor) -> list[tuple[float, Tensor]]:
        size = part.shape[-1]
        one = Space("factor", len(part) if part.ndim == 3 else 1, {"": size}, part)
        return [(term.sign, term.cotangents.all()) for term in Dense(part).factors(one)]

    def _products(self, x: Tensor, y: Tensor, space: Space) -> Cotangents:
        """Those of all pairs of x (k, b or 1, i) and y (l, b or 1, j)."""

        def chunk(start: int, stop: int) -> Tensor:
            at = torch.arange(start, min(stop, len(x) * len(y)), device=x.device)
            pairs = x[at // len(y)][..., :, None] * y[at % len(y)][..., None, :]
            return pairs.flatten(-2).expand(-1, space.b, -1)

        return Cotangents(len(x) * len(y), chunk, lambda v: self.apply(v[None], space)[0])

    def cost(self, space: Space) -> float:
        return float(space.d * (self.a.shape[-1] + self.b.shape[-1]))

    def examples(self, rows: slice) -> Kronecker:
        return Kronecker(of_examples(self.a, 2, rows), of_examples(self.b, 2, rows))

    def transposed(self) -> Kronecker:
        return Kronecker(self.a.mT, self.b.mT)


@dataclass(frozen=True)
class OfParameters(Metric):
    """Any PMat: the covariance of the weights, say."""

    matrix: PMat

    def check(self, space: Space) -> None:
        if space.layers is None:
            raise ValueError(
                f"A {type(self.matrix).__name__} is a metric over parameters; here it should be one over the "
                f'{space.what}. Use it in jmjTp(..., wrt="weight").'
            )

        own = self.matrix.layer_collection
        if not space.layers.covers(own):
            raise ValueError(
                f"The metric {type(self.matrix).__name__} is over the layers {', '.join(own)} of another "
                f"LayerCollection; the {space.what} here are those of {', '.join(space.layers)}. Make the matrix from "
                "this model, or choose its layers by layer_collection=."
            )

    def apply(self, v: Tensor, space: Space) -> Tensor:
        if space.layers is None or space.layers == self.matrix.layer_collection:
            return self.matrix.mv(v)
        return self.matrix.mv(PFMapDense(space.layers, data=v)).data

    def cost(self, space: Space) -> float:
        return 20.0 * space.d

    def factors_cost(self, space: Space) -> float:
        return 25.0 * space.d**3

    def factors(self, space: Space) -> list[Signed]:
        """By the eigenvectors of the dense matrix, O(P^3)."""
        eye = torch.eye(space.d).to(space.like)[:, None]
        return Dense(self.apply(eye, space)[:, 0]).factors(space)


@dataclass(frozen=True)
class OfLayers(OfParameters):
    """A PMat with one Block for each layer."""

    matrix: LayerwisePMat

    def check(self, space: Space) -> None:
        super().check(space)
        check_kind(space.like, type(self.matrix).__name__, self.matrix.dtype, self.matrix.device)

    def by_layer(self, space: Space) -> dict[str, Block] | None:
        return self.matrix.data if set(self.matrix.data) == set(space.sizes) else None


@singledispatch
def as_metric(metric: Any) -> Metric:
    """What a user gives as a metric: None is the identity, a tensor (b, n, n) or (n, n) a dense one.

    Raises:
        TypeError: it is none of them; with a list of the kinds of metrics.
    """
    raise TypeError(
        f"`metric` is a {type(metric).__name__}; give None, a tensor (b, n, n) or (n, n), Diagonal, Dense, Factor, "
        "LowRankPlusDiagonal, BlockDiagonal, Kronecker, Softmax or, over parameters, a PMat."
    )


@as_metric.register(type(None))
def _(metric: None) -> Metric:
    return Identity()


@as_metric.register(Metric)
def _(metric: Metric) -> Metric:
    return metric


@as_metric.register(PMat)
def _(metric: PMat) -> Metric:
    return OfParameters(metric)


@as_metric.register(LayerwisePMat)
def _(metric: LayerwisePMat) -> Metric:
    return OfLayers(metric)


@as_metric.register(Tensor)
def _(metric: Tensor) -> Metric:
    if metric.ndim not in (2, 3) or metric.shape[-1] != metric.shape[-2]:
        raise ValueError(
            f"`metric` is a tensor of shape {tuple(metric.shape)}; a tensor means a dense metric (b, n, n) or (n, n). "
            "Say Diagonal(d) for d (b, n) or (n,), Factor(v) for v (b, n, r) or (n, r)."
        )
    return Dense(metric)
