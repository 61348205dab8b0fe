"""Metrics with a structure: block-diagonal, Kronecker, softmax, and the matrices over parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor

from nngeo.products.metrics import Dense, Identity, Metric, Signed, check_shape, of_examples
from nngeo.products.space import Space
from nngeo.representations import PFMapDense, PMat
from nngeo.variants import Cotangents, make_variant


@dataclass(frozen=True)
class BlockDiagonal(Metric):
    """A matrix (b, p, p), or (p, p), for each layer, by its name; for the inputs, by the names of the arguments.

    >>> BlockDiagonal({"0": torch.eye(2)}).blocks["0"].shape
    torch.Size([2, 2])
    """

    blocks: Mapping[str, Tensor]

    @property
    def symmetric(self) -> bool:  # type: ignore[override]
        """Whether all blocks equal their transposes."""
        return all(Dense(block).symmetric for block in self.blocks.values())

    def check(self, space: Space) -> None:
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
        dense = torch.zeros(space.b, space.d, space.d).to(space.like)
        for name, place in space.slices().items():
            dense[:, place, place] = self.blocks[name]
        return Dense(dense).factors(space)

    def cost(self, space: Space) -> float:
        return float(sum(size**2 for size in space.sizes.values()))

    def factors_cost(self, space: Space) -> float:
        return 25.0 * space.d**3

    def examples(self, rows: slice) -> BlockDiagonal:
        return BlockDiagonal({name: of_examples(block, 2, rows) for name, block in self.blocks.items()})

    def transposed(self) -> BlockDiagonal:
        return BlockDiagonal({name: block.mT for name, block in self.blocks.items()})


@dataclass(frozen=True)
class Kronecker(Metric):
    """The Kronecker product of a (b, i, i) or (i, i) and b (b, j, j) or (j, j), n = i j: `M (x y') = (a x) (b y)'`.

    >>> Kronecker(torch.eye(2), torch.eye(3)).rank  # doctest: +ELLIPSIS
    <bound method ...>
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
class Softmax(Metric):
    """diag(p) - p p' at every position, for p = softmax(logits) along the axis `dim` of logits (b, ...).

    It is the Fisher metric of class probabilities, never formed. The logits have the shape of the outputs.

    >>> from nngeo.products.space import Space
    >>> logits = torch.zeros(1, 2)
    >>> Softmax(logits).apply(torch.tensor([[[1.0, 0.0]]]), Space("outputs", 1, {"": 2}, logits))
    tensor([[[ 0.2500, -0.2500]]])
    """

    logits: Tensor
    dim: int = -1

    def check(self, space: Space) -> None:
        space.check_kind(self.logits, "Softmax.logits")
        shape = self.logits.shape
        if not shape or len(shape) < 2 or shape[0] != space.b or shape[1:].numel() != space.d:
            raise ValueError(
                f"The metric Softmax has logits of shape {tuple(shape)}; for the {space.what} they should have "
                f"{space.b} examples with {space.d} entries each."
            )

    def apply(self, v: Tensor, space: Space) -> Tensor:
        p = self._rows(self.logits).softmax(-1)
        x = self._rows(v.reshape(len(v), *self.logits.shape), lead=1)
        # The metric ignores constants: without the one at the likeliest class nothing cancels when p is almost one.
        x = x - x.gather(-1, p.argmax(-1, keepdim=True).expand(*x.shape[:-1], 1))
        product = p * (x - (p * x).sum(-1, keepdim=True))
        return product.movedim(-1, self._axis + 1).reshape(v.shape)

    @property
    def _axis(self) -> int:
        return self.dim % self.logits.ndim

    def _rows(self, x: Tensor, lead: int = 0) -> Tensor:
        return x.movedim(self._axis + lead, -1)

    def factors(self, space: Space) -> list[Signed]:
        """C - 1 cotangents for each position (Tanabe & Sagae, 1992)."""
        rows = self._rows(self.logits.detach())
        if rows.shape[-1] < 2:
            return [Signed(1.0, Cotangents.from_tensor(rows.new_zeros(1, space.b, space.d)))]
        c = make_variant("token_logits", ignore_index=None).exact(rows)

        def chunk(start: int, stop: int) -> Tensor:
            return c.chunk(start, stop).movedim(-1, self._axis + 1).flatten(2)

        return [Signed(1.0, Cotangents(c.count, chunk, lambda v: self.apply(v[None], space)[0]))]

    def signed(self, signs: Tensor, space: Space) -> Tensor | None:
        """By the root `(I - p 1') diag(sqrt p)`."""
        p = self._rows(self.logits).softmax(-1)
        x = p.sqrt() * self._rows(signs.reshape(len(signs), *self.logits.shape), lead=1)
        return (x - p * x.sum(-1, keepdim=True)).movedim(-1, self._axis + 1).reshape(signs.shape)

    def rank(self, space: Space) -> int:
        classes = self.logits.shape[self._axis]
        return max(1, space.d // classes * (classes - 1))

    def examples(self, rows: slice) -> Softmax:
        return Softmax(self.logits[rows], self._axis)


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

    def apply(self, v: Tensor, space: Space) -> Tensor:
        if space.layers == self.matrix.layer_collection:
            return self.matrix.mv(v)
        assert space.layers is not None
        return self.matrix.mv(PFMapDense(space.layers, data=v)).data

    def cost(self, space: Space) -> float:
        return 20.0 * space.d

    def factors_cost(self, space: Space) -> float:
        return 25.0 * space.d**3

    def factors(self, space: Space) -> list[Signed]:
        """By the eigenvectors of the dense matrix, O(P^3)."""
        eye = torch.eye(space.d).to(space.like)[:, None]
        return Dense(self.apply(eye, space)[:, 0]).factors(space)


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


@as_metric.register(Tensor)
def _(metric: Tensor) -> Metric:
    if metric.ndim not in (2, 3) or metric.shape[-1] != metric.shape[-2]:
        raise ValueError(
            f"`metric` is a tensor of shape {tuple(metric.shape)}; a tensor means a dense metric (b, n, n) or (n, n). "
            "Say Diagonal(d) for d (b, n) or (n,), Factor(v) for v (b, n, r) or (n, r)."
        )
    return Dense(metric)
