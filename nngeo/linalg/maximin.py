"""The point of a ball that serves the worst-off row of a matrix best, in the coordinates of its Gramian."""

from __future__ import annotations

import torch
from torch import Tensor

from nngeo.linalg.complementarity import complementary_solutions


@torch.no_grad()
def maximin_weights(g: Tensor, b: Tensor, radius: Tensor, *, max_iter: int = 100) -> tuple[Tensor, Tensor]:
    """The p >= 0 (m,) of length `|J'p| = radius` with the largest t in `g p + b >= t`, and how wrong it is, relatively.

    For a positive definite Gramian g (m, m) in double precision and `b = J x`: `x + J'p` is the point of the ball
    around x where the least product with a row of J is largest. The nearest point where all are at least t is a linear
    complementarity problem in p; its distance grows with t and is convex, and Newton's method finds the t where it is
    the radius, in about ten steps. Near points where nothing helps all rows p is large and rounding is all there is:
    then the interval of t is halved.

    Args:
        max_iter: how many values of t are tried.
    """
    low = b.amin()  # p is zero
    high = t = (b + radius * g.diagonal().sqrt()).amin()  # farther than the radius, for the row of the minimum
    far = p = torch.zeros_like(b)
    for _ in range(max_iter):
        solutions, solved = complementary_solutions(g, (b - t)[None])
        p = solutions[0]
        length = _length(g, p)
        # At the first t, a bound, p is as long as the radius at least, but for rounding.
        if solved and ((length - radius).abs() <= 1e-13 * radius or (length < radius and t >= high)):
            far = p
            break
        if solved and length < radius:
            low = t
        else:
            high, far = t, p
        # From above, Newton's steps come down to the root and never beyond, but for rounding.
        t = t - (length - radius) * length / p.sum()
        if not solved or not low < t < high:
            t = (low + high) / 2
        if high - low <= 1e-14 * radius:
            break
    else:
        p = far
    if not (_length(g, p) - radius).abs() <= 1e-13 * radius:
        p = far * (radius / _length(g, far).clamp(min=torch.finfo(g.dtype).tiny))
    return p, _error(g, b, p, radius)


def _length(g: Tensor, p: Tensor) -> Tensor:
    return (p @ g @ p).clamp(min=0).sqrt()


def _error(g: Tensor, b: Tensor, p: Tensor, radius: Tensor) -> Tensor:
    """How far the products where p > 0 are from the least one, weighted by p, and the length from the radius."""
    y, share = g @ p + b, p / p.sum()
    size = b.abs().amax() + radius * g.diagonal().amax().sqrt()
    return torch.maximum((share @ (y - y.amin())) / size, (_length(g, p) / radius - 1).abs())
