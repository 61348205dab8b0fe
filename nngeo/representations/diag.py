"""The diagonal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from nngeo.layers.collection import Layer
from nngeo.linalg.arguments import tensor
from nngeo.linalg.matrixview import MatrixView
from nngeo.linalg.spectrum import Spectrum
from nngeo.linalg.symmetric import reciprocal
from nngeo.representations.block import Block
from nngeo.representations.layerwise import LayerwisePMat

if TYPE_CHECKING:
    from nngeo.generators import LayerRecord


@dataclass(frozen=True, eq=False)
class DiagBlock(Block):
    """A diagonal matrix with these entries (p,)."""

    entries: Tensor

    takes_dense = True
    axes = {"entries": "p"}

    @staticmethod
    def statistic(record: LayerRecord, into: Sequence[Tensor] = (), **options: Any) -> tuple[Tensor]:
        return (record.squares(*into),)

    @classmethod
    def from_means(cls, layer: Layer, view: MatrixView | None, *means: Tensor) -> DiagBlock:
        return cls(*means)

    @classmethod
    def zeros(cls, layer: Layer, like: Tensor) -> DiagBlock:
        return cls(like.new_zeros(layer.numel()))

    @classmethod
    def from_dense(cls, layer: Layer, matrix: Tensor) -> DiagBlock:
        return cls(matrix.diagonal().clone())

    def mv(self, v: Tensor) -> Tensor:
        return self.entries * v

    def solve(self, v: Tensor, regul: float) -> Tensor:
        return v * reciprocal(self.entries, regul, "diagonal")

    def rounding(self) -> float:
        return 0.0

    def diag(self) -> Tensor:
        return self.entries.clone()

    def eigenvalues(self) -> Tensor:
        return self.entries

    def shifted(self, damping: Tensor) -> DiagBlock:
        return DiagBlock(self.entries + damping)

    def function(self, f: Callable[[Tensor], Tensor]) -> DiagBlock:
        return DiagBlock(f(self.entries))

    def spectrum(self) -> Spectrum:
        return Spectrum(self.entries, lambda v: v, lambda c: c)

    def scaled(self, factor: float | Tensor) -> DiagBlock:
        return DiagBlock(factor * self.entries)

    def added(self, other: DiagBlock) -> DiagBlock:
        return DiagBlock(self.entries + other.entries)


class PMatDiag(LayerwisePMat):
    """The diagonal: memory and products O(P). `data` may also be given as one tensor (P,).

    >>> import torch
    >>> from nngeo.layers.collection import LayerCollection
    >>> layers = LayerCollection.from_model(torch.nn.Linear(2, 1))
    >>> F = PMatDiag(layers, data=torch.tensor([1.0, 2.0, 4.0]))
    >>> F.trace(), F.solve(torch.ones(3), regul=1.0)
    (tensor(7.), tensor([0.5000, 0.3333, 0.2000]))
    """

    block_type = DiagBlock

    def _checked(self, data: Any) -> dict[str, Block]:
        if isinstance(data, Tensor):
            tensor("data", data, "(P,)")
            if data.shape != (self.layer_collection.numel(),):
                raise ValueError(f"`data` should be ({self.layer_collection.numel()},), is {tuple(data.shape)}.")
            data = {name: DiagBlock(part) for name, part in self.layer_collection.split(data).items()}
        return super()._checked(data)
