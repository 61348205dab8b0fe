"""A Kronecker product for each group of a linear map."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nngeo.layers.collection import Layer
from nngeo.linalg.cache import version
from nngeo.linalg.kronecker import KroneckerBasis, eigenbasis, outer, times
from nngeo.linalg.length import length
from nngeo.linalg.matrixview import MatrixView
from nngeo.linalg.spectrum import Spectrum
from nngeo.linalg.symmetric import reciprocal
from nngeo.representations.block import Block
from nngeo.representations.eigenblock import KroneckerEigenBlock, Moments, moments, nonzero, zero_view
from nngeo.representations.sumblock import SumBlock

if TYPE_CHECKING:
    from nngeo.generators import LayerRecord


@dataclass(frozen=True, eq=False)
class KroneckerBlock(Block):
    """`V -> G V A` on the layer's matrices V (n, o, i): inputs a (n, i, i), or its diagonal (n, i), and g (n, o, o)."""

    a: Tensor
    g: Tensor
    view: MatrixView

    axes = {"a": "nii|ni", "g": "noo"}

    @staticmethod
    def statistic(record: LayerRecord, into: Sequence[Tensor] = (), **options: Any) -> Moments:
        return moments(record, options["weight_sharing"], into)

    @classmethod
    def stored(cls, record: LayerRecord, **options: Any) -> int:
        return record.factors().moment_entries(options["weight_sharing"])

    @classmethod
    def from_means(cls, layer: Layer, view: MatrixView | None, *means: Tensor) -> KroneckerBlock:
        assert view is not None  # else the statistic has raised
        a, g = means
        return cls(a, g, view)

    @classmethod
    def zeros(cls, layer: Layer, like: Tensor) -> KroneckerBlock:
        return cls(like.new_zeros(1, layer.numel()), like.new_zeros(1, 1, 1), zero_view(layer))

    def eigen(self) -> tuple[Tensor, Tensor, KroneckerBasis]:
        """Eigenvalues of a (n, i) and of g (n, o), and the basis; computed once."""
        return self._cache.get("eigen", version(self.a, self.g), self._eigen)

    def _eigen(self) -> tuple[Tensor, Tensor, KroneckerBasis]:
        (da, ua), (dg, ug) = eigenbasis(self.a, "input factor A"), eigenbasis(self.g, "gradient factor G")
        assert ug is not None
        return da, dg, KroneckerBasis(ua, ug)

    def symmetric_parts(self) -> tuple[Tensor, ...]:
        return (self.g,) if self.a.ndim == 2 else (self.a, self.g)

    def mv(self, v: Tensor) -> Tensor:
        return self.view.to_flat(times(self.g @ self.view.to_matrix(v), self.a))

    def solve(self, v: Tensor, regul: float) -> Tensor:
        da, dg, basis = self.eigen()
        return self.view.to_flat(basis.scale(self.view.to_matrix(v), reciprocal(outer(dg, da), regul, "block")))

    def solve_factored(self, v: Tensor, regul: float) -> Tensor:
        """`((G + sqrt(regul) / pi I) (x) (A + pi sqrt(regul) I))^-1 v`, Martens & Grosse (2015), section 6.3.

        pi^2 is the ratio of the mean eigenvalues of A and G; 1 where one of them is zero, as in a layer of dead units.
        """
        da, dg, basis = self.eigen()
        ratio = da.mean(-1, keepdim=True) / dg.mean(-1, keepdim=True)
        pi = ratio.sqrt().where(ratio.isfinite() & (ratio > 0), torch.ones_like(ratio))
        spectrum = outer(dg + regul**0.5 / pi, da + pi * regul**0.5)
        inverse = 1 / spectrum if regul else reciprocal(spectrum, 0.0, "block")
        return self.view.to_flat(basis.scale(self.view.to_matrix(v), inverse))

    def solvers(self) -> dict[str, Callable[[Tensor, float], Tensor]]:
        return {"factored": self.solve_factored}

    def _diagonals(self) -> tuple[Tensor, Tensor]:
        return self.a if self.a.ndim == 2 else self.a.diagonal(dim1=1, dim2=2), self.g.diagonal(dim1=1, dim2=2)

    def numel(self) -> int:
        return math.prod(self.view.shape)

    def diag(self) -> Tensor:
        a, g = self._diagonals()
        return self.view.to_flat(outer(g, a))

    def trace(self) -> Tensor:
        a, g = self._diagonals()
        return (a.sum(-1) * g.sum(-1)).sum()

    def eigenvalues(self) -> Tensor:
        da, dg, _ = self.eigen()
        return outer(dg, da)

    def norm(self, ord: str | int) -> Tensor:
        """Closed forms: those of a Kronecker product are products of the factors'."""
        if ord == "fro":
            return length(length(self.a.flatten(1), 1) * length(self.g.flatten(1), 1))
        da, dg, _ = self.eigen()
        by_group = [d.abs().amax(1) if ord == 2 else d.abs().amin(1) for d in (da, dg)]
        return (by_group[0] * by_group[1]).max() if ord == 2 else (by_group[0] * by_group[1]).min()

    def diagonalised(self) -> KroneckerEigenBlock:
        """The same matrix in its eigenbasis, where damping and functions are exact."""
        da, dg, basis = self.eigen()
        return KroneckerEigenBlock(basis.ug, outer(dg, da), self.view, basis.ua, da, dg)

    def shifted(self, damping: Tensor) -> Block:
        return self._as_dense().shifted(damping) if damping.ndim else self.diagonalised().shifted(damping)

    def function(self, f: Callable[[Tensor], Tensor]) -> KroneckerEigenBlock:
        return self.diagonalised().function(f)

    def spectrum(self) -> Spectrum:
        return self.diagonalised().spectrum()

    def scaled(self, factor: float | Tensor) -> KroneckerBlock:
        return KroneckerBlock(self.a, factor * self.g, self.view)

    def added(self, other: KroneckerBlock) -> KroneckerBlock:
        """Exact where the two share a factor, or one of them is zero; a sum of other Kronecker products is none."""
        if self.view != other.view:
            return nonzero(self, other)
        if torch.equal(self.a, other.a):
            return KroneckerBlock(self.a, self.g + other.g, self.view)
        if torch.equal(self.g, other.g):
            return KroneckerBlock(self.a + other.a, self.g, self.view)
        for block, term in ((self, other), (other, self)):
            if not bool(block.diag().any()):
                return term
        raise NotImplementedError(
            "A sum of Kronecker products is not one. Keep both terms by `F.add(G, exact=True)` (a difference by "
            "`F.add(-1.0 * G, exact=True)`), pool their examples by `F.pooled(G)`, or apply both: `F.mv(v) + G.mv(v)`."
        )

    def empty(self) -> KroneckerBlock:
        return KroneckerBlock(torch.zeros_like(self.a), torch.zeros_like(self.g), self.view)

    def added_exactly(self, other: Block) -> Block:
        return SumBlock((self, other))

    def pooled(self, other: KroneckerBlock, weight: float, other_weight: float) -> KroneckerBlock:
        """Factors of two sets of examples averaged, each on its own, as an estimate from both would have them."""
        if self.view != other.view:
            found = nonzero(self, other)
            w = weight if found is self else other_weight
            return KroneckerBlock(w * found.a, w * found.g, found.view)
        a, g = weight * self.a + other_weight * other.a, weight * self.g + other_weight * other.g
        return KroneckerBlock(a, g, self.view)
