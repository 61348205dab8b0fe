"""Per-example gradients of a linear map, kept as the factors of their outer products.

The weight W (o, i) of a map applied at positions t gets, from cotangent k of example b, the gradient
`G[k, b] = sum_t g[k, b, t] a[b, t]'`. Every sum over gradients is taken from a and g; G is formed only where that is
cheaper. n counts groups: independent maps side by side, as in a grouped convolution.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Sharing = Literal["expand", "reduce"]

# Elements of the largest temporary: 2**24 are 64 MiB in float32.
BUDGET = 2**24


@dataclass(frozen=True)
class OuterProducts:
    """Gradients (k, b, n, o, i) as inputs `a` (n, b, t, i) and output gradients `g` (n, k, b, t, o)."""

    a: Tensor
    g: Tensor

    def dense(self) -> Tensor:
        """(k, b, n, o, i)."""
        return torch.einsum("nkbto,nbti->kbnoi", self.g, self.a)

    def one(self, k: int, b: int) -> OuterProducts:
        """Those of one cotangent and one example."""
        return OuterProducts(self.a[:, b : b + 1], self.g[:, k : k + 1, b : b + 1])

    def squares(self) -> Tensor:
        """(n, o, i), gradients squared and summed over k and b.

        With one position the square of a product is a product of squares, and the sum over k comes first.
        """
        n, k, b, t, o = self.g.shape
        if t == 1:
            return self.g[..., 0, :].square().sum(1).mT @ self.a[..., 0, :].square()
        total = self.a.new_zeros(n, o, self.a.shape[-1])
        step = max(1, BUDGET // max(1, n * k * o * self.a.shape[-1]))
        for start in range(0, b, step):
            part = OuterProducts(self.a[:, start : start + step], self.g[:, :, start : start + step])
            total += part.dense().square_().sum((0, 1))
        return total

    def gram(self, other: OuterProducts) -> Tensor:
        """(k, b, l, c), inner products with the gradients of another mini-batch.

        Through inner products of the factors, or of the gradients, whichever takes fewer multiplications.
        """
        n, k, b, t, o = self.g.shape
        _, m, c, s, _ = other.g.shape
        i = self.a.shape[-1]
        pairs = n * b * t * c * s
        ghost = pairs * (i + k * m * (o + 1))
        dense = n * o * i * (k * b * t + m * c * s + k * b * m * c)
        if t * s > 1 and (dense < ghost or pairs * k * m > 4 * BUDGET):
            step = max(1, BUDGET // max(1, n * i * max(k * b, m * c)))
            rows = [slice(start, start + step) for start in range(0, o, step)]
            parts = ((OuterProducts(x.a, x.g[..., row]).dense() for x in (self, other)) for row in rows)
            return sum((torch.einsum("kbnoi,lcnoi->kblc", x, y) for x, y in parts), self.g.new_zeros(k, b, m, c))
        inputs = torch.einsum("nbti,ncsi->nbtcs", self.a, other.a)
        outputs = torch.einsum("nkbto,nlcso->nkbtlcs", self.g, other.g)
        return torch.einsum("nbtcs,nkbtlcs->kblc", inputs, outputs)

    def input_moment(self, sharing: Sharing = "expand") -> Tensor:
        """(n, i, i), the sum over b (and over t, or of the mean over t) of a a'."""
        a = self.a.flatten(1, 2) if sharing == "expand" else self.a.mean(2)
        return a.mT @ a

    def output_moment(self, sharing: Sharing = "expand") -> Tensor:
        """(n, o, o), the sum over k and b (and the mean over t, or of the sum over t) of g g'."""
        if sharing == "reduce":
            g = self.g.sum(3).flatten(1, 2)
            return g.mT @ g
        g = self.g.flatten(1, 3)
        return g.mT @ g / self.g.shape[3]

    def moment_entries(self, sharing: Sharing = "expand") -> int:
        """The number of entries of both moments."""
        return len(self.g) * (self.a.shape[-1] ** 2 + self.g.shape[-1] ** 2)

    def rotate(self, ua: Tensor | None, ug: Tensor) -> OuterProducts:
        """The gradients `ug' G ua`; None stands for the identity."""
        return OuterProducts(self.a if ua is None else self.a @ ua[:, None], self.g @ ug[:, None, None])


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

    def squares(self) -> Tensor:
        """(1, o, i), gradients squared and summed over k and b; cost O(k b t^2 o), not O(k b i o)."""
        same = (self.index[:, :, None] == self.index[:, None, :]).to(self.g.dtype)
        first = same.tril(-1).sum(-1) == 0  # the first position of its example to select this feature
        total = (same @ self._kept()).square_().sum(0) * (first & self.keep)[..., None]
        out = total.new_zeros(self.size, total.shape[-1])
        return out.index_add_(0, self.index.flatten(), total.flatten(0, 1)).mT[None]

    def gram(self, other: SelectedProducts) -> Tensor:
        """(k, b, l, c), inner products with the gradients of another mini-batch."""
        same = (self.index[:, :, None, None] == other.index).to(self.g.dtype)
        outputs = torch.einsum("kbto,lcso->kbtlcs", self._kept(), other._kept())
        return torch.einsum("btcs,kbtlcs->kblc", same, outputs)

    def counts(self) -> Tensor:
        """(b, i), how often each example selects each feature."""
        out = self.g.new_zeros(len(self.index), self.size)
        return out.scatter_add_(1, self.index, self.keep.to(self.g.dtype))

    def input_moment(self, sharing: Sharing = "expand") -> Tensor:
        """(1, i), the diagonal of the moment, which has no other entries; (1, i, i) for "reduce", where it has."""
        if sharing == "reduce":
            mean = self.counts() / self.index.shape[1]
            return (mean.mT @ mean)[None]
        total = self.g.new_zeros(self.size)
        return total.index_add_(0, self.index.flatten(), self.keep.flatten().to(self.g.dtype))[None]

    def output_moment(self, sharing: Sharing = "expand") -> Tensor:
        """(1, o, o)."""
        return OuterProducts(self.g, self.g).output_moment(sharing)

    def moment_entries(self, sharing: Sharing = "expand") -> int:
        """The number of entries of both moments."""
        return (self.size**2 if sharing == "reduce" else self.size) + self.g.shape[-1] ** 2

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
    if isinstance(parts[0], OuterProducts):
        return OuterProducts(torch.cat([part.a for part in parts], 2), g)
    index = torch.cat([part.index for part in parts], 1)
    keep = torch.cat([part.keep for part in parts], 1)
    return SelectedProducts(index, keep, parts[0].size, g)


