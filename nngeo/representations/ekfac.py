"""Kronecker eigenbasis with exact second moments (George et al., 2018)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NoReturn

from torch import Tensor

from nngeo.layers.collection import Layer
from nngeo.linalg.kronecker import KroneckerBasis, outer
from nngeo.linalg.outer import MatrixView
from nngeo.linalg.symmetric import reciprocal
from nngeo.representations.block import Block, Sums
from nngeo.representations.kfac import FactoredPMat, KroneckerBlock, Moments, moments, zero_view

if TYPE_CHECKING:
    from nngeo.generators import LayerRecord


@dataclass(frozen=True, eq=False)
class KroneckerEigenBlock(Block):
    """Scalings (n, o, i) in the basis of ug (n, o, o) and ua (n, i, i); ua is None for the identity."""

    ug: Tensor
    scalings: Tensor
    view: MatrixView
    ua: Tensor | None = None

    @staticmethod
    def statistic(record: LayerRecord, **options: Any) -> Moments:
        return moments(record, options["weight_sharing"])

    @classmethod
    def stored(cls, record: LayerRecord, **options: Any) -> int:
        return record.factors().moment_entries(options["weight_sharing"])

    @classmethod
    def from_means(cls, layer: Layer, view: MatrixView | None, *means: Tensor) -> KroneckerEigenBlock:
        da, dg, basis = KroneckerBlock.from_means(layer, view, *means).eigen()
        assert view is not None
        return cls(basis.ug, outer(dg, da), view, basis.ua)

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
        return (record.factors().rotate(self.ua, self.ug).squares(),)

    def rescaled(self, *means: Tensor) -> KroneckerEigenBlock:
        return replace(self, scalings=means[0]) if means else self

    def _scale(self, v: Tensor, scalings: Tensor) -> Tensor:
        return self.view.to_flat(self.basis.scale(self.view.to_matrix(v), scalings))

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

    def scaled(self, factor: float) -> KroneckerEigenBlock:
        return replace(self, scalings=factor * self.scalings)

    def added(self, other: KroneckerEigenBlock) -> NoReturn:
        raise NotImplementedError(
            "The sum of matrices in two eigenbases has another one. Estimate one matrix from the examples of both, or "
            "apply both: `F1.mv(v) + F2.mv(v)`. PMatDiag, PMatBlockDiag and PMatDense add exactly."
        )


class EigenbasisPMat(FactoredPMat):
    """A layer-wise matrix of which some blocks may be KroneckerEigenBlocks."""

    updated = False  # whether the scalings are exact second moments

    def update_diag(self, examples: Any) -> None:
        """Set the scalings to the second moments of the gradients in the eigenbasis, which stays as it is.

        After it, the trace is exact, and no other scalings come closer to the exact block (Frobenius norm). One sweep.
        """
        sums = Sums()
        for batch in self._source().records(examples, self.layer_collection):
            sums.add(batch, lambda record: self.data[record.layer.name].second_moments(record))
        means = sums.means()
        self.data = {name: block.rescaled(*means[name]) for name, block in self.data.items()}
        self.n_examples, self.updated = sums.n_examples, True

    def _state(self) -> dict[str, Any]:
        return super()._state() | {"updated": self.updated}

    def _load(self, state: Mapping[str, Any], to: Any) -> dict[str, Block]:
        data = super()._load(state, to)
        self.updated = bool(state.get("updated"))
        return data

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, updated={self.updated})"


class PMatEKFAC(EigenbasisPMat):
    """KFAC's eigenbasis for every layer that is a linear map; scalings of KFAC until `update_diag` makes them exact.

    Memory O(i^2 + o^2 + o i) a layer; products and solves O(o i (o + i)) a vector, exactly damped.

    Args:
        weight_sharing: see PMatKFAC; it chooses the basis. Updated scalings are exact in either.

    >>> import torch
    >>> from nngeo.generators import JacobianGenerator
    >>> from nngeo.layers.collection import LayerCollection
    >>> from nngeo.variants import Exact, make_variant
    >>> model = torch.nn.Linear(2, 1)
    >>> layers = LayerCollection.from_model(model)
    >>> generator = JacobianGenerator(model, Exact(make_variant("regression")))
    >>> F = PMatEKFAC(layers, generator, examples=(torch.eye(2),))
    >>> F.update_diag((torch.eye(2),))
    >>> F
    PMatEKFAC(3 parameters of 1 layer, 2 examples, torch.float32, cpu, updated=True)
    """

    block_type = KroneckerEigenBlock

    def get_eigendecomposition(self) -> tuple[dict[str, Tensor], dict[str, tuple[Tensor | None, Tensor]]]:
        """Eigenvalues {layer: (n, o, i)}, and the factors {layer: (ua, ug)} of the eigenvectors; None: the identity."""
        blocks = {name: block for name, block in self.data.items() if isinstance(block, KroneckerEigenBlock)}
        return {n: block.scalings.clone() for n, block in blocks.items()}, {n: (b.ua, b.ug) for n, b in blocks.items()}
