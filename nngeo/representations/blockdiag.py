"""Dense blocks, one for each layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from nngeo.layers.collection import Layer
from nngeo.linalg.arguments import shown, tensor
from nngeo.linalg.contraction import add_inner, moment
from nngeo.linalg.matrixview import MatrixView
from nngeo.linalg.spectrum import Spectrum
from nngeo.linalg.symmetric import SymmetricMatrix
from nngeo.representations.block import Block
from nngeo.representations.layerwise import LayerwisePMat

if TYPE_CHECKING:
    from nngeo.generators import LayerRecord


@dataclass(frozen=True, eq=False)
class DenseBlock(Block):
    """A symmetric matrix (p, p)."""

    matrix: Tensor

    takes_dense = True
    axes = {"matrix": "pp"}

    @staticmethod
    def statistic(record: LayerRecord, into: Sequence[Tensor] = (), **options: Any) -> tuple[Tensor]:
        x = record.jacobian().flatten(0, 1).mT
        return (add_inner(into[0], x, x) if into else moment(x),)

    @classmethod
    def from_means(cls, layer: Layer, view: MatrixView | None, *means: Tensor) -> DenseBlock:
        return cls(*means)

    @classmethod
    def zeros(cls, layer: Layer, like: Tensor) -> DenseBlock:
        return cls(like.new_zeros(layer.numel(), layer.numel()))

    @classmethod
    def from_dense(cls, layer: Layer, matrix: Tensor) -> DenseBlock:
        return cls(matrix)

    @classmethod
    def stored(cls, record: LayerRecord, **options: Any) -> int:
        return record.layer.numel() ** 2

    @classmethod
    def of(cls, symmetric: SymmetricMatrix) -> DenseBlock:
        """With the decompositions that are known."""
        block = cls(symmetric.tensor)
        block._cache.get("symmetric", None, lambda: symmetric)
        return block

    @property
    def symmetric(self) -> SymmetricMatrix:
        """The matrix with its decompositions."""
        return self._cache.get("symmetric", None, lambda: SymmetricMatrix(self.matrix))

    def mv(self, v: Tensor) -> Tensor:
        return v @ self.matrix

    def solve(self, v: Tensor, regul: float) -> Tensor:
        return self.symmetric.solve(v, regul)

    def rounding(self) -> float:
        return self.symmetric.rounding()

    def diag(self) -> Tensor:
        return self.matrix.diagonal().clone()

    def symmetric_parts(self) -> tuple[Tensor, ...]:
        return (self.matrix,)

    def eigenvalues(self) -> Tensor:
        return self.symmetric.eigh()[0]

    def norm(self, ord: str | int) -> Tensor:
        return self.symmetric.norm(ord)

    def to_torch(self) -> Tensor:
        return self.matrix.clone()

    def shifted(self, damping: Tensor) -> DenseBlock:
        return DenseBlock.of(self.symmetric.shifted(damping))

    def function(self, f: Callable[[Tensor], Tensor]) -> DenseBlock:
        return DenseBlock.of(self.symmetric.function(f))

    def inverse(self) -> DenseBlock:
        return DenseBlock.of(self.symmetric.inverse())

    def logdet(self) -> Tensor:
        return self.symmetric.logdet()

    def spectrum(self) -> Spectrum:
        return self.symmetric.basis()

    def apply(self, f: Callable[[Tensor], Tensor], v: Tensor) -> Tensor:
        return self.symmetric.apply(f, v)

    def scaled(self, factor: float | Tensor) -> DenseBlock:
        return DenseBlock.of(self.symmetric.scaled(factor))

    def added(self, other: DenseBlock) -> DenseBlock:
        return DenseBlock(self.matrix + other.matrix)


class PMatBlockDiag(LayerwisePMat):
    """The dense blocks of the layers: memory O(sum p^2), `solve` O(sum p^3) once for each `regul`.

    `data` may also be given as tensors, {layer name: (p, p)}.

    >>> import torch
    >>> from nngeo.layers.collection import LayerCollection
    >>> layers = LayerCollection.from_model(torch.nn.Linear(1, 1))
    >>> F = PMatBlockDiag(layers, data={"": torch.tensor([[2.0, 1.0], [1.0, 2.0]])})
    >>> F.norm(2), F.norm(-2)
    (tensor(3.), tensor(1.))
    """

    block_type = DenseBlock

    def _checked(self, data: Any) -> dict[str, Block]:
        if not isinstance(data, Mapping):
            raise TypeError(f"`data` should be a dict of tensors (p, p), {{layer name: tensor}}; it is {shown(data)}.")
        return super()._checked({n: self._block(n, x) if isinstance(x, Tensor) else x for n, x in data.items()})

    def _block(self, name: Any, x: Tensor) -> DenseBlock:
        p = self.layer_collection[name].numel() if name in self.layer_collection else len(x)
        if x.shape != (p, p):
            raise ValueError(f"`data` of layer {name!r} should be ({p}, {p}), is {tuple(x.shape)}.")
        return DenseBlock(tensor("data", x, "(p, p)"))

    def get_eigendecomposition(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Eigenvalues {layer: (p,)}, ascending, and eigenvectors in columns {layer: (p, p)}."""
        found = self._by_layer(lambda name, block: block.symmetric.eigh())  # type: ignore[attr-defined]
        return {name: values for name, (values, _) in found.items()}, {name: u for name, (_, u) in found.items()}
