"""The diagonal, and the entries between each weight and the bias of its row (Ollivier, 2015)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nngeo.layers.collection import Layer
from nngeo.linalg.decompose import eigvalsh
from nngeo.linalg.length import length
from nngeo.linalg.matrixview import MatrixView
from nngeo.linalg.memory import require_workspace
from nngeo.linalg.outer import BUDGET, OuterProducts
from nngeo.linalg.spectrum import Spectrum
from nngeo.linalg.symmetric import reciprocal, spectral_norm
from nngeo.representations.block import Block
from nngeo.representations.diag import DiagBlock
from nngeo.representations.layerwise import LayerwisePMat
from nngeo.representations.rows import RowsBlock

if TYPE_CHECKING:
    from nngeo.generators import LayerRecord


def with_last_column(factors: OuterProducts) -> Tensor:
    """(n, o, i - 1), products of the gradients with their last column, summed over k and b."""
    a, g = factors.a, factors.g
    n, k, b, t, o = g.shape
    i = a.shape[-1]
    if t == 1:
        return g[..., 0, :].square().sum(1).mT @ (a[..., 0, :-1] * a[..., 0, -1:])
    total = a.new_zeros(n, o, i - 1)
    step = max(1, BUDGET // max(1, n * k * o * i))
    for start in range(0, b, step):
        dense = OuterProducts(a[:, start : start + step], g[:, :, start : start + step]).dense()
        total += (dense[..., :-1] * dense[..., -1:]).sum((0, 1))
    return total


@dataclass(frozen=True, eq=False)
class QuasiDiagBlock(Block):
    """A diagonal (p,) and, where a layer has weight and bias, cross terms (n, o, i - 1): an arrow matrix for a row."""

    diagonal: Tensor
    cross: Tensor | None = None
    view: MatrixView | None = None

    axes = {"diagonal": "p", "cross": "noj"}

    @staticmethod
    def statistic(record: LayerRecord, into: Sequence[Tensor] = (), **options: Any) -> tuple[Tensor, ...]:
        view, squares = record.view, record.squares()
        if view is None or not (view.bias and view.columns):
            return (squares,)
        factors = record.factors()
        assert isinstance(factors, OuterProducts)  # a layer of selected rows has no bias
        return squares, with_last_column(factors)

    @classmethod
    def from_means(cls, layer: Layer, view: MatrixView | None, *means: Tensor) -> QuasiDiagBlock:
        return cls(means[0], means[1], view) if len(means) == 2 else cls(means[0])

    @classmethod
    def zeros(cls, layer: Layer, like: Tensor) -> QuasiDiagBlock:
        return cls(like.new_zeros(layer.numel()))

    def mv(self, v: Tensor) -> Tensor:
        if self.cross is None or self.view is None:
            return self.diagonal * v
        weight, bias = _columns(self.view, v)
        weights, biases = _columns(self.view, self.diagonal)
        out = [weights * weight + self.cross * bias, biases * bias + (self.cross * weight).sum(-1, keepdim=True)]
        return self.view.to_flat(torch.cat(out, -1))

    def solve(self, v: Tensor, regul: float) -> Tensor:
        """Exact, by elimination of the weights in each row, in float64.

        The complement of the weights is b + r - sum c^2 / (w + r), for damping r. It is taken as
        `(b - sum c^2 / w) + r (1 + sum c^2 / (w (w + r)))`, and the difference in front as zero where the rounding of
        its terms can't tell it from that: so that it does not drown the damping where bias and weight move together.
        """
        if self.cross is None or self.view is None:
            return v * reciprocal(self.diagonal, regul, "diagonal")
        weight, bias = (x.double() for x in _columns(self.view, v))
        weights, biases = (x.double() for x in _columns(self.view, self.diagonal))
        cross = self.cross.double()
        inverse, zero = reciprocal(weights, regul, "diagonal"), weights == 0
        shares = cross.square() / weights.masked_fill(zero, regul)
        size = biases.abs() + shares.abs().sum(-1, keepdim=True)
        left = biases - shares.sum(-1, keepdim=True)
        rounding = (8 + shares.shape[-1] ** 0.5) * torch.finfo(self.diagonal.dtype).eps * size
        left = left.masked_fill(left.abs() <= rounding, 0.0)
        if not regul and bool((left == 0).any()):
            rank = self.diagonal.numel() - int((left == 0).sum())
            raise ValueError(
                f"The block is singular (rank {rank} of {self.diagonal.numel()}: weights and bias of a row move "
                "together): solve with `regul` > 0."
            )
        complement = left + regul * (1 + (shares * inverse).masked_fill(zero, 0.0).sum(-1, keepdim=True))
        bias = (bias - (cross * inverse * weight).sum(-1, keepdim=True)) / complement
        return self.view.to_flat(torch.cat([inverse * (weight - cross * bias), bias], -1)).to(v.dtype)

    def rounding(self) -> float:
        return 0.0

    def diag(self) -> Tensor:
        return self.diagonal.clone()

    def eigenvalues(self) -> Tensor:
        """From the rows' matrices (i, i): O(n o i^3)."""
        if self.cross is None or self.view is None:
            return self.diagonal
        arrows = torch.cat(_columns(self.view, self.diagonal), -1).flatten(0, 1)
        i = arrows.shape[-1]
        found, step = [], max(1, BUDGET // i**2)
        for rows, cross in zip(arrows.split(step), self.cross.flatten(0, 1).split(step), strict=True):
            matrices = rows.diag_embed()
            matrices[:, -1, :-1] = matrices[:, :-1, -1] = cross
            found.append(eigvalsh(matrices, "matrix of a row"))
        return torch.cat(found)

    def norm(self, ord: str | int) -> Tensor:
        if ord != "fro" or self.cross is None:
            return spectral_norm(self.eigenvalues(), ord)
        return length(torch.stack([length(self.diagonal), 2**0.5 * length(self.cross)]))

    def _unpacked(self) -> RowsBlock | DiagBlock:
        """The same matrix, with room for its functions: those of an arrow matrix are dense."""
        if self.cross is None or self.view is None:
            return DiagBlock(self.diagonal)
        n, o, i = self.view.shape
        require_workspace(f"Matrices of rows {(n, o, i, i)} and their inverses", 3 * n * o * i**2, self.diagonal)
        matrices = self.view.to_matrix(self.diagonal).diag_embed()
        matrices[..., -1, :-1] = matrices[..., :-1, -1] = self.cross
        return RowsBlock(matrices, self.view)

    def shifted(self, damping: Tensor) -> QuasiDiagBlock:
        return replace(self, diagonal=self.diagonal + damping)

    def function(self, f: Callable[[Tensor], Tensor]) -> Block:
        """A matrix for each row: memory O(o i^2)."""
        return self._unpacked().function(f)

    def inverse(self) -> Block:
        return self._unpacked().inverse()

    def logdet(self) -> Tensor:
        return self._unpacked().logdet()

    def apply(self, f: Callable[[Tensor], Tensor], v: Tensor) -> Tensor:
        return self._unpacked().apply(f, v)

    def spectrum(self) -> Spectrum:
        return self._unpacked().spectrum()

    def scaled(self, factor: float | Tensor) -> QuasiDiagBlock:
        cross = None if self.cross is None else factor * self.cross
        return QuasiDiagBlock(factor * self.diagonal, cross, self.view)

    def added(self, other: QuasiDiagBlock) -> QuasiDiagBlock:
        crosses = [cross for cross in (self.cross, other.cross) if cross is not None]
        cross = torch.stack(crosses).sum(0) if crosses else None
        return QuasiDiagBlock(self.diagonal + other.diagonal, cross, self.view or other.view)


def _columns(view: MatrixView, flat: Tensor) -> tuple[Tensor, Tensor]:
    """(..., n, o, i - 1) and (..., n, o, 1), the weight and the bias."""
    matrix = view.to_matrix(flat)
    return matrix[..., :-1], matrix[..., -1:]


class PMatQuasiDiag(LayerwisePMat):
    """The diagonal, and the entries between each weight and the bias of the same output.

    The diagonal alone for layers without a bias, or that are no linear maps. Memory and products O(P); `solve` is
    exact, O(P). With more than two inputs it need not be positive: `solve` with damping of the size of the entries.

    >>> import torch
    >>> from nngeo.generators import JacobianGenerator
    >>> from nngeo.layers.collection import LayerCollection
    >>> from nngeo.variants import Exact, make_variant
    >>> model = torch.nn.Linear(2, 1)
    >>> layers = LayerCollection.from_model(model)
    >>> generator = JacobianGenerator(model, Exact(make_variant("regression")))
    >>> PMatQuasiDiag(layers, generator, examples=(torch.eye(2),)).to_torch()
    tensor([[0.5000, 0.0000, 0.5000],
            [0.0000, 0.5000, 0.5000],
            [0.5000, 0.5000, 1.0000]])
    """

    block_type = QuasiDiagBlock
