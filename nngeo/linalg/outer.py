"""Per-example gradients of a linear map, kept as the factors of their outer products.

The weight W (o, i) of a map applied at positions t gets, from cotangent k of example b, the gradient
`G[k, b] = sum_t g[k, b, t] a[b, t]'`. Every sum over gradients is taken from a and g; G is formed only where that is
cheaper. n counts groups: independent maps side by side, as in a grouped convolution.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor

from nngeo.linalg.contraction import add_inner, inner, moment, turned
from nngeo.linalg.squares import CACHED, add_squared_products

Sharing = Literal["expand", "reduce"]

# (b, t), True for the positions that count in moments; None if all do.
Counted = Callable[[], Tensor | None]

# Inputs (n, b, t, i) of some examples, and whether these come one after the other in memory, or all of each feature.
Inputs = Callable[[slice, bool], Tensor]

ALL = slice(None)

# Elements of the largest temporary: 2**24 are 64 MiB in float32.
BUDGET = 2**24

# Elements of a temporary that the C library need not take from the system anew each time: 32 MiB in float32.
PART = 2**23


class OuterProducts:
    """Gradients (k, b, n, o, i) as inputs `a` (n, b, t, i) and output gradients `g` (n, k, b, t, o).

    Inputs that take much memory, as the patches of a convolution do, may be given as a function, which is called
    whenever they are needed, and their number i. Positions that do not count enter no moment; their g are zero.
    """

    def __init__(self, a: Tensor | Inputs, g: Tensor, i: int = 0, counted: Counted | None = None):
        self._a, self.g = a, g
        self.i = a.shape[-1] if isinstance(a, Tensor) else i
        self.counted = counted

    def with_counted(self, counted: Counted) -> OuterProducts:
        """The same, of which only some positions count."""
        return OuterProducts(self._a, self.g, self.i, counted)

    @property
    def a(self) -> Tensor:
        """(n, b, t, i)."""
        return self.inputs()

    def inputs(self, examples: slice = ALL, by_example: bool = False) -> Tensor:
        """(n, b, t, i) of some examples; where that can be chosen, one after the other in memory if `by_example`."""
        return self._a[:, examples] if isinstance(self._a, Tensor) else self._a(examples, by_example)

    def _parts(self, elements: int) -> Iterator[slice]:
        """The examples in slices whose inputs have about so many elements."""
        n, b, t = self.g.shape[0], *self.g.shape[2:4]
        step = max(1, elements // max(1, n * t * self.i))
        return (slice(start, min(start + step, b)) for start in range(0, b, step))

    def dense(self) -> Tensor:
        """(k, b, n, o, i)."""
        return self._products(self.a, self.g).permute(2, 1, 0, 3, 4)

    def write(self, weight: Tensor, bias: Tensor | None) -> bool:
        """Whether the gradients are now in (k, b, n, o, i) and (k, b, n, o): only for one position, where it pays."""
        if self.g.shape[3] != 1:
            return False
        g, a = self.g[..., 0, :].permute(1, 2, 0, 3), self.a[..., 0, :].transpose(0, 1)
        torch.mul(g[..., None], a[:, :, None, : weight.shape[-1]], out=weight)
        if bias is not None:
            torch.mul(g, a[..., -1:], out=bias)
        return True

    def one(self, k: int, b: int) -> OuterProducts:
        """Those of one cotangent and one example."""
        return OuterProducts(self.inputs(slice(b, b + 1)), self.g[:, k : k + 1, b : b + 1])

    def combine(self, w: Tensor) -> Tensor:
        """(..., n, o, i), sums over k and b with weights w (..., k, b); no other tensor of that size is formed."""
        g = torch.einsum("nkbto,...kb->...nbto", self.g, w)
        return g.flatten(-3, -2).mT @ self.a.flatten(1, 2)

    def squares(self, rotation: Tensor | None = None) -> Tensor:
        """(n, o, i), gradients squared and summed over k and b; with a rotation (n, i, i), of G rotation'.

        With one position the square of a product is a product of squares, and the sum over k comes first.
        """
        n, k, _, t, o = self.g.shape
        if t == 1 and rotation is None:
            return inner(self.g[..., 0, :].square().sum(1).mT, self.a[..., 0, :].square().mT)
        # As its terms are: some products come transposed.
        turn = rotation is None and turned(self.i, k * o)
        total = self.g.new_zeros(n, self.i, o).mT if turn else self.g.new_zeros(n, o, self.i)
        for examples in self._parts(CACHED):
            a = self.inputs(examples, by_example=True).mT
            add_squared_products(total, self.g[:, :, examples].mT, a, rotation)
        return total

    @staticmethod
    def _products(a: Tensor, g: Tensor) -> Tensor:
        """(n, b, k, o, i)."""
        if a.shape[2] == 1:
            return g.permute(0, 2, 1, 4, 3) * a[:, :, None]
        return inner(g.permute(0, 2, 1, 4, 3).flatten(2, 3), a.mT).unflatten(2, (g.shape[1], g.shape[4]))

    def gram(self, other: OuterProducts, dtype: torch.dtype | None = None) -> Tensor:
        """(k, b, l, c), inner products with the gradients of another mini-batch; the products in a dtype, if given.

        Through inner products of the factors, or of the gradients, whichever takes fewer multiplications.
        """
        (n, k, b, t, _), (m, c, s) = self.g.shape, other.g.shape[1:4]
        ghost, dense = self._gram_costs(other)
        if t * s > 1 and (dense < ghost or n * k * b * t * m * c * s > 4 * BUDGET):
            return self._gram_of_rows(other, dtype or self.g.dtype)

        def products(x: Tensor, y: Tensor) -> Tensor:
            x = x.to(dtype or x.dtype)
            return moment(x) if other is self else inner(x, y.to(x.dtype))

        a = self.a.flatten(1, 2)
        inputs = products(a, a if other is self else other.a.flatten(1, 2)).unflatten(2, (c, s)).unflatten(1, (b, t))
        found = products(self.g.flatten(1, 3), other.g.flatten(1, 3)).unflatten(2, (m, c, s)).unflatten(1, (k, b, t))
        if t * s == 1 and n == 1:
            return found[0, :, :, 0, :, :, 0] * inputs[0, :, 0, None, :, 0]
        return torch.einsum("nbtcs,nkbtlcs->kblc", inputs, found)

    def forming(self) -> int:
        """How many multiplications `dense` takes."""
        return self.g.numel() * self.i

    def gram_cost(self, other: OuterProducts) -> int:
        """How many multiplications `gram` takes."""
        return min(self._gram_costs(other))

    def _gram_costs(self, other: OuterProducts) -> tuple[int, int]:
        """Through the factors, and through the gradients."""
        (n, k, b, t, o), (m, c, s) = self.g.shape, other.g.shape[1:4]
        through_factors = n * b * t * c * s * (self.i + k * m * (o + 1))
        return through_factors, self.forming() + other.forming() + n * o * self.i * k * b * m * c

    def _gram_of_rows(self, other: OuterProducts, dtype: torch.dtype) -> Tensor:
        """The same from the gradients, some of the rows o at a time."""
        (n, k, b, _, o), (m, c) = self.g.shape, other.g.shape[1:3]
        step = max(1, BUDGET // max(1, n * self.i * max(k * b, m * c)))
        total = self.g.new_zeros(k * b, m * c, dtype=dtype)
        a, z = self.a, None if other is self else other.a
        for start in range(0, o, step):
            rows = slice(start, start + step)
            x = self._products(a, self.g[..., rows]).permute(2, 1, 0, 3, 4).reshape(k * b, -1).to(dtype)
            if z is None:
                total += moment(x)
            else:
                y = self._products(z, other.g[..., rows]).permute(2, 1, 0, 3, 4).reshape(m * c, -1)
                total += inner(x, y.to(dtype))
        return total.view(k, b, m, c)

    def input_moment(self, sharing: Sharing = "expand", into: Tensor | None = None) -> Tensor:
        """(n, i, i), the sum over b (and over t, or of the mean over t) of a a'; added to `into`, if that is given."""
        total, counted = into, None if self.counted is None else self.counted()
        for examples in self._parts(PART):
            a = self.inputs(examples)
            if counted is not None:
                a = torch.where(counted[examples, :, None], a, 0)
                if sharing == "reduce":  # the mean over those that count, below
                    a = a * (a.shape[2] / how_many(counted[examples]).to(a))[:, None, None]
            a = a.permute(0, 3, 1, 2)
            x = a.flatten(2) if sharing == "expand" else a.mean(3)
            total = moment(x) if total is None else add_inner(total, x, x)
        return self.g.new_zeros(len(self.g), self.i, self.i) if total is None else total

    def output_moment(self, sharing: Sharing = "expand", into: Tensor | None = None) -> Tensor:
        """(n, o, o), the sum over k and b (and the mean over t, or of the sum over t) of g g'; added to `into`."""
        g = self.g.permute(0, 4, 1, 2, 3)
        counted = None if self.counted is None or sharing == "reduce" else self.counted()
        if counted is not None:
            g = g / how_many(counted).to(g).sqrt()[:, None]
        x = g.sum(4).flatten(2) if sharing == "reduce" else g.flatten(2)
        if sharing == "expand" and g.shape[4] > 1 and counted is None:
            found = moment(x).div_(g.shape[4])
            return found if into is None else into.add_(found)
        return moment(x) if into is None else add_inner(into, x, x)

    def add_squares(self, weight: Tensor, bias: Tensor | None) -> bool:
        """Whether the squares are now added to (n, o, i) of a weight and (n, o) of a bias: only for one position."""
        if self.g.shape[3] != 1:
            return False
        g, a = self.g[..., 0, :].square().sum(1).mT, self.a[..., 0, :].square()
        add_inner(weight, g, a[..., : weight.shape[-1]].mT)
        if bias is not None:
            bias += (g @ a[..., -1:])[..., 0]
        return True

    def moment_entries(self, sharing: Sharing = "expand") -> int:
        """The number of entries of both moments."""
        return len(self.g) * (self.i**2 + self.g.shape[-1] ** 2)

    def rotated_squares(self, ua: Tensor | None, ug: Tensor) -> Tensor:
        """Those of `rotate`; the gradients are rotated instead of the inputs, where these have more entries."""
        k, _, t, o = self.g.shape[1:]
        if ua is None or t <= k * o:
            return self.rotate(ua, ug).squares()
        return self.rotate(None, ug).squares(ua.mT)

    def rotate(self, ua: Tensor | None, ug: Tensor) -> OuterProducts:
        """The gradients `ug' G ua`; None stands for the identity."""
        if self.g.shape[3] == 1:
            g = inner(self.g.flatten(1, 3), ug.mT).unflatten(1, self.g.shape[1:4])
        else:
            g = (ug.mT[:, None, None] @ self.g.mT).mT
        if ua is None:
            return OuterProducts(self._a, g, self.i)
        n = len(self.g)

        def rotated(examples: slice, by_example: bool) -> Tensor:
            # The features come first: so the products over positions find them in the order in which they need them.
            a = self.inputs(examples)
            return inner(ua.mT, a.flatten(1, 2)).view(n, -1, *a.shape[1:3]).permute(0, 2, 3, 1)

        return OuterProducts(rotated, g, self.i)


def how_many(counted: Tensor) -> Tensor:
    """(b,), how many of the positions (b, t) of each example count; 1 where none does."""
    return counted.sum(1).clamp(min=1)
