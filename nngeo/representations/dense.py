"""The whole matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from nngeo.linalg.arguments import tensor
from nngeo.linalg.cache import Cache
from nngeo.linalg.spectrum import Spectrum
from nngeo.linalg.symmetric import SymmetricMatrix, require_symmetric
from nngeo.representations.base import PMat
from nngeo.representations.damping import Damping
from nngeo.representations.finite import require_finite

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
        data, n = generator.dense(examples, layers)
        if not bool(data.isfinite().all()):
            require_finite({name: [part] for name, part in layers.split(data.diagonal()).items()}, "this PMatDense")
        return data, n

    def _checked(self, data: Any) -> Tensor:
        tensor("data", data, "(P, P)")
        if data.shape != self.size():
            raise ValueError(f"`data` should be {self.size()}, is {tuple(data.shape)}.")
        require_symmetric(data, "`data`")
        return data

    @property
    def symmetric(self) -> SymmetricMatrix:
        """The matrix with its decompositions."""
        cache = self.__dict__.setdefault("_cache", Cache())
        return cache.get("symmetric", id(self.data), lambda: SymmetricMatrix(self.data))

    def _of(self, symmetric: SymmetricMatrix) -> Self:
        """Another matrix over the same layers, with the decompositions that are known."""
        new = self._derived(symmetric.tensor)
        cache = new.__dict__.setdefault("_cache", Cache())
        cache.get("symmetric", id(new.data), lambda: symmetric)
        return new

    def _mv(self, v: Tensor) -> Tensor:
        return v @ self.data

    def _solve(self, v: Tensor, regul: float) -> Tensor:
        return self.symmetric.solve(v, regul)

    def _resolution(self) -> float:
        return self.symmetric.rounding()

    def _diag(self) -> Tensor:
        return self.data.diagonal().clone()

    def _norm(self, ord: str | int) -> Tensor:
        return self.symmetric.norm(ord)

    def _dense(self) -> Tensor:
        return self.data.clone()

    def _shifted(self, damping: Damping) -> Self:
        return self._of(self.symmetric.shifted(damping.flat()))

    def _function(self, f: Callable[[Tensor], Tensor]) -> Self:
        return self._of(self.symmetric.function(f))

    def _inverse(self) -> Self:
        return self._of(self.symmetric.inverse())

    def _logdet(self) -> Tensor:
        return self.symmetric.logdet()

    def _spectrum(self) -> Spectrum:
        return self.symmetric.basis()

    def _draws(self, normal: Callable[[int], Tensor], f: Callable[[Tensor], Tensor]) -> Tensor:
        return self.symmetric.apply(f, normal(len(self.data)))

    def get_eigendecomposition(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues (P,), ascending, and eigenvectors in columns (P, P); computed once."""
        return self.symmetric.eigh()

    def _scaled(self, factor: float | Tensor) -> Self:
        new = self._of(self.symmetric.scaled(factor))
        new.n_examples, new.generator = self.n_examples, self.generator
        return new

    def _added(self, other: Self) -> Self:
        return self._like(self.data + other.data, self._joint_count(other))
