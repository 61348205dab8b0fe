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
        """Rows (m, ...) in parts that are best taken together, and for which (m, b, *outputs) fit a budget."""
        if len(rows) == 1:
            return (rows,)
        return rows.split(min(self.at.together(), max(1, BUDGET // max(1, self.at.outputs.numel()))))

    def contracted(self, rows: Tensor) -> Tensor:
        """(m, k, b), the products of J v with the cotangents, for the rows v of (m, P)."""
        return self.cotangents.contracted(self.at.push(rows)).to(rows)


class Pulled:
    """The sum (m, P) over mini-batches of what was pulled back."""

    def __init__(self, layers: LayerCollection, like: Tensor):
        self._sizes = [size for layer in layers.layers.values() for size in layer.sizes()]
        self._sums = like.new_empty(len(like), layers.numel())
        self._written = 0  # rows

    def add(self, grads: list[Tensor | None], start: int, m: int) -> None:
        """Gradients (m, *shape) by every parameter for the rows from `start`."""
        first, self._written = start >= self._written, max(self._written, start + m)
        for grad, part in zip(grads, self._sums[start : start + m].split(self._sizes, -1), strict=True):
            if grad is None:
                part.zero_() if first else None
                continue
            # In the shape of the gradient: what is not in the order of memory need not be copied first.
            own = part.view(grad.shape)
            own.copy_(grad) if first else own.add_(grad)

    def total(self) -> Tensor:
        """(m, P), a new tensor."""
        return self._sums if self._written else self._sums.zero_()


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
                products = [metric(row) for row in at.push(rows)]
                w = torch.stack(products) if len(products) > 1 else products[0][None]
                sums.add(at.pull(w), start, len(rows))
                start += len(rows)
        return sums.total(), n

    def vTMv(self, v: Tensor) -> tuple[Tensor, int]:
        """The sum over examples of `(J v)' M (J v)` (m,), and their number; nothing is pulled back."""
        sums, n = v.new_zeros(len(v)), 0
        for point in self.points(v):
            metric, n, start = point.cotangents.metric, n + point.size, 0
            for rows in point.chunks(v):
                for pushed in point.at.push(rows):
                    sums[start] += (pushed * metric(pushed)).sum()
                    start += 1
        return sums, n

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

    def vTMv(self, v: Tensor) -> tuple[Tensor, int]:
        """The sum over examples of `(J v)' M (J v)` (m,), and their number."""
        pushed = self.jvp(v)
        return pushed.square().sum((1, 2)), pushed.shape[-1]

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
