"""Inner products of vectors with the gradients of many examples, from what a sweep leaves at each layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nngeo.generators import BatchRecord, LayerRecord
from nngeo.layers import LayerCollection
from nngeo.linalg.arguments import choice
from nngeo.linalg.decompose import svd
from nngeo.linalg.outer import OuterProducts
from nngeo.linalg.selected import SelectedProducts

BY = ("example", "layer", "token")
BUDGET = 2**24  # elements of the largest temporary


@dataclass
class Dots:
    """Inner products of q vectors (q, P) with the gradients of examples, layer by layer; no (b, P) is formed.

    Args:
        rank: of the matrices that the vectors are at linear maps; their largest singular values are kept. None: all.
        by: "example" -> (q, b), "layer" -> (q, b, layers), "token" -> (q, b, t), positions apart.
    """

    layers: LayerCollection
    vectors: Tensor
    rank: int | None = None
    by: str = "example"

    def __post_init__(self) -> None:
        choice("by", self.by, BY)
        self._by_layer = self.layers.split(self.vectors)
        self._factors: dict[str, tuple[Tensor, Tensor]] = {}

    def __call__(self, batch: BatchRecord) -> Tensor:
        """The inner products with the examples of one mini-batch, of one cotangent each."""
        found = {name: self._of(record) for name, record in batch.layers.items()}
        if self.by == "token":
            lengths = {name: x.shape[2] for name, x in found.items()}
            if len(set(lengths.values())) > 1:
                raise ValueError(f"by='token' takes layers that all have the same positions; they have {lengths}.")
        terms = list(found.values())
        return torch.stack(terms, -1) if self.by == "layer" else torch.stack(terms).sum(0)

    def _of(self, record: LayerRecord) -> Tensor:
        """(q, b) or (q, b, t) of one layer."""
        v, view = self._by_layer[record.layer.name], record.view
        if view is None:
            if self.by == "token":
                raise ValueError(
                    f"by='token' takes layers that are linear maps; layer {record.layer.name!r} ({record.layer.kind}) "
                    "is none, or its weight is used elsewhere, too. Leave it out by a matrix over other layers."
                )
            return v @ record.jacobian()[0].mT if record.parts else v.new_zeros(len(v), record.n_examples)
        factors, matrix = record.factors(), view.to_matrix(v)
        b, t, o = factors.g.shape[2:]
        step = max(1, BUDGET // max(1, len(v) * len(factors.g) * t * o))
        parts = [self._part(factors, matrix, record, slice(start, start + step)) for start in range(0, b, step)]
        return torch.cat(parts, 1)

    def _part(
        self, factors: OuterProducts | SelectedProducts, matrix: Tensor, record: LayerRecord, rows: slice
    ) -> Tensor:
        """(q, b) or (q, b, t) of some examples, for matrices (q, n, o, i)."""
        g = factors.g[:, 0, rows]  # (n, b, t, o)
        if isinstance(factors, SelectedProducts):
            chosen = matrix[:, 0].mT[:, factors.index[rows]]  # (q, b, t, o)
            found = torch.einsum("qbto,bto->qbt", chosen, g[0] * factors.keep[rows, :, None])
        elif self.rank is not None and self.rank < min(matrix.shape[2:]):
            left, right = self._low_rank(record.layer.name, matrix)
            pairs = (
                torch.einsum("nbto,qnor->nbtqr", g, left),
                torch.einsum("nbti,qnir->nbtqr", factors.inputs(rows), right),
            )
            found = torch.einsum("nbtqr,nbtqr->qbt", *pairs)
        elif g.shape[2] == 1 or self.by == "token":
            found = torch.einsum("qnobt,nbto->qbt", torch.einsum("qnoi,nbti->qnobt", matrix, factors.inputs(rows)), g)
        else:  # many positions: the gradients themselves are smaller
            gradients = torch.einsum("nbto,nbti->bnoi", g, factors.inputs(rows))
            return matrix.flatten(1) @ gradients.flatten(1).mT
        return found if self.by == "token" else found.sum(2)

    def _low_rank(self, name: str, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """(q, n, o, r) and (q, n, i, r), whose product is nearest to the matrices (q, n, o, i)."""
        if name not in self._factors:
            right = svd(matrix, "matrix of a layer")[1][..., : self.rank, :].mT
            self._factors[name] = matrix @ right, right
        return self._factors[name]
