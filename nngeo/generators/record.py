"""What one mini-batch left at one layer: gradients by its parameters, example by example."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from nngeo.layers.collection import Layer
from nngeo.layers.rule import Factored, Gradients
from nngeo.linalg.contraction import inner
from nngeo.linalg.matrixview import MatrixView
from nngeo.linalg.outer import OuterProducts
from nngeo.linalg.selected import SelectedProducts, concatenate


@dataclass
class LayerRecord:
    """Gradients of k cotangents and b examples by the p parameters of one layer.

    Their sum over `parts`: one for each call of a module that holds some of the layer's parameters. They are kept as
    factors where the layer is a linear map; nothing of size (k, b, p) exists until `jacobian` is called.
    """

    layer: Layer
    parts: list[Gradients]
    n_examples: int
    n_cotangents: int
    first: bool  # of the chunks of cotangents of its mini-batch: statistics of inputs alone count only there
    like: Tensor  # of the dtype and device of the results

    @property
    def view(self) -> MatrixView | None:
        """How the parameters are a matrix; None where the layer has no Kronecker factors."""
        factored = [part for part in self.parts if isinstance(part, Factored)]
        forms = {(part.view, type(part.products)) for part in factored}
        return factored[0].view if len(forms) == 1 and len(factored) == len(self.parts) else None

    @cached_property
    def _factors(self) -> OuterProducts | SelectedProducts:
        products: Any = [part.products for part in self.parts if isinstance(part, Factored)]
        return concatenate(products)

    def factors(self) -> OuterProducts | SelectedProducts:
        """Inputs and output gradients, whose outer products, summed over positions, are the gradients.

        Calls of a shared layer are further positions.
        """
        if self.view is None:
            raise NotImplementedError(
                f"Layer {self.layer.name!r} ({self.layer.kind}) has no Kronecker factors: it is not a linear map, or "
                "its weight is used outside its forward, within torch.func or a derivative, or by a map of another "
                "form. Use PMatEKFACBlockDiag, or PMatMixed with another representation for it."
            )
        return self._factors

    def jacobian(self) -> Tensor:
        """(k, b, p)."""
        if self.view is not None:
            return self.view.to_flat(self._factors.dense())
        total = self.like.new_zeros(self.n_cotangents, self.n_examples, self.layer.numel())
        for part in self.parts:
            total += part.dense()
        return total

    def write(self, rows: Tensor) -> None:
        """Write the gradients to (k, b, p), which may be part of something larger."""
        if self.view is None or not (parts := self.view.parts(rows)) or not self._factors.write(*parts):
            rows.copy_(self.jacobian())

    def one(self, k: int, b: int) -> Tensor:
        """(p,), the gradient of one cotangent and one example."""
        total = self.like.new_zeros(self.layer.numel())
        for part in self.parts:
            total += part.one(k, b)
        return total

    def combined(self, w: Tensor) -> Tensor:
        """(m, p), sums of the gradients over k and b with weights w (m, k, b)."""
        total = self.like.new_zeros(len(w), self.layer.numel())
        for part in self.parts:
            total += part.combined(w)
        return total

    def squares(self, into: Tensor | None = None) -> Tensor:
        """(p,), gradients squared and summed over k and b; added to `into`, if that is given."""
        if self.view is None:
            found = self.jacobian().square_().sum((0, 1))
        elif into is not None and (parts := self.view.parts(into)) and self._factors.add_squares(*parts):
            return into
        else:
            found = self.view.to_flat(self._factors.squares())
        return found if into is None else into.add_(found)

    def gram(self, other: LayerRecord, dtype: torch.dtype | None = None) -> Tensor:
        """(k, b, l, c), inner products with the gradients of another mini-batch, or of the same one.

        The products are in a dtype, if given.
        """
        if self.view is not None and self.view == other.view:
            return self._factors.gram(other._factors, dtype)  # type: ignore[arg-type]
        x = self.jacobian().to(dtype or self.like.dtype)
        y = x if other is self else other.jacobian().to(x.dtype)
        return inner(x.flatten(0, 1), y.flatten(0, 1)).unflatten(1, y.shape[:2]).unflatten(0, x.shape[:2])

    def forming(self) -> int:
        """How many multiplications `jacobian` takes, as far as it is known."""
        return self._factors.forming() if self.view is not None else 0

    def gram_cost(self, other: LayerRecord) -> int:
        """How many multiplications `gram` takes."""
        if self.view is not None and self.view == other.view:
            return self._factors.gram_cost(other._factors)  # type: ignore[arg-type]
        return self.n_cotangents * self.n_examples * other.n_cotangents * other.n_examples * self.layer.numel()


@dataclass
class BatchRecord:
    """The records of one mini-batch, or of a chunk of its cotangents, by layer name."""

    layers: dict[str, LayerRecord]
    n_examples: int
    first: bool  # examples are counted only at the first chunk
    count: int  # of the cotangents of the mini-batch, in all its chunks