@dataclass(frozen=True)
class MatrixView:
    """A layer's flat parameters (..., p) seen as matrices (..., n, o, i), the bias as last column.

    A layer may own only the weight, or only the bias, of its map: the rest is frozen or belongs to another layer.
    """

    groups: int
    rows: int  # o
    columns: int  # of the weight alone: 0 if only the bias is owned
    bias: bool
    transposed: bool = False  # the weight is stored (i / kernel, o, kernel)
    kernel: int = 1

    @property
    def shape(self) -> tuple[int, int, int]:
        """(n, o, i)."""
        return self.groups, self.rows, self.columns + self.bias

    def to_matrix(self, flat: Tensor) -> Tensor:
        """(..., p) -> (..., n, o, i)."""
        numel = self.groups * self.rows * self.columns
        weight, bias = flat[..., :numel], flat[..., numel:]
        lead = flat.shape[:-1]
        if self.transposed:
            stored = weight.reshape(*lead, self.groups, self.columns // self.kernel, self.rows, self.kernel)
            matrix = stored.transpose(-3, -2).flatten(-2)
        else:
            matrix = weight.reshape(*lead, self.groups, self.rows, self.columns)
        return torch.cat([matrix, bias.reshape(*lead, self.groups, self.rows, 1)], -1) if self.bias else matrix

    def to_flat(self, matrix: Tensor) -> Tensor:
        """(..., n, o, i) -> (..., p)."""
        weight = matrix[..., : self.columns]
        if self.transposed:
            weight = weight.unflatten(-1, (self.columns // self.kernel, self.kernel)).transpose(-3, -2).flatten(-2)
        flat = weight.flatten(-3)
        return torch.cat([flat, matrix[..., -1].flatten(-2)], -1) if self.bias else flat
