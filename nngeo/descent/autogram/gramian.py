"""Gramians of the rows of J, layer by layer, in float64, in blocks where not all rows are to be held."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from nngeo.descent.autogram.graph import Graph
from nngeo.descent.autogram.hooks import Watcher
from nngeo.descent.autogram.objectives import Objectives
from nngeo.descent.autogram.plan import Plan
from nngeo.descent.autogram.products import inner_products
from nngeo.descent.autogram.pulled import Pulled


@dataclass(frozen=True)
class Rows:
    """The rows of the Jacobian of some losses, which a plan gives as factors, not more than `block` at a time."""

    plan: Plan
    graph: Graph
    objectives: Objectives
    watcher: Watcher
    block: int | None = None

    def passes(self) -> list[slice]:
        """Which of the k cotangents go through the graph together."""
        k, b = self.objectives.k, self.objectives.b
        return list(_parts(k, k if self.block is None else self.block // b))

    def examples(self) -> list[slice]:
        """Which of the b examples are looked at together."""
        b = self.objectives.b
        return list(_parts(b, b if self.block is None else self.block))

    def pull(self, some: slice, retain: bool = True) -> Pulled:
        """The backward passes of some cotangents."""
        o = self.objectives
        cotangents = None if o.k == 1 else o.cotangents(some)
        return Pulled(self.plan, self.graph, o, self.watcher, some).pull(cotangents, self.plan.hosts, retain)

    def zeros(self, other: Rows, like: Tensor) -> Tensor:
        """(k, b, l, c), for all rows."""
        left, right = self.objectives, other.objectives
        return like.new_zeros(left.k, left.b, right.k, right.b)


def gramian(left: Rows, right: Rows, *, per_layer: bool = False, first: Pulled | None = None) -> dict[str, Tensor]:
    """{layer: (k, b, l, c)}, inner products of rows; their sum under the name "" unless `per_layer`.

    A Gramian where both are the same. With several passes, those of the right are run again for each of the left.
    """
    same, found = left is right, dict[str, Tensor]()
    tiled = any(len(rows.passes()) > 1 or len(rows.examples()) > 1 for rows in (left, right))
    for ks in left.passes():
        x = first or left.pull(ks)
        for ls in right.passes():
            if same and ls.start < ks.start:
                continue
            y = x if same and ls == ks else right.pull(ls)
            for name, bs, cs, tile in _tiles(x, y, left.examples(), right.examples()):
                key = name if per_layer else ""
                if not tiled:
                    found[key] = found[key].add_(tile) if key in found else tile
                    continue
                whole = found.setdefault(key, left.zeros(right, tile))
                whole[ks, bs, ls, cs].add_(tile)
                if same and (ls, cs) != (ks, bs):
                    whole[ls, cs, ks, bs].add_(tile.permute(2, 3, 0, 1))
    return found


def _tiles(x: Pulled, y: Pulled, left: list[slice], right: list[slice]) -> Iterator[tuple[str, slice, slice, Tensor]]:
    """(layer, its examples on both sides, their inner products); of a Gramian the half."""
    for names in x.plan.groups:
        common = [name for name in names if name in y.plan.choices]
        for bs in left:
            for cs in right:
                if x is y and cs.start < bs.start:
                    continue
                for name in common:
                    yield name, bs, cs, _products(x, y, name, bs, cs)
                if x is not y or bs != cs:
                    y.forget(cs)
            x.forget(bs)


def _products(x: Pulled, y: Pulled, name: str, bs: slice, cs: slice) -> Tensor:
    same = x is y and bs == cs
    vectors = x.vectors(name, bs)
    others = vectors if same else y.vectors(name, cs)
    if vectors is not None and others is not None:
        left = vectors.double()
        return left.gram(left if same else others.double())
    record = x.record(name, bs)
    return inner_products(record, record if same else y.record(name, cs))


def _parts(size: int, step: int) -> Iterator[slice]:
    step = max(1, step)
    return (slice(start, min(start + step, size)) for start in range(0, size, step))
