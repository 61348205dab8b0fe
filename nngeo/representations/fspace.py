"""Matrices over the outputs on some examples: Gram matrices of the Jacobian, as the neural tangent kernel."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nngeo.generators.batches import Examples
from nngeo.generators.gram import gram_tiles
from nngeo.layers.collection import LayerCollection
from nngeo.linalg.arguments import axis, choice, number, tensor
from nngeo.linalg.cache import Cache
from nngeo.linalg.decompose import svd
from nngeo.linalg.length import length
from nngeo.linalg.memory import require_memory
from nngeo.linalg.symmetric import DAMPING, SymmetricMatrix, require_symmetric
from nngeo.representations.estimate import Estimate, check_kind, positive_count
from nngeo.representations.memory import copied
from nngeo.vectors import FVector

if TYPE_CHECKING:
    from typing_extensions import Self

    from nngeo.generators import BatchRecord, Generator, LayerRecord


class FMatDense(Estimate):
    """`J J'` as `data` (k, n, l, m), between outputs k of examples n and outputs l of examples m; no division by n.

    Square, unless `examples2` are given. The examples are read once, and the records of all mini-batches are kept.

    Args:
        examples: those of the rows.
        examples2: those of the columns, for a kernel between two sets of examples.

    >>> import torch
    >>> from nngeo.layers.collection import LayerCollection
    >>> K = FMatDense(LayerCollection(), data=torch.eye(4).reshape(2, 2, 2, 2))
    >>> K.trace(), K.mv(FVector(torch.ones(2, 2))).to_torch()
    (tensor(4.), tensor([[1., 1.],
            [1., 1.]]))
    """

    data: Tensor

    def __init__(
        self,
        layer_collection: LayerCollection,
        generator: Generator | None = None,
        data: Any = None,
        examples: Any = None,
        examples2: Any = None,
    ):
        if examples is None and examples2 is not None:
            raise ValueError("`examples2` are those of the columns, beside `examples`; `data` is a kernel already.")
        self._examples2 = examples2
        super().__init__(layer_collection, generator, data, examples)
        self._examples2 = None

    def _estimate(self, examples: Any) -> tuple[Tensor, int]:
        # As soon as the first mini-batch has told the number of outputs: all records are kept until the end.
        expected = Examples(examples).total() or 0
        rows = _Pieces.of(self._checked_size(self._sweep(examples), expected, self._examples2))
        columns = rows if self._examples2 is None else _Pieces.of(self._sweep(self._examples2))
        like = next(iter(rows.pieces[0].batch.layers.values())).like
        shape = (rows.k, rows.n, columns.k, columns.n)
        self._require_room(shape, like)
        data = like.new_zeros(shape)
        for name in self.layer_collection:
            for i, j, tile in gram_tiles(rows.of_layer(name), None if columns is rows else columns.of_layer(name)):
                row, column = rows.pieces[i], columns.pieces[j]
                data[row.outputs, row.examples, column.outputs, column.examples].add_(tile)
                if columns is rows and i != j:
                    data[column.outputs, column.examples, row.outputs, row.examples].add_(tile.permute(2, 3, 0, 1))
        return data, rows.n

    def _checked_size(self, batches: Iterable[BatchRecord], n: int, other: Any) -> Iterator[BatchRecord]:
        """The mini-batches, unless the kernel of as many examples as are expected, or were seen, does not fit."""
        m, seen = n if other is None else Examples(other).total() or 0, 0
        for batch in batches:
            seen += batch.n_examples if batch.first else 0
            k, like = batch.count, next(iter(batch.layers.values())).like
            self._require_room((k, max(n, seen), k, max(m, seen if other is None else 1)), like)
            yield batch

    def _require_room(self, shape: tuple[int, int, int, int], like: Tensor) -> None:
        what = f"FMatDense of {shape[0]} outputs and {shape[1]} examples"
        require_memory(what, prod(shape), like.dtype, like.device, "Use fewer examples at a time.")

    def _sweep(self, examples: Any) -> Iterable[BatchRecord]:
        batches = self._records(examples)
        if batches is None:
            raise NotImplementedError("A Hessian is not made of gradients of examples, and has no Gram matrix.")
        return batches

    def _checked(self, data: Any) -> Tensor:
        tensor("data", data, "(k, n, l, m)")
        if data.ndim != 4:
            raise ValueError(f"`data` should be (k, n, l, m), is {tuple(data.shape)}.")
        return data

    # Products

    def mv(self, v: FVector) -> FVector:
        """`K v`: an FVector (k, n) from one (l, m)."""
        return FVector(torch.einsum("knlm,lm->kn", self.data, self._argument(v, self.data.shape[2:])))

    def __matmul__(self, other: FVector) -> FVector:
        return self.mv(other)

    def vTMv(self, v: FVector) -> Tensor:
        """`v' K v`, 0-d; differentiable in v."""
        self._require_square("vTMv")
        return (self._argument(v, self.data.shape[2:]) * self.mv(v).to_torch()).sum()

    def solve(self, x: FVector, regul: float | None = None) -> FVector:
        """`(K + regul I)^-1 x`: O((k n)^3) once for each `regul`; see `PMat.solve`."""
        self._require_square("solve")
        regul = max(DAMPING, self.symmetric.rounding()) if regul is None else number("regul", regul, least=0)
        flat = self._argument(x, self.data.shape[2:])
        return FVector(self.symmetric.solve(flat.flatten(), regul).reshape(flat.shape))

    # Numbers

    @property
    def symmetric(self) -> SymmetricMatrix:
        """The matrix (k n, k n) with its decompositions."""

        def made() -> SymmetricMatrix:
            matrix = self.data.flatten(2).flatten(0, 1)
            require_symmetric(matrix, "The kernel")  # one between two sets of examples is square, too
            return SymmetricMatrix(matrix)

        cache = self.__dict__.setdefault("_cache", Cache())
        return cache.get("symmetric", id(self.data), made)

    def trace(self) -> Tensor:
        """0-d, the sum over examples and outputs (neural-tangents divides by the number of outputs)."""
        self._require_square("trace")
        return torch.einsum("knkn->", self.data)

    def norm(self, ord: str | int | None = None) -> Tensor:
        """The norm, 0-d: Frobenius ("fro" or None), or the largest (2) or smallest (-2) singular value."""
        ord = choice("ord", ord, (None, "fro", 2, -2))
        if ord in (None, "fro"):
            return length(self.data)
        s = svd(self.to_matrix(), "kernel")[0]
        return s[0] if ord == 2 else s[-1]

    def get_eigendecomposition(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues (k n,), ascending, and eigenvectors in columns (k n, k n) of `to_matrix()`; computed once."""
        self._require_square("get_eigendecomposition")
        return self.symmetric.eigh()

    def to_torch(self) -> Tensor:
        """(k, n, l, m), a new tensor; `data` is the one that is there.

        Raises:
            MemoryError: the copy would not fit.
        """
        return copied(f"A copy of this {type(self).__name__}", self.data)

    def to_matrix(self) -> Tensor:
        """(k n, l m), a new tensor; rows are ordered output by output."""
        return self.to_torch().flatten(2).flatten(0, 1)

    def size(self, dim: int | None = None) -> torch.Size | int:
        """(k, n, l, m), or one of them."""
        return self.data.shape if dim is None else self.data.shape[axis("dim", dim, 4)]

    @property
    def dtype(self) -> torch.dtype:
        """That of the results."""
        return self.data.dtype

    @property
    def device(self) -> torch.device:
        """That of the results."""
        return self.data.device

    def get_device(self) -> torch.device:
        """`device`, under its name in NNGeometry."""
        return self.device

    # Helpers

    def _argument(self, v: FVector, shape: torch.Size) -> Tensor:
        if not isinstance(v, FVector):
            raise TypeError(f"Expected an FVector, got {type(v).__name__}.")
        flat = v.to_torch()
        if flat.shape != shape:
            raise ValueError(f"Expected an FVector {tuple(shape)}, got one of size {tuple(flat.shape)}.")
        check_kind(flat, "FMatDense", self.dtype, self.device)
        return flat

    def _require_square(self, what: str) -> None:
        if self.data.shape[:2] != self.data.shape[2:]:
            raise ValueError(f"{what} needs a square matrix; this one is {tuple(self.data.shape)}.")

    def _scaled(self, factor: float) -> Self:
        return self._like(factor * self.data, self.n_examples)

    def _added(self, other: Self) -> Self:
        if self.data.shape != other.data.shape:
            raise ValueError(f"Sum of matrices {tuple(self.data.shape)} and {tuple(other.data.shape)}.")
        return self._like(self.data + other.data, self.n_examples)

    def __repr__(self) -> str:
        return f"FMatDense({tuple(self.data.shape)}, {self.dtype}, {self.device})"


@dataclass
class _Piece:
    """A mini-batch, or a chunk of its cotangents, and where it stands among all outputs and examples."""

    batch: BatchRecord
    outputs: slice
    examples: slice


@dataclass
class _Pieces:
    pieces: list[_Piece]
    k: int
    n: int

    @classmethod
    def of(cls, batches: Iterable[BatchRecord]) -> _Pieces:
        pieces: list[_Piece] = []
        k, n = 0, 0
        for batch in batches:
            k = 0 if batch.first else k
            n += batch.n_examples if batch.first else 0
            count = next(iter(batch.layers.values())).n_cotangents
            pieces.append(_Piece(batch, slice(k, k + count), slice(n - batch.n_examples, n)))
            k += count
        positive_count(n)
        ends: dict[int, int] = {}
        for piece in pieces:
            ends[piece.examples.start] = piece.outputs.stop
        if len(set(ends.values())) > 1:
            raise ValueError(f"The mini-batches have different numbers of outputs, {sorted(set(ends.values()))}.")
        return cls(pieces, k, n)

    def of_layer(self, name: str) -> list[LayerRecord]:
        """The records of one layer."""
        return [piece.batch.layers[name] for piece in self.pieces]
