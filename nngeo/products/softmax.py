"""The metric of class probabilities."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from nngeo.products.metric import Metric, Signed
from nngeo.products.space import Space
from nngeo.variants import Cotangents, make_variant


@dataclass(frozen=True)
class Softmax(Metric):
    """diag(p) - p p' at every position, for p = softmax(logits) along the axis `dim` of logits (b, ...).

    It is the Fisher metric of class probabilities, never formed. The logits have the shape of the outputs.

    >>> import torch
    >>> from nngeo.products import jTmjp
    >>> logits = torch.zeros(1, 2)
    >>> jTmjp(torch.nn.Identity(), logits, Softmax(logits))
    tensor([[[ 0.2500, -0.2500],
             [-0.2500,  0.2500]]])
    """

    logits: Tensor
    dim: int = -1

    def check(self, space: Space) -> None:
        space.check_kind(self.logits, "Softmax.logits")
        shape = self.logits.shape
        if not shape or len(shape) < 2 or shape[0] != space.b or shape[1:].numel() != space.d:
            raise ValueError(
                f"The metric Softmax has logits of shape {tuple(shape)}; for the {space.what} they should have "
                f"{space.b} examples with {space.d} entries each."
            )

    def apply(self, v: Tensor, space: Space) -> Tensor:
        p = self._rows(self.logits).softmax(-1)
        x = self._rows(v.reshape(len(v), *self.logits.shape), lead=1)
        # The metric ignores constants: without the one at the likeliest class nothing cancels when p is almost one.
        x = x - x.gather(-1, p.argmax(-1, keepdim=True).expand(*x.shape[:-1], 1))
        product = p * (x - (p * x).sum(-1, keepdim=True))
        return product.movedim(-1, self._axis + 1).reshape(v.shape)

    @property
    def _axis(self) -> int:
        return self.dim % self.logits.ndim

    def _rows(self, x: Tensor, lead: int = 0) -> Tensor:
        return x.movedim(self._axis + lead, -1)

    def factors(self, space: Space) -> list[Signed]:
        """C - 1 cotangents for each position (Tanabe & Sagae, 1992)."""
        rows = self._rows(self.logits.detach())
        if rows.shape[-1] < 2:
            return [Signed(1.0, Cotangents.from_tensor(rows.new_zeros(1, space.b, space.d)))]
        c = make_variant("token_logits", ignore_index=None).exact(rows)

        def chunk(start: int, stop: int) -> Tensor:
            return c.chunk(start, stop).movedim(-1, self._axis + 1).flatten(2)

        return [Signed(1.0, Cotangents(c.count, chunk, lambda v: self.apply(v[None], space)[0]))]

    def signed(self, signs: Tensor, space: Space) -> Tensor | None:
        """By the root `(I - p 1') diag(sqrt p)`."""
        p = self._rows(self.logits).softmax(-1)
        x = p.sqrt() * self._rows(signs.reshape(len(signs), *self.logits.shape), lead=1)
        return (x - p * x.sum(-1, keepdim=True)).movedim(-1, self._axis + 1).reshape(signs.shape)

    def rank(self, space: Space) -> int:
        classes = self.logits.shape[self._axis]
        return max(1, space.d // classes * (classes - 1))

    def examples(self, rows: slice) -> Softmax:
        return Softmax(self.logits[rows], self._axis)
