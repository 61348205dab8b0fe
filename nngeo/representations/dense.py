"""The whole matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from nngeo.linalg.cache import Cache
from nngeo.linalg.symmetric import SymmetricMatrix
from nngeo.representations.base import PMat

if TYPE_CHECKING:
    from typing_extensions import Self


class PMatDense(PMat):
    """The matrix itself, `data` (P, P): memory O(P^2); `solve` O(P^3) once for each `regul`.

    >>> import torch
    >>> from nngeo.layers.collection import LayerCollection
    >>> layers = LayerCollection.from_model(torch.nn.Linear(1, 1))
    >>> F = PMatDense(layers, data=torch.tensor([[2.0, 1.0], [1.0, 2.0]]))
    >>> F.mv(torch.tensor([1.0, 0.0])), F.get_eigendecomposition()[0]
    (tensor([2., 1.]), tensor([1., 3.]))
    """

    data: Tensor

    def _estimate(self, examples: Any) -> tuple[Tensor, int]:
        generator, layers = self._source(), self.layer_collection
        p = layers.numel()
        self._require_memory("PMatDense", p**2, generator.dtype, generator.device)
        return generator.dense(examples, layers)

    def _checked(self, data: Any) -> Tensor:
        if data.shape != self.size():
            raise ValueError(f"`data` should be {self.size()}, is {tuple(data.shape)}.")
        return data

    @property
    def symmetric(self) -> SymmetricMatrix:
        """The matrix with its decompositions."""
        cache = self.__dict__.setdefault("_cache", Cache())
        return cache.get("symmetric", id(self.data), lambda: SymmetricMatrix(self.data))

    def _mv(self, v: Tensor) -> Tensor:
        return v @ self.data

    def _solve(self, v: Tensor, regul: float) -> Tensor:
        return self.symmetric.solve(v, regul)

    def get_diag(self) -> Tensor:
        """(P,), the diagonal."""
        return self.data.diagonal().clone()

    def _norm(self, ord: str | int) -> Tensor:
        return self.symmetric.norm(ord)

    def _dense(self) -> Tensor:
        return self.data.clone()

    def get_eigendecomposition(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues (P,), ascending, and eigenvectors in columns (P, P); computed once."""
        return self.symmetric.eigh()

    def _scaled(self, factor: float) -> Self:
        return self._like(factor * self.data, self.n_examples)

    def _added(self, other: Self) -> Self:
        return self._like(self.data + other.data, self._joint_count(other))
