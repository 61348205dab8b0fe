"""A sum of blocks of any kinds, which keeps its terms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from nngeo.layers.collection import Layer
from nngeo.linalg.length import length
from nngeo.linalg.matrixview import MatrixView
from nngeo.linalg.symmetric import spectral_norm
from nngeo.representations.block import BLOCKS, Block
from nngeo.representations.diag import DiagBlock


@dataclass(frozen=True, eq=False)
class SumBlock(Block):
    """The sum of two or more blocks. Products cost those of the terms; all that needs eigenvalues forms (p, p)."""

    terms: tuple[Block, ...]

    @staticmethod
    def statistic(record: Any, into: Sequence[Tensor] = (), **options: Any) -> NoReturn:
        raise NotImplementedError("A SumBlock is not estimated: it is the sum of two blocks.")

    @classmethod
    def from_means(cls, layer: Layer, view: MatrixView | None, *means: Tensor) -> NoReturn:
        raise NotImplementedError("A SumBlock is not estimated: it is the sum of two blocks.")

    @classmethod
    def zeros(cls, layer: Layer, like: Tensor) -> NoReturn:
        raise NotImplementedError("A SumBlock is not estimated: it is the sum of two blocks.")

    def numel(self) -> int:
        return self.terms[0].numel()

    def mv(self, v: Tensor) -> Tensor:
        return torch.stack([term.mv(v) for term in self.terms]).sum(0)

    def solve(self, v: Tensor, regul: float) -> Tensor:
        return self._as_dense().solve(v, regul)

    def rounding(self) -> float:
        return self._as_dense().rounding()

    def diag(self) -> Tensor:
        return torch.stack([term.diag() for term in self.terms]).sum(0)

    def symmetric_parts(self) -> tuple[Tensor, ...]:
        return tuple(part for term in self.terms for part in term.symmetric_parts())

    def trace(self) -> Tensor:
        return torch.stack([term.trace() for term in self.terms]).sum()

    def eigenvalues(self) -> Tensor:
        return self._as_dense().eigenvalues()

    def norm(self, ord: str | int) -> Tensor:
        return length(self.to_torch()) if ord == "fro" else spectral_norm(self.eigenvalues(), ord)

    def to_torch(self) -> Tensor:
        return torch.stack([term.to_torch() for term in self.terms]).sum(0)

    def shifted(self, damping: Tensor) -> SumBlock:
        """With the damping as one more term."""
        return SumBlock((*self.terms, DiagBlock(damping.expand(self.numel()))))

    def inverse(self) -> Block:
        return self._as_dense().inverse()

    def logdet(self) -> Tensor:
        return self._as_dense().logdet()

    def scaled(self, factor: float | Tensor) -> SumBlock:
        return SumBlock(tuple(term.scaled(factor) for term in self.terms))

    def added(self, other: Block) -> SumBlock:
        return SumBlock((*self.terms, *(other.terms if isinstance(other, SumBlock) else (other,))))

    def _as_dense(self) -> Block:
        """Once, with its decompositions."""
        return self._cache.get("dense", None, super()._as_dense)

    def tensors(self) -> dict[str, Any]:
        """The fields of all terms, and their kinds."""
        found: dict[str, Any] = {}
        for i, term in enumerate(self.terms):
            found |= {f"{i}/kind": type(term).__name__}
            found |= {f"{i}/{key}": value for key, value in term.tensors().items()}
        return found

    @classmethod
    def picked(cls, state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        while (kind := state.get(f"{prefix}{(i := len(found))}/kind")) is not None:
            found[str(i)] = kind, BLOCKS[kind].picked(state, f"{prefix}{i}/")
        if not found:
            raise ValueError("it has no terms")
        terms = {f"{i}/{key}": value for i, (_, values) in found.items() for key, value in values.items()}
        return terms | {f"{i}/kind": kind for i, (kind, _) in found.items()}

    @classmethod
    def from_tensors(cls, values: Mapping[str, Any]) -> SumBlock:
        kinds = [values[f"{i}/kind"] for i in range(sum(key.endswith("/kind") for key in values))]
        terms = (BLOCKS[kind].from_tensors(BLOCKS[kind].picked(values, f"{i}/")) for i, kind in enumerate(kinds))
        return cls(tuple(terms))
