"""What a job costs at least: multiply-adds and bytes, from the sizes of the layers.

Counted are the forward, the backward of every cotangent to the first layer (nothing below it, no gradients by weights),
and the statistic's own products, in full but for the symmetric NTK, in the cheapest order known here. Operations on
single entries are counted as bytes only: inputs and outputs of layers, parameters and statistics, each read or written
once where it is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tests.benchmarks.jobs import VECTORS
from tests.benchmarks.shapes import LinearMap, Shapes
from tests.benchmarks.speeds import COPY, WRITE, Speeds


@dataclass(frozen=True)
class Cost:
    """Multiply-adds, entries that are read or written, and entries of a large result in fresh memory."""

    multiply_adds: int
    entries: int
    fresh: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.multiply_adds + other.multiply_adds, self.entries + other.entries, self.fresh + other.fresh)

    @property
    def bytes(self) -> int:
        """In float32."""
        return 4 * (self.entries + self.fresh)

    def sweeps(self, unit: Cost) -> float:
        """Gradient sweeps that take the same multiply-adds."""
        return self.multiply_adds / unit.multiply_adds

    def attainable(self, speeds: Speeds) -> float:
        """Sweeps in whose time a matrix product's speed does the multiply-adds, or memory the bytes: the larger."""
        products = self.multiply_adds / speeds.products
        memory = 4 * self.entries / speeds.per_sweep[COPY] + 4 * self.fresh / speeds.per_sweep[WRITE]
        return max(products, memory)


def sweep(s: Shapes) -> Cost:
    """The unit: forward and backward of the mean loss."""
    return _forward(s) + _backward(s, 1) + _by_weights(s)


def diag(s: Shapes, k: int) -> Cost:
    """Sums of squares of gradients; of a layer without positions, one product of summed squares."""

    def own(layer: LinearMap) -> int:
        if layer.t == 1:
            return layer.product
        pairs = k * layer.t**2 * layer.o + layer.t * layer.product  # (sum_k g g') a, then times a
        return min(k * layer.product, pairs)

    return _pulled(s, k) + _statistic(s, k, own, s.parameters)


def kfac(s: Shapes, k: int) -> Cost:
    """Second moments of inputs and of output gradients."""
    size = sum((layer.i + layer.bias) ** 2 + layer.o**2 for layer in s.maps)
    return _pulled(s, k) + _statistic(s, k, lambda layer: _second_moments(layer, k), size)


def ekfac(s: Shapes, k: int) -> Cost:
    """Inputs and output gradients into the eigenbasis, then as `diag`; or gradients first, where that is cheaper."""

    def own(layer: LinearMap) -> int:
        i, o = layer.i + layer.bias, layer.o
        if layer.t == 1:
            return _second_moments(layer, k) + i * o
        return min(_second_moments(layer, k) + k * layer.t * i * o, k * (layer.t * i * o + i * o * (i + o)))

    size = sum((layer.i + layer.bias) ** 2 + layer.o**2 + layer.i * layer.o for layer in s.maps)
    return _pulled(s, k) + _statistic(s, k, own, size)


def mv(s: Shapes, vectors: int = 1) -> Cost:
    """One forward with tangents, one backward."""
    return _forward(s) + linearized(s, vectors)


def linearized(s: Shapes, vectors: int = VECTORS) -> Cost:
    """Tangents by inputs and weights, then cotangents by both."""
    activations = Cost(2 * s.n * (s.backward + s.by_weights) * vectors, 4 * s.n * s.entries * vectors)
    return activations + Cost(0, s.batches * s.parameters * (1 + 2 * vectors))


def ntk(s: Shapes) -> Cost:
    """Inner products by layer: of inputs and output gradients apart, or of gradients, whichever is cheaper; half."""
    r, n = s.outputs, s.n

    def own(layer: LinearMap) -> int:
        gradients = n * r * layer.product + (n * r) ** 2 * layer.i * layer.o // 2
        apart = n**2 * layer.t**2 * (layer.i + r**2 * (layer.o + (layer.t > 1))) // 2
        return min(apart, gradients)

    products = sum(own(layer) for layer in s.maps)
    return _pulled(s, r) + Cost(products, s.n * s.entries * (1 + r), (r * n) ** 2)


def jacobian(s: Shapes) -> Cost:
    """Gradients of all outputs and examples, which are written once."""
    r = s.outputs
    return _pulled(s, r) + Cost(r * s.n * s.by_weights, s.n * s.entries * (1 + r), r * s.n * s.parameters)


FLOORS: dict[str, Callable[[Shapes], Cost]] = {
    "diag": lambda s: diag(s, s.cotangents),
    "diag_mc": lambda s: diag(s, 1),
    "kfac": lambda s: kfac(s, s.cotangents),
    "kfac_mc": lambda s: kfac(s, 1),
    "ekfac": lambda s: ekfac(s, s.cotangents),
    "ekfac_mc": lambda s: ekfac(s, 1),
    "mv": mv,
    "linearized": linearized,
    "ntk": ntk,
    "jacobian": jacobian,
}


def _forward(s: Shapes) -> Cost:
    return Cost(s.n * s.forward, s.n * s.entries + s.batches * s.parameters)


def _backward(s: Shapes, k: int) -> Cost:
    return Cost(k * s.n * s.backward, k * s.n * s.entries + s.batches * s.parameters)


def _by_weights(s: Shapes) -> Cost:
    return Cost(s.n * s.by_weights, s.n * s.entries + s.batches * s.parameters)


def _pulled(s: Shapes, k: int) -> Cost:
    return _forward(s) + _backward(s, k)


def _statistic(s: Shapes, k: int, own: Callable[[LinearMap], int], size: int) -> Cost:
    """Products of every layer for n examples; inputs and k output gradients read, `size` entries read and written."""
    return Cost(s.n * sum(own(layer) for layer in s.maps), s.n * s.entries * (1 + k) // 2 + 2 * s.batches * size)


def _second_moments(layer: LinearMap, k: int) -> int:
    return layer.t * ((layer.i + layer.bias) ** 2 + k * layer.o**2)
