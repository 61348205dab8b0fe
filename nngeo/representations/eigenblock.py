"""Scalings in the eigenbasis of a Kronecker product, and the moments that the basis is made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from nngeo.layers.collection import Layer
from nngeo.linalg.kronecker import KroneckerBasis, eigenbasis, outer, recomposed
from nngeo.linalg.matrixview import MatrixView
from nngeo.linalg.outer import Sharing
from nngeo.linalg.spectrum import Spectrum
from nngeo.linalg.symmetric import reciprocal
from nngeo.representations.block import Block
from nngeo.representations.sumblock import SumBlock

if TYPE_CHECKING:
    from nngeo.generators import LayerRecord
    from nngeo.representations.kroneckerblock import KroneckerBlock

Moments = tuple[Tensor | None, Tensor]
EitherBlock = TypeVar("EitherBlock", "KroneckerEigenBlock", "KroneckerBlock")


def moments(record: LayerRecord, weight_sharing: Sharing, into: Sequence[Tensor]) -> Moments:
    """Sums of `a a'` (None but at the first chunk of cotangents) and of `g g'`; see `OuterProducts`."""
    factors, (a, g) = record.factors(), into or (None, None)
    return factors.input_moment(weight_sharing, a) if record.first else None, factors.output_moment(weight_sharing, g)


def zero_view(layer: Layer) -> MatrixView:
    """A layer without known factors as one row; enough for a matrix that is zero."""
    return MatrixView(groups=1, rows=1, columns=layer.numel(), bias=False)


def nonzero(first: EitherBlock, second: EitherBlock) -> EitherBlock:
    """The one of two blocks that is not zero: the layer of the other one was never used, so its form is unknown."""
    for block, other in ((first, second), (second, first)):
        if not bool(block.diag().any()):
            return other
    raise ValueError(
        f"A layer is used as matrices {second.view.shape} in one of the two terms, and as {first.view.shape} in the "
        "other: their Kronecker products do not add."
    )


@dataclass(frozen=True, eq=False)
class KroneckerEigenBlock(Block):
    """Scalings (n, o, i) in the basis of ug (n, o, o) and ua (n, i, i); ua is None for the identity.

    As long as they are products of the factors' eigenvalues da (n, i) and dg (n, o), these are kept: the moments, which
    more examples add to, are made of them.
    """

    ug: Tensor
    scalings: Tensor
    view: MatrixView
    ua: Tensor | None = None
    da: Tensor | None = None
    dg: Tensor | None = None

    axes = {"ug": "noo", "scalings": "noi", "ua": "nii", "da": "ni", "dg": "no"}

    @staticmethod
    def statistic(record: LayerRecord, into: Sequence[Tensor] = (), **options: Any) -> Moments:
        return moments(record, options["weight_sharing"], into)

    @classmethod
    def stored(cls, record: LayerRecord, **options: Any) -> int:
        return record.factors().moment_entries(options["weight_sharing"])

    @classmethod
    def from_means(cls, layer: Layer, view: MatrixView | None, *means: Tensor) -> KroneckerEigenBlock:
        assert view is not None  # else the statistic has raised
        return cls._of_moments(view, *means)

    @classmethod
    def _of_moments(cls, view: MatrixView, a: Tensor, g: Tensor) -> KroneckerEigenBlock:
        (da, ua), (dg, ug) = eigenbasis(a, "input factor A"), eigenbasis(g, "gradient factor G")
        assert ug is not None
        return cls(ug, outer(dg, da), view, ua, da, dg)

    @classmethod
    def zeros(cls, layer: Layer, like: Tensor) -> KroneckerEigenBlock:
        return cls(like.new_ones(1, 1, 1), like.new_zeros(1, 1, layer.numel()), zero_view(layer))

    @property
    def basis(self) -> KroneckerBasis:
        """The eigenbasis."""
        return KroneckerBasis(self.ua, self.ug)

    def second_moments(self, record: LayerRecord) -> tuple[Tensor]:
        if record.view != self.view:
            raise ValueError(
                f"Layer {record.layer.name!r} is used otherwise by these examples than by those of the eigenbasis: "
                "estimate the matrix from examples that use every layer."
            )
        return (record.factors().rotated_squares(self.ua, self.ug),)

    def rescaled(self, *means: Tensor) -> KroneckerEigenBlock:
        return self._rescaled(means[0].masked_fill(_negligible(means[0]), 0.0)) if means else self

    def _rescaled(self, scalings: Tensor) -> KroneckerEigenBlock:
        return replace(self, scalings=scalings, da=None, dg=None)

    def _scale(self, v: Tensor, scalings: Tensor) -> Tensor:
        return self.view.to_flat(self.basis.scale(self.view.to_matrix(v), scalings))

    def numel(self) -> int:
        return math.prod(self.view.shape)

    def mv(self, v: Tensor) -> Tensor:
        return self._scale(v, self.scalings)

    def solve(self, v: Tensor, regul: float) -> Tensor:
        return self._scale(v, reciprocal(self.scalings, regul, "block"))

    def diag(self) -> Tensor:
        return self.view.to_flat(self.basis.diagonal(self.scalings))

    def trace(self) -> Tensor:
        return self.scalings.sum()

    def eigenvalues(self) -> Tensor:
        return self.scalings

    def shifted(self, damping: Tensor) -> Block:
        """In the same eigenbasis for 0-d damping; a DenseBlock for (p,)."""
        return self._as_dense().shifted(damping) if damping.ndim else self._rescaled(self.scalings + damping)

    def function(self, f: Callable[[Tensor], Tensor]) -> KroneckerEigenBlock:
        return self._rescaled(f(self.scalings))

    def spectrum(self) -> Spectrum:
        view, basis, shape = self.view, self.basis, self.scalings.shape
        return Spectrum(
            self.scalings.flatten(),
            lambda v: basis.into(view.to_matrix(v)).flatten(-3),
            lambda c: view.to_flat(basis.back(c.unflatten(-1, shape))),
        )

    # Sums

    def scaled(self, factor: float | Tensor) -> KroneckerEigenBlock:
        dg = None if self.dg is None else factor * self.dg
        return replace(self, scalings=factor * self.scalings, dg=dg)

    def added(self, other: KroneckerEigenBlock) -> KroneckerEigenBlock:
        """Exact in the same eigenbasis; not defined in another one."""
        if self.same_basis(other):
            return self._rescaled(self.scalings + other.scalings)
        if self.view != other.view:
            return nonzero(self, other)
        raise NotImplementedError(
            "The sum of matrices in two eigenbases has another one. Keep both terms by `F1.add(F2, exact=True)`, pool "
            "their examples by `F1.pooled(F2)`, or apply both: `F1.mv(v) + F2.mv(v)`."
        )

    def empty(self) -> KroneckerEigenBlock:
        moments = (None if x is None else torch.zeros_like(x) for x in (self.da, self.dg))
        return KroneckerEigenBlock(self.ug, torch.zeros_like(self.scalings), self.view, self.ua, *moments)

    def added_exactly(self, other: Block) -> Block:
        if isinstance(other, KroneckerEigenBlock) and self.same_basis(other):
            return self.added(other)
        return SumBlock((self, other))

    def pooled(self, other: KroneckerEigenBlock, weight: float, other_weight: float) -> KroneckerEigenBlock:
        """The moments averaged, each on its own, and their eigenbasis; updated scalings averaged, in the same basis."""
        if self.view != other.view:
            found = nonzero(self, other)
            w = weight if found is self else other_weight
            return found.scaled(w) if found.da is None else found.scaled(w**2)
        first, second = self._moments(), other._moments()
        if first and second:
            a, g = (weight * x + other_weight * y for x, y in zip(first, second, strict=True))
            return self._of_moments(self.view, a, g)
        if not self.same_basis(other):
            raise NotImplementedError(
                "Updated scalings in two eigenbases do not pool: no eigenbasis is known in which to add them. Estimate "
                "with update_diag=False, pool, and then call `update_diag(examples)`; or call `F.update(examples)`, "
                "which stays in the eigenbasis of F."
            )
        return self._rescaled(weight * self.scalings + other_weight * other.scalings)

    def same_basis(self, other: KroneckerEigenBlock) -> bool:
        """Whether scalings of both mean the same."""
        if self.view != other.view or (self.ua is None) != (other.ua is None):
            return False
        pairs = [(self.ug, other.ug), (self.ua, other.ua)]
        return all(x is y or (x is not None and y is not None and torch.equal(x, y)) for x, y in pairs)

    def _moments(self) -> tuple[Tensor, Tensor] | None:
        if self.da is None or self.dg is None:
            return None
        return recomposed(self.da, self.ua), recomposed(self.dg, self.ug)


def _negligible(scalings: Tensor) -> Tensor:
    """True where rounding can't tell a scaling from zero."""
    return scalings <= torch.finfo(scalings.dtype).eps * scalings.max()
