"""Outer products whose inputs select features, as those of an embedding; and the sum of several calls of one map."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nngeo.linalg.outer import Counted, OuterProducts, Sharing, how_many


@dataclass(frozen=True)
class SelectedProducts:
    """OuterProducts whose inputs are rows of the identity: `a[b, t]` selects feature `index[b, t]` of `size`.

    As in an Embedding; `keep` (b, t) is False where a position selects nothing (padding): there a is zero, g need not
    be. The identity is never formed.
    """

    index: Tensor
    keep: Tensor
    size: int
    g: Tensor  # (1, k, b, t, o)
    counted: Counted | None = None  # as in OuterProducts

    def with_counted(self, counted: Counted) -> SelectedProducts:
        """The same, of which only some positions count."""
        return replace(self, counted=counted)

    def _kept(self) -> Tensor:
        """g (k, b, t, o), zero where nothing is selected."""
        return self.g[0] * self.keep[..., None]

    def dense(self) -> Tensor:
        """(k, b, 1, o, i)."""
        _, k, b, t, o = self.g.shape
        out = self.g.new_zeros(k, b, self.size, o)
        out.scatter_add_(2, self.index[None, :, :, None].expand(k, b, t, o), self._kept())
        return out.mT[:, :, None]

    def one(self, k: int, b: int) -> SelectedProducts:
        """Those of one cotangent and one example."""
        rows = slice(b, b + 1)
        return SelectedProducts(self.index[rows], self.keep[rows], self.size, self.g[:, k : k + 1, rows])

    def combine(self, w: Tensor) -> Tensor:
        """(..., 1, o, i), sums over k and b with weights w (..., k, b)."""
        g = torch.einsum("kbto,...kb->...bto", self._kept(), w).flatten(-3, -2)
        total = g.new_zeros(*g.shape[:-2], self.size, g.shape[-1])
        return total.index_add_(-2, self.index.flatten(), g).mT.unsqueeze(-3)

    def squares(self) -> Tensor:
        """(1, o, i), gradients squared and summed over k and b; cost O(k b t^2 o), not O(k b i o)."""
        same = (self.index[:, :, None] == self.index[:, None, :]).to(self.g.dtype)
        first = same.tril(-1).sum(-1) == 0  # the first position of its example to select this feature
        total = (same @ self._kept()).square_().sum(0) * (first & self.keep)[..., None]
        out = total.new_zeros(self.size, total.shape[-1])
        return out.index_add_(0, self.index.flatten(), total.flatten(0, 1)).mT[None]

    def gram(self, other: SelectedProducts, dtype: torch.dtype | None = None) -> Tensor:
        """(k, b, l, c), inner products with the gradients of another mini-batch; the products in a dtype, if given."""
        dtype = dtype or self.g.dtype
        same = (self.index[:, :, None, None] == other.index).to(dtype)
        outputs = torch.einsum("kbto,lcso->kbtlcs", self._kept().to(dtype), other._kept().to(dtype))
        return torch.einsum("btcs,kbtlcs->kblc", same, outputs)

    def forming(self) -> int:
        """How many multiplications `dense` takes: it only adds."""
        return self.g.numel()

    def gram_cost(self, other: SelectedProducts) -> int:
        """How many multiplications `gram` takes."""
        (k, b, t, o), (m, c, s) = self.g.shape[1:], other.g.shape[1:4]
        return k * b * t * m * c * s * (o + 1)

    def _selecting(self) -> tuple[Tensor, Tensor | int]:
        """(b, t), 1 where a position that counts selects a feature; and the number of those that count, (b, 1)."""
        counted = None if self.counted is None else self.counted()
        if counted is None:
            return self.keep.to(self.g.dtype), self.index.shape[1]
        return (self.keep & counted).to(self.g.dtype), how_many(counted)[:, None]

    def input_moment(self, sharing: Sharing = "expand", into: Tensor | None = None) -> Tensor:
        """(1, i), the diagonal of the moment, which has no other entries; (1, i, i) for "reduce", where it has."""
        if sharing == "reduce":
            selecting, t = self._selecting()
            counts = self.g.new_zeros(len(self.index), self.size).scatter_add_(1, self.index, selecting)
            mean = counts / t
            found = (mean.mT @ mean)[None]
            return found if into is None else into.add_(found)
        total = self.g.new_zeros(1, self.size) if into is None else into
        total[0].index_add_(0, self.index.flatten(), self._selecting()[0].flatten())
        return total

    def output_moment(self, sharing: Sharing = "expand", into: Tensor | None = None) -> Tensor:
        """(1, o, o)."""
        return OuterProducts(self.g, self.g, counted=self.counted).output_moment(sharing, into)

    def write(self, weight: Tensor, bias: Tensor | None) -> bool:
        """Never: there is no cheaper way than to copy `dense`."""
        return False

    def add_squares(self, weight: Tensor, bias: Tensor | None) -> bool:
        """Never: there is no cheaper way than to add `squares`."""
        return False

    def moment_entries(self, sharing: Sharing = "expand") -> int:
        """The number of entries of both moments."""
        return (self.size**2 if sharing == "reduce" else self.size) + self.g.shape[-1] ** 2

    def rotated_squares(self, ua: Tensor | None, ug: Tensor) -> Tensor:
        """Those of `rotate`."""
        return self.rotate(ua, ug).squares()

    def rotate(self, ua: Tensor | None, ug: Tensor) -> SelectedProducts | OuterProducts:
        """The gradients `ug' G ua`; None stands for the identity."""
        g = self.g @ ug[:, None, None]
        if ua is None:
            return SelectedProducts(self.index, self.keep, self.size, g)
        return OuterProducts((ua[0][self.index] * self.keep[..., None])[None], g)


def concatenate(parts: list[OuterProducts] | list[SelectedProducts]) -> OuterProducts | SelectedProducts:
    """The sum of gradients of one linear map: its calls are further positions t."""
    if len(parts) == 1:
        return parts[0]
    g = torch.cat([part.g for part in parts], 3)
    some = any(part.counted is not None for part in parts)

    def counted() -> Tensor | None:
        found = [None if part.counted is None else part.counted() for part in parts]
        if all(x is None for x in found):
            return None
        b, sizes = len(g[0, 0]), [part.g.shape[3] for part in parts]
        every = [torch.ones(b, t, dtype=torch.bool, device=g.device) for t in sizes]
        return torch.cat([y if x is None else x for x, y in zip(found, every, strict=True)], 1)

    if isinstance(parts[0], OuterProducts):

        def inputs(examples: slice, by_example: bool) -> Tensor:
            return torch.cat([part.inputs(examples, by_example) for part in parts], 2)

        return OuterProducts(inputs, g, parts[0].i, counted if some else None)
    index = torch.cat([part.index for part in parts], 1)
    keep = torch.cat([part.keep for part in parts], 1)
    return SelectedProducts(index, keep, parts[0].size, g, counted if some else None)
