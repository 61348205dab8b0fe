"""Products with vectors, by the whole model where it can be differentiated so, else by the records of its layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from nngeo.generators.batches import Batch
from nngeo.generators.linearized import Linearizer
from nngeo.generators.record import BatchRecord
from nngeo.layers.collection import LayerCollection
from nngeo.variants import Cotangents


class WholeModelProducts:
    """J v, J' u and their composition with the metric: a forward and a backward or two for each mini-batch."""

    def __init__(self, linearizer: Linearizer, cotangents: Callable[[Tensor, Batch], Cotangents]):
        self.linearizer, self.cotangents = linearizer, cotangents

    def mv(self, batches: Iterator[Batch], v: Tensor) -> tuple[Tensor, int]:
        """The sum over examples of `J' M J v` (P,), and their number."""
        total, n = torch.zeros_like(v), 0
        for batch in batches:
            at = self.linearizer.at(batch, v)
            total += at.pull(self.cotangents(at.outputs, batch).metric(at.pushed)).to(v)
            n += batch.size
        return total, n

    def jvp(self, batches: Iterator[Batch], v: Tensor) -> Tensor:
        """(k, n)."""
        found = []
        for batch in batches:
            at = self.linearizer.at(batch, v)
            c = self.cotangents(at.outputs, batch)
            products = [c.chunk(j, j + 1) * at.pushed for j in range(c.count)]
            found.append(torch.cat([product.reshape(1, batch.size, -1).to(v).sum(-1) for product in products]))
        return torch.cat(found, 1)

    def vjp(self, batches: Iterator[Batch], u: Tensor) -> Tensor:
        """(P,), summed over the entries of u (k, n)."""
        total, n = u.new_zeros(self.linearizer.layers.numel()), 0
        for batch in batches:
            at = self.linearizer.at(batch, None)
            c, part = self.cotangents(at.outputs, batch), u[:, n : n + batch.size]
            terms = [torch.einsum("kb...,kb->b...", c.chunk(j, j + 1), part[j : j + 1]) for j in range(c.count)]
            total += at.pull(torch.stack(terms).sum(0)).to(total)
            n += batch.size
        return total


class LayerwiseProducts:
    """The same from the records: exact on whatever the sweep runs on, at the cost of a backward for each cotangent."""

    def __init__(self, layers: LayerCollection):
        self.layers = layers

    def mv(self, records: Iterator[BatchRecord], v: Tensor) -> tuple[Tensor, int]:
        """The sum over examples of `J' M J v` (P,), and their number."""
        total, n = torch.zeros_like(v), 0
        for batch in records:
            rows = self._rows(batch)
            total += torch.einsum("kbp,kb->p", rows, rows @ v)
            n += batch.n_examples if batch.first else 0
        return total, n

    def jvp(self, records: Iterator[BatchRecord], v: Tensor) -> Tensor:
        """(k, n)."""
        found: list[list[Tensor]] = []
        for batch in records:
            if batch.first:
                found.append([])
            found[-1].append(self._rows(batch) @ v)
        return torch.cat([torch.cat(chunks) for chunks in found], 1)

    def vjp(self, records: Iterator[BatchRecord], u: Tensor) -> Tensor:
        """(P,), summed over the entries of u (k, n)."""
        total, n, k = u.new_zeros(self.layers.numel()), 0, 0
        for batch in records:
            n, k = (n + batch.n_examples, 0) if batch.first else (n, k)
            rows = self._rows(batch)
            total += torch.einsum("kbp,kb->p", rows, u[k : k + len(rows), n - batch.n_examples : n])
            k += len(rows)
        return total

    def _rows(self, batch: BatchRecord) -> Tensor:
        return torch.cat([batch.layers[name].jacobian() for name in self.layers], -1)
