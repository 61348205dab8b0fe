"""Products with the graphs of mini-batches that were kept: the model's forward is run once, for all of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from nngeo.generators.base import Generator
from nngeo.generators.linearized import Linearizer, ReverseGraph
from nngeo.generators.products import Point, WholeModelProducts
from nngeo.generators.record import BatchRecord
from nngeo.layers.collection import LayerCollection
from nngeo.layers.turn import TURN
from nngeo.variants import Cotangents


class Kept(ABC):
    """The matrix F at fixed parameters and examples, as the graphs of its mini-batches."""

    @abstractmethod
    def mv(self, rows: Tensor) -> Tensor:
        """F v for each row v of (m, P)."""

    def products(self) -> WholeModelProducts:
        """Products with the Jacobian, where there is one."""
        raise NotImplementedError("A Hessian has no Jacobian: only products with the whole matrix are kept.")


class KeptJacobian(Kept):
    """`J' M J`, averaged over examples, from the graph of every mini-batch and the metric at its outputs."""

    def __init__(self, linearizer: Linearizer, parts: list[tuple[ReverseGraph, Cotangents]], layers: LayerCollection):
        self.linearizer, self.parts, self.layers = linearizer, parts, layers

    def mv(self, rows: Tensor) -> Tensor:
        total, n = self.products().mv(rows)
        return total.div_(n)

    def products(self) -> WholeModelProducts:
        return WholeModelProducts(self._points, self.layers)

    def _points(self, rows: Tensor | None) -> Iterator[Point]:
        setting = self.linearizer.setting()
        for graph, cotangents in self.parts:
            yield Point(graph.linearized(setting), cotangents, graph.size)


class LinearizedGenerator(Generator):
    """A generator whose products are with kept graphs; records and dense matrices are those of `source`, run anew."""

    def __init__(self, source: Generator, kept: Kept, layers: LayerCollection):
        self.source, self.layers = source, layers
        self.model, self.function = source.model, source.function
        self._kept: Kept | None = kept

    def release(self) -> None:
        """Free the graphs. Products are refused from then on."""
        self._kept = None

    def mv(self, v: Tensor, examples: Any, layer_collection: LayerCollection) -> Tensor:
        """F v, like v (..., P)."""
        rows = v.reshape(-1, v.shape[-1])
        with self._alive(layer_collection) as kept:
            return kept.mv(rows).reshape(v.shape)

    def jvp(self, v: Tensor, examples: Any, layer_collection: LayerCollection) -> Tensor:
        """J v (..., k, n) for v (..., P)."""
        with self._alive(layer_collection) as kept:
            found = kept.products().jvp(v.reshape(-1, v.shape[-1]))
        return found.reshape(*v.shape[:-1], *found.shape[1:])

    def vjp(self, u: Tensor, examples: Any, layer_collection: LayerCollection) -> Tensor:
        """J' u (..., P), summed over the k cotangents and n examples of u (..., k, n)."""
        with self._alive(layer_collection) as kept:
            found = kept.products().vjp(u.reshape(-1, *u.shape[-2:]))
        return found.reshape(*u.shape[:-2], found.shape[-1])

    def dense(self, examples: Any, layer_collection: LayerCollection) -> tuple[Tensor, int]:
        """F (P, P), and the number of examples."""
        return self.source.dense(examples, layer_collection)

    def diagonal_blocks(self, examples: Any, layer_collection: LayerCollection) -> tuple[dict[str, Tensor], int]:
        """The diagonal blocks (p, p) of F by layer, and the number of examples."""
        return self.source.diagonal_blocks(examples, layer_collection)

    def records(self, examples: Any, layer_collection: LayerCollection, factors: bool = True) -> Iterator[BatchRecord]:
        """Per-layer gradients of mini-batches."""
        return self.source.records(examples, layer_collection, factors)

    def linearize(self, examples: Any, layer_collection: LayerCollection) -> LinearizedGenerator:
        """New graphs, at the parameters as they are now."""
        return self.source.linearize(examples, layer_collection)

    @contextmanager
    def _alive(self, layers: LayerCollection) -> Iterator[Kept]:
        if self._kept is None:
            raise ValueError("The graphs of this linearized matrix were released: call linearize() again.")
        if layers != self.layers:
            raise ValueError(f"The graphs were kept for {self.layers}, not for {layers}: call linearize() for these.")
        try:
            with TURN:
                yield self._kept
        except RuntimeError as error:
            if "modified by an inplace operation" not in str(error):
                raise
            raise ValueError(
                "The parameters or the examples have been changed in place since linearize(), which keeps no copies of "
                "them: call linearize() again."
            ) from error


def require_second_derivatives(graph: ReverseGraph, linearizer: Linearizer) -> None:
    """Nothing, if J v can be had from the graph.

    Raises:
        NotImplementedError: an operation of the model has no second derivative; with its name.
    """
    try:
        zero = torch.zeros(1, linearizer.layers.numel(), dtype=graph.outputs.dtype, device=graph.outputs.device)
        graph.push(zero, linearizer.setting())
    except (NotImplementedError, RuntimeError) as error:
        if "derivative for" not in str(error):
            raise
        raise NotImplementedError(
            f"The graph can't be kept, because an operation of the model has no second derivative ({error}). "
            "Use the matrix without linearize()."
        ) from error
