"""Sums of squares of matrix products that are used up while they are in the processor's cache."""

from __future__ import annotations

from torch import Tensor

from nngeo.linalg.contraction import inner, one_by_one

# Elements of a temporary that is read again at once, which should not leave the processor's cache.
CACHED = 2**20


def add_squared_products(total: Tensor, g: Tensor, a: Tensor) -> None:
    """Add to the total (n, o, i) the squares of g a', summed over k and b, for g (n, k, b, o, t) and a (n, b, i, t)."""
    n, k, b, o, t = g.shape
    i = a.shape[2]
    step = max(1, CACHED // max(1, n * k * o * i))
    height = max(1, CACHED // max(1, k * i))
    for start in range(0, o, height):
        rows = slice(start, start + height)
        if one_by_one(k * min(o, height) * i * t, a, g):
            for m in range(n):
                for e in range(b):
                    products = inner(g[m, :, e, rows].flatten(0, 1), a[m, e]).unflatten(0, (k, -1))
                    for product in products:
                        total[m, rows].addcmul_(product, product)
            continue
        for first in range(0, b, step):
            few = slice(first, first + step)
            products = inner(g[:, :, few, rows].transpose(1, 2).flatten(2, 3), a[:, few])
            total[:, rows] += products.unflatten(2, (k, -1)).square_().sum((1, 2))
