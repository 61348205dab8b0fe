"""Eigenvalues with the maps into their eigenbasis and back, and the functions of them that matrices are asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nngeo.linalg.precision import full_precision

Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Eigenvalues (p,) of a symmetric matrix, and its orthogonal eigenbasis as a pair of maps.

    >>> identity = Spectrum(torch.tensor([2.0, 1.0]), lambda v: v, lambda c: c).ascending()
    >>> identity.values, identity.to_torch()
    (tensor([1., 2.]), tensor([[0., 1.],
            [1., 0.]]))
    """

    values: Tensor
    into: Map  # vectors (..., p) -> their coordinates in the eigenbasis (..., p)
    back: Map  # the inverse of `into`

    def __post_init__(self) -> None:
        for name in ("into", "back"):
            object.__setattr__(self, name, full_precision(getattr(self, name)))

    def ascending(self) -> Spectrum:
        """The same in the order of the eigenvalues."""
        order = self.values.detach().argsort()
        place = order.argsort()
        return Spectrum(self.values[order], lambda v: self.into(v)[..., order], lambda c: self.back(c[..., place]))

    def vectors(self, which: Tensor) -> Tensor:
        """(k, p), the eigenvectors at the indices `which` (k,), in rows."""
        units = self.values.new_zeros(len(which), len(self.values))
        return self.back(units.scatter_(1, which[:, None], 1.0))

    def to_torch(self) -> Tensor:
        """(p, p), the eigenvectors in columns."""
        return self.vectors(torch.arange(len(self.values), device=self.values.device)).mT


def cleaned(values: Tensor) -> Tensor:
    """Computed eigenvalues (..., p), with zeros for those that rounding can't tell from zero."""
    noise = (8 + values.shape[-1] ** 0.5) * torch.finfo(values.dtype).eps
    return values.masked_fill(values.abs() <= noise * values.abs().amax(-1, keepdim=True), 0.0)


def power(values: Tensor, exponent: float) -> Tensor:
    """Eigenvalues of the power of a matrix.

    Raises:
        ValueError: a negative power of a singular matrix, or a fractional one of an indefinite one.
    """
    if exponent < 0 and bool((values == 0).any()):
        raise ValueError(
            f"The matrix is singular ({extremes(values)}) and has no power {exponent:g}: add damping "
            "(`F + damping`), or take `F.pinv()`."
        )
    if exponent != int(exponent) and bool((values < 0).any()):
        raise ValueError(
            f"The matrix is indefinite ({extremes(values)}) and has no power {exponent:g}: add more damping "
            "(`F + damping`)."
        )
    return values**exponent


def logarithm(values: Tensor) -> Tensor:
    """Logarithms of the eigenvalues of a positive definite matrix.

    Raises:
        ValueError: the matrix is singular or indefinite.
    """
    if values.numel() and float(values.detach().amin()) <= 0:  # in a third of the time of `(values <= 0).any()`
        raise not_positive(values)
    return values.log()


def not_positive(values: Tensor) -> ValueError:
    """The error for a matrix with these eigenvalues, where a positive definite one is needed."""
    what = "indefinite" if bool((values < 0).any()) else "singular"
    return ValueError(f"The matrix is {what} ({extremes(values)}): add more damping (`F + damping`).")


def pseudo_inverse(values: Tensor, cutoff: float) -> Tensor:
    """`1 / values`, and zero where they are not above the cutoff in size."""
    kept = values.abs() > cutoff
    return torch.where(kept, 1 / values.where(kept, torch.ones_like(values)), torch.zeros_like(values))


def extremes(values: Tensor) -> str:
    """Rank, size, and the smallest and the largest eigenvalue, for messages."""
    values = values.detach().flatten()
    rank, low, high = int(cleaned(values).count_nonzero()), float(values.min()), float(values.max())
    return f"rank {rank} of {len(values)}, smallest eigenvalue {low:.3g}, largest {high:.3g}"
