"""Sums of squares of matrix products that are used up while they are in the processor's cache."""

from __future__ import annotations

from torch import Tensor

from nngeo.linalg.contraction import by_onednn, inner, one_by_one, turned

# Elements of a temporary that is read again at once, which should not leave the processor's cache.
CACHED = 2**20


def add_squared_products(total: Tensor, g: Tensor, a: Tensor, rotation: Tensor | None = None) -> None:
    """Add to the total (n, o, i) the squares of g a', summed over k and b, for g (n, k, b, o, t) and a (n, b, i, t).

    With a rotation (n, j, i), of what g a' becomes when its rows are multiplied by it; the total is (n, o, j).
    """
    n, k, b, o, t = g.shape
    i = a.shape[2]
    step = max(1, CACHED // max(1, n * k * o * i))
    height = max(1, CACHED // max(1, k * i))
    for start in range(0, o, height):
        rows = slice(start, start + height)
        if rotation is None and one_by_one(k * min(o, height) * i * t, a, g):
            _add_one_by_one(total[:, rows], g[..., rows, :].transpose(1, 2), a)
            continue
        for first in range(0, b, step):
            few = slice(first, first + step)
            left, right = g[:, :, few, rows].transpose(1, 2).flatten(2, 3), a[:, few]
            turn = rotation is None and turned(i, left.shape[2])
            products = inner(right, left).mT if turn else inner(left, right)
            if rotation is not None:
                products = inner(products.flatten(1, 2), rotation).unflatten(1, products.shape[1:3])
            total[:, rows].add_(products.unflatten(2, (k, -1)).square_().sum((1, 2)))


def _add_one_by_one(total: Tensor, g: Tensor, a: Tensor) -> None:
    """The same for g (n, b, k, o, t), with a product for each n and b."""
    k, o, i = *g.shape[2:4], a.shape[2]
    turn = turned(i, k * o)
    for sums, gradients, inputs in zip(total, g, a, strict=True):
        for rows, columns in zip(gradients, inputs, strict=True):
            for product in by_onednn(rows.flatten(0, 1), columns, turn).chunk(k):
                sums.addcmul_(product, product)
