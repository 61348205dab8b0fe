"""Products with vectors, by the whole model where it can be differentiated so, else by the records of its layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nngeo.generators.differentiable import BUDGET, added
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


class Pulled:
    """The sum (m, P) over mini-batches of what was pulled back, kept by parameter until the end if m is 1."""

    def __init__(self, layers: LayerCollection, like: Tensor):
        self._layers, self._like, self._rows = layers, like, len(like)
        self._flat: Tensor | None = None
        self._parts: list[Tensor | None] | None = None
        self._own = False  # what autograd returns may be one tensor for two parameters

    def add(self, grads: list[Tensor | None], start: int, m: int) -> None:
        """Gradients (m, *shape) by every parameter for the rows from `start`."""
        if self._rows == 1:
            before = self._parts
            grads = [None if g is None else g.to(self._like) for g in grads]  # no sums in half precision
            self._parts = added(before, grads, self._own)
            self._own = before is not None and all(x is not y for x, y in zip(self._parts, grads, strict=True))
            return
        if self._flat is None:
            self._flat = self._like.new_zeros(self._rows, self._layers.numel())
        column = 0
        for grad, size in zip(grads, self._sizes(), strict=True):
            if grad is not None:
                self._flat[start : start + m, column : column + size] += grad.reshape(m, size).to(self._flat)
            column += size

    def total(self) -> Tensor:
        """(m, P), a new tensor."""
        if self._rows != 1 or self._parts is None:
            return self._like.new_zeros(self._rows, self._layers.numel()) if self._flat is None else self._flat
        zeros = self._like.new_zeros
        flat = [
            zeros(size) if g is None else g.reshape(size) for g, size in zip(self._parts, self._sizes(), strict=True)
        ]
        return torch.cat(flat)[None]

    def _sizes(self) -> list[int]:
        return [size for layer in self._layers.layers.values() for size in layer.sizes()]


class WholeModelProducts:
    """J v, J' u and their composition with the metric, for m vectors at once.

    `points` gives the mini-batches, ready for the rows v of (m, P) if there are any. A forward for each mini-batch,
    shared by all vectors, and a backward or two for each of them, in chunks whose outputs fit a budget.
    """

    def __init__(self, points: Callable[[Tensor | None], Iterator[Point]], layers: LayerCollection):
        self.points, self.layers = points, layers

    def mv(self, v: Tensor) -> tuple[Tensor, int]:
        """The sum over examples of `J' M J v` (m, P), and their number."""
        sums, n = Pulled(self.layers, v), 0
        for point in self.points(v):
            at, metric, n = point.at, point.cotangents.metric, n + point.size
            start = 0
            for rows in point.chunks(v):
                sums.add(at.pull(torch.stack([metric(row) for row in at.push(rows)])), start, len(rows))
                start += len(rows)
        return sums.total(), n

    def jvp(self, v: Tensor) -> Tensor:
        """(m, k, n)."""
        found = []
        for point in self.points(v):
            found.append(torch.cat([point.contracted(rows) for rows in point.chunks(v)]))
        return torch.cat(found, -1)

    def vjp(self, u: Tensor) -> Tensor:
        """(m, P), summed over the entries of u (m, k, n)."""
        sums, n = Pulled(self.layers, u), 0
        for point in self.points(None):
            c, part = point.cotangents, u[..., n : n + point.size]
            terms = [torch.einsum("kb...,mkb->mb...", c.chunk(j, j + 1), part[:, j : j + 1]) for j in range(c.count)]
            sums.add(point.at.pull(torch.stack(terms).sum(0)), 0, len(u))
            n += point.size
        return sums.total()


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
