"""Curves with fixed ends, linear in their coefficients: polygons and cubic splines, many at a time."""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from nngeo.linalg.arguments import count, tensor
from nngeo.linalg.decompose import pinv
from nngeo.linalg.precision import FullPrecision

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class Curve(FullPrecision, ABC):
    """b curves on [0, 1]: the straight line from start to end (b, ...) plus B-splines that vanish at both ends.

    `c(t) = (1 - t) start + t end + sum_j B_j(t) coefficients_j`, coefficients (b, m, ...), with uniform knots (de Boor,
    A Practical Guide to Splines). Everything is differentiable in start, end and coefficients.
    """

    start: Tensor
    end: Tensor
    coefficients: Tensor
    degree: ClassVar[int]

    def __post_init__(self) -> None:
        check_ends(self.start, self.end)
        tensor("coefficients", self.coefficients, "(b, m, ...)")
        b, *shape = self.start.shape
        c = self.coefficients
        if c.ndim < 2 or c.shape[0] != b or c.shape[2:] != tuple(shape) or self.segments < 1:
            raise ValueError(
                f"`coefficients` has shape {tuple(c.shape)}; for ends {tuple(self.start.shape)} it should be "
                f"{(b, 'm', *shape)}, with m = segments {self.degree - 2:+d}."
            )

    @classmethod
    def straight(cls, start: Tensor, end: Tensor, segments: int = 10) -> Self:
        """Straight lines from start to end (b, ...)."""
        check_ends(start, end)
        m = _count(segments, cls.degree)
        return cls(start, end, start.new_zeros(len(start), m, *start.shape[1:]))

    @classmethod
    def through(cls, points: Tensor, segments: int | None = None) -> Self:
        """Curves that pass points (b, p, ...) at equal times, from the first to the last.

        With fewer `segments` than p - 1 they only come close, in the sense of least squares.
        """
        tensor("points", points, "(b, p, ...)")
        if points.ndim < 2 or points.shape[1] < 2:
            raise ValueError(f"`points` has shape {tuple(points.shape)}; it should be (b, p, ...) with p >= 2 points.")
        start, end = points[:, 0], points[:, -1]
        m = _count(points.shape[1] - 1 if segments is None else segments, cls.degree)
        t = torch.linspace(0, 1, points.shape[1], dtype=torch.float64, device=points.device)
        line = cls.straight(start, end, m - cls.degree + 2)
        inner = basis(t, m, cls.degree)[0][1:-1]
        rest = (points - line(t.to(points)))[:, 1:-1].flatten(2)
        solved = pinv(inner, "matrix of the splines").to(points) @ rest
        return cls(start, end, solved.reshape(len(points), m, *start.shape[1:]))

    @property
    def segments(self) -> int:
        """Pieces between knots."""
        return self.coefficients.shape[1] - self.degree + 2

    def __call__(self, t: Tensor) -> Tensor:
        """c(t) (b, times, ...), for t (times,) in [0, 1]."""
        _check_times(t)
        along = t.to(self.start).reshape(-1, *[1] * (self.start.ndim - 1))
        line = self.start[:, None] * (1 - along) + self.end[:, None] * along
        return line + self._combined(basis(t, self.coefficients.shape[1], self.degree)[0])

    def derivative(self, t: Tensor) -> Tensor:
        """c'(t) (b, times, ...); at a corner that of the piece to the right."""
        slopes = basis(t, self.coefficients.shape[1], self.degree)[1]
        return (self.end - self.start)[:, None] + self._combined(slopes)

    def _combined(self, weights: Tensor) -> Tensor:
        return torch.einsum("tm,bm...->bt...", weights.to(self.coefficients), self.coefficients)


@dataclass(frozen=True)
class DiscreteCurve(Curve):
    """Polygons; the coefficients are how far the inner corners (b, segments - 1, ...) are from the straight line.

    >>> corner = torch.tensor([[[0.0, 0.0], [1.0, 1.0], [2.0, 0.0]]])
    >>> DiscreteCurve.through(corner)(torch.tensor([0.25, 0.5]))
    tensor([[[0.5000, 0.5000],
             [1.0000, 1.0000]]])
    """

    degree = 1


@dataclass(frozen=True)
class CubicSpline(Curve):
    """Cubic splines with two continuous derivatives, coefficients (b, segments + 1, ...).

    >>> line = CubicSpline.straight(torch.zeros(1, 2), torch.ones(1, 2), segments=4)
    >>> line.coefficients.shape, line.derivative(torch.tensor([0.3]))
    (torch.Size([1, 5, 2]), tensor([[[1., 1.]]]))
    """

    degree = 3


def basis(t: Tensor, m: int, degree: int) -> tuple[Tensor, Tensor]:
    """Values and derivatives (times, m) of the B-splines that vanish at 0 and 1, by de Boor's recursion.

    Raises:
        ValueError: times outside of [0, 1].
    """
    _check_times(t)
    segments = m - degree + 2
    t = t.detach().double()
    inner = torch.linspace(0, 1, segments + 1, dtype=t.dtype, device=t.device)
    knots = torch.cat([inner[:1].expand(degree), inner, inner[-1:].expand(degree)])
    piece = (t * segments).floor().clamp(max=segments - 1).long() + degree
    values = torch.nn.functional.one_hot(piece, segments + 2 * degree).to(t)  # degree 0
    slopes = values
    for d in range(1, degree + 1):
        left, right = _shares(t, knots, d)
        slopes = d * (values[:, :-1] * left[1] - values[:, 1:] * right[1])
        values = values[:, :-1] * left[0] + values[:, 1:] * right[0]
    return values[:, 1:-1], slopes[:, 1:-1]


def _shares(t: Tensor, knots: Tensor, d: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """What each spline of degree d takes of its two parts of degree d - 1, and the reciprocals of their supports."""
    support = knots[d:] - knots[:-d]
    inverse = torch.where(support > 0, 1 / support, 0)
    since, until = t[:, None] - knots[: -d - 1], knots[d + 1 :] - t[:, None]
    return (since * inverse[:-1], inverse[:-1]), (until * inverse[1:], inverse[1:])


def _count(segments: int, degree: int) -> int:
    return count("segments", segments) + degree - 2


def _check_times(t: Tensor) -> None:
    tensor("t", t, "(times,)", ndim=1)
    if t.is_meta or not bool(((t >= 0) & (t <= 1)).all()):
        raise ValueError("`t` should hold times between 0 and 1.")


def check_ends(start: Tensor, end: Tensor) -> None:
    """Raise unless these are the ends (b, ...) of b curves."""
    if not (isinstance(start, Tensor) and isinstance(end, Tensor)):
        raise TypeError(
            f"`start` and `end` are {type(start).__name__} and {type(end).__name__}; give tensors (b, ...)."
        )
    if not start.is_floating_point():
        raise TypeError(f"`start` and `end` are {start.dtype}; they should be floating-point numbers.")
    if start.shape != end.shape or start.ndim < 2 or start.dtype != end.dtype or start.device != end.device:
        raise ValueError(
            f"`start` is {tuple(start.shape)}, {start.dtype} on {start.device}, and `end` is {tuple(end.shape)}, "
            f"{end.dtype} on {end.device}: both should be alike, (b, n) for b curves."
        )
