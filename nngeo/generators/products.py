"""Products with vectors, by the whole model where it can be differentiated so, else by the records of its layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nngeo.generators.differentiable import BUDGET
from nngeo.generators.linearized import Linearized
from nngeo.generators.record import BatchRecord
from nngeo.layers.collection import LayerCollection
from nngeo.variants import Cotangents


@dataclass(frozen=True)
class Point:
    """The model linearized at one mini-batch, and the metric at its outputs."""

    at: Linearized
    cotangents: Cotangents
    size: int

    def chunks(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Rows (m, ...) in parts for which (m, b, *outputs) fit a budget."""
        return rows.split(max(1, BUDGET // max(1, self.at.outputs.numel())))

    def contracted(self, rows: Tensor) -> Tensor:
        """(m, k, b), the products of J v with the cotangents, for the rows v of (m, P)."""
        c, pushed = self.cotangents, self.at.push(rows)
        products = [c.chunk(j, j + 1) * pushed for j in range(c.count)]
        return torch.stack([p.reshape(len(rows), self.size, -1).to(rows).sum(-1) for p in products], 1)


class WholeModelProducts:
    """J v, J' u and their composition with the metric, for m vectors at once.

    `points` gives the mini-batches, ready for the rows v of (m, P) if there are any. A forward for each mini-batch,
    shared by all vectors, and a backward or two for each of them, in chunks whose outputs fit a budget.
    """

    def __init__(self, points: Callable[[Tensor | None], Iterator[Point]], layers: LayerCollection):
        self.points, self.layers = points, layers

    def mv(self, v: Tensor) -> tuple[Tensor, int]:
        """The sum over examples of `J' M J v` (m, P), and their number."""
        total, n = torch.zeros_like(v), 0
        for point in self.points(v):
            at, metric, n = point.at, point.cotangents.metric, n + point.size
            for sums, rows in zip(point.chunks(total), point.chunks(v), strict=True):
                sums += at.pull(torch.stack([metric(row) for row in at.push(rows)])).to(v)
        return total, n

    def jvp(self, v: Tensor) -> Tensor:
        """(m, k, n)."""
        found = []
        for point in self.points(v):
            found.append(torch.cat([point.contracted(rows) for rows in point.chunks(v)]))
        return torch.cat(found, -1)

    def vjp(self, u: Tensor) -> Tensor:
        """(m, P), summed over the entries of u (m, k, n)."""
        total, n = u.new_zeros(len(u), self.layers.numel()), 0
        for point in self.points(None):
            c, part = point.cotangents, u[..., n : n + point.size]
            terms = [torch.einsum("kb...,mkb->mb...", c.chunk(j, j + 1), part[:, j : j + 1]) for j in range(c.count)]
            total += point.at.pull(torch.stack(terms).sum(0)).to(total)
            n += point.size
        return total


class LayerwiseProducts:
    """The same from the records: exact on whatever the sweep runs on, at the cost of a backward for each cotangent."""

    def __init__(self, records: Callable[[], Iterator[BatchRecord]], layers: LayerCollection):
        self.records, self.layers = records, layers

    def mv(self, v: Tensor) -> tuple[Tensor, int]:
        """The sum over examples of `J' M J v` (m, P), and their number."""
        total, n = torch.zeros_like(v), 0
        for batch in self.records():
            rows = self._rows(batch)
            total += torch.einsum("kbp,mkb->mp", rows, torch.einsum("kbp,mp->mkb", rows, v))
            n += batch.n_examples if batch.first else 0
        return total, n

    def jvp(self, v: Tensor) -> Tensor:
        """(m, k, n)."""
        found: list[list[Tensor]] = []
        for batch in self.records():
            if batch.first:
                found.append([])
            found[-1].append(torch.einsum("kbp,mp->mkb", self._rows(batch), v))
        return torch.cat([torch.cat(chunks, 1) for chunks in found], -1)

    def vjp(self, u: Tensor) -> Tensor:
        """(m, P), summed over the entries of u (m, k, n)."""
        total, n, k = u.new_zeros(len(u), self.layers.numel()), 0, 0
        for batch in self.records():
            n, k = (n + batch.n_examples, 0) if batch.first else (n, k)
            rows = self._rows(batch)
            total += torch.einsum("kbp,mkb->mp", rows, u[:, k : k + len(rows), n - batch.n_examples : n])
            k += len(rows)
        return total

    def _rows(self, batch: BatchRecord) -> Tensor:
        return torch.cat([batch.layers[name].jacobian() for name in self.layers], -1)
