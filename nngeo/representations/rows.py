"""A dense matrix for each row of a layer's weight: what functions of a quasi-diagonal block are."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
from torch import Tensor

from nngeo.layers.collection import Layer
from nngeo.linalg.decompose import eigh
from nngeo.linalg.length import length
from nngeo.linalg.matrixfunction import matrix_function
from nngeo.linalg.matrixview import MatrixView
from nngeo.linalg.spectrum import Spectrum, cleaned, logarithm, power
from nngeo.linalg.symmetric import rounding_of
from nngeo.representations.block import Block


@dataclass(frozen=True, eq=False)
class RowsBlock(Block):
    """Symmetric matrices (n, o, i, i) over the weights and bias of each output; zero between outputs."""

    matrices: Tensor
    view: MatrixView

    axes = {"matrices": "noii"}

    @staticmethod
    def statistic(record: Any, into: Sequence[Tensor] = (), **options: Any) -> NoReturn:
        raise NotImplementedError("A RowsBlock is not estimated: it is a function of a QuasiDiagBlock.")

    @classmethod
    def from_means(cls, layer: Layer, view: MatrixView | None, *means: Tensor) -> NoReturn:
        raise NotImplementedError("A RowsBlock is not estimated: it is a function of a QuasiDiagBlock.")

    @classmethod
    def zeros(cls, layer: Layer, like: Tensor) -> RowsBlock:
        view = MatrixView(groups=1, rows=layer.numel(), columns=1, bias=False)
        return cls(like.new_zeros(1, layer.numel(), 1, 1), view)

    def _eigh(self) -> tuple[Tensor, Tensor]:
        """(n, o, i) and (n, o, i, i)."""
        values, vectors = eigh(self.matrices, "matrix of a row")
        return cleaned(values), vectors

    def symmetric_parts(self) -> tuple[Tensor, ...]:
        return (self.matrices,)

    def mv(self, v: Tensor) -> Tensor:
        return self._each_row(v, self.matrices)

    def _each_row(self, v: Tensor, matrices: Tensor) -> Tensor:
        return self.view.to_flat(torch.einsum("noij,...noj->...noi", matrices, self.view.to_matrix(v)))

    def solve(self, v: Tensor, regul: float) -> Tensor:
        if not regul:
            power(self.eigenvalues().detach(), -1.0)  # raises for a singular row
        damped = self.matrices.clone()
        damped.diagonal(dim1=-2, dim2=-1).add_(regul)
        inverse, info = torch.linalg.inv_ex(damped)
        if bool((info != 0).any()):
            raise ValueError(f"A row of the block is singular, with regul={regul}: solve with a larger `regul`.")
        return self._each_row(v, inverse)

    def rounding(self) -> float:
        return rounding_of(length(self.matrices))

    def diag(self) -> Tensor:
        return self.view.to_flat(self.matrices.diagonal(dim1=-2, dim2=-1))

    def numel(self) -> int:
        return math.prod(self.view.shape)

    def eigenvalues(self) -> Tensor:
        return self._eigh()[0]

    def shifted(self, damping: Tensor) -> RowsBlock:
        matrices = self.matrices.clone()
        matrices.diagonal(dim1=-2, dim2=-1).add_(self.view.to_matrix(damping) if damping.ndim else damping)
        return replace(self, matrices=matrices)

    def function(self, f: Callable[[Tensor], Tensor]) -> RowsBlock:
        return replace(self, matrices=matrix_function(self.matrices, f))

    def inverse(self) -> RowsBlock:
        power(self.eigenvalues().detach(), -1.0)  # raises for a singular row
        inverse = torch.linalg.inv(self.matrices)
        return replace(self, matrices=(inverse + inverse.mT) / 2)

    def logdet(self) -> Tensor:
        logarithm(self.eigenvalues().detach())  # raises for a row that is not positive definite
        return torch.linalg.slogdet(self.matrices).logabsdet.sum()

    def apply(self, f: Callable[[Tensor], Tensor], v: Tensor) -> Tensor:
        return self.function(f).mv(v)

    def spectrum(self) -> Spectrum:
        values, vectors = self._eigh()
        return Spectrum(
            values.flatten(),
            lambda v: torch.einsum("noij,...noi->...noj", vectors, self.view.to_matrix(v)).flatten(-3),
            lambda c: self.view.to_flat(torch.einsum("noij,...noj->...noi", vectors, c.unflatten(-1, values.shape))),
        )

    def scaled(self, factor: float | Tensor) -> RowsBlock:
        return replace(self, matrices=factor * self.matrices)

    def added(self, other: RowsBlock) -> RowsBlock:
        return replace(self, matrices=self.matrices + other.matrices)
