"""Elementwise arithmetic, written once for the vectors of both spaces."""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from numbers import Number, Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nngeo.linalg.arguments import destination, shown
from nngeo.linalg.length import length
from nngeo.linalg.precision import FullPrecision

if TYPE_CHECKING:
    from typing_extensions import Self


class Arithmetic(FullPrecision, ABC):
    """+ - * / ** with numbers, 0-d tensors and vectors of the same space, on both sides and in place.

    The result has the representation of the vector on the left, and is differentiable where its tensors are.
    """

    __array_ufunc__ = None  # `array * vector` is an error, not an array of vectors

    @abstractmethod
    def _tensors(self) -> list[Tensor]:
        """The tensors that hold the coordinates."""

    @abstractmethod
    def _with(self, tensors: Sequence[Tensor]) -> Self:
        """A vector of the same space and representation with other tensors."""

    @abstractmethod
    def _like(self, other: Self) -> list[Tensor]:
        """The other vector's coordinates in the shapes of `_tensors()`; raises if it is of another space."""

    def __add__(self, other: Any) -> Self:
        return self._combine(operator.add, other)

    def __sub__(self, other: Any) -> Self:
        return self._combine(operator.sub, other)

    def __mul__(self, other: Any) -> Self:
        return self._combine(operator.mul, other)

    def __truediv__(self, other: Any) -> Self:
        return self._combine(operator.truediv, other)

    def __pow__(self, other: Any) -> Self:
        return self._combine(operator.pow, other)

    def __radd__(self, other: Any) -> Self:
        return self._combine(operator.add, other)

    def __rsub__(self, other: Any) -> Self:
        return self._combine(lambda x, y: y - x, other)

    def __rmul__(self, other: Any) -> Self:
        return self._combine(operator.mul, other)

    def __rtruediv__(self, other: Any) -> Self:
        return self._combine(lambda x, y: y / x, other)

    def __rpow__(self, other: Any) -> Self:
        return self._combine(lambda x, y: y**x, other)

    def __iadd__(self, other: Any) -> Self:
        return self._combine_(operator.iadd, other)

    def __isub__(self, other: Any) -> Self:
        return self._combine_(operator.isub, other)

    def __imul__(self, other: Any) -> Self:
        return self._combine_(operator.imul, other)

    def __itruediv__(self, other: Any) -> Self:
        return self._combine_(operator.itruediv, other)

    def __neg__(self) -> Self:
        return self._with([-x for x in self._tensors()])

    def __pos__(self) -> Self:
        return self

    def __matmul__(self, other: Any) -> Tensor:
        return self.dot(other) if isinstance(other, type(self)) else NotImplemented

    def dot(self, other: Self) -> Tensor:
        """The inner product, ()."""
        if not isinstance(other, type(self)):
            raise TypeError(f"The inner product is with another {type(self).__name__}; found {type(other).__name__}.")
        return torch.stack([(x * y).sum() for x, y in zip(self._tensors(), self._like(other), strict=True)]).sum()

    def norm(self, p: float = 2) -> Tensor:
        """The p-norm over all coordinates, (); p as in torch.linalg.vector_norm."""
        if not isinstance(p, Real) or isinstance(p, bool) or p != p:
            raise TypeError(f"`p` should be a number (inf included); got {shown(p)}.")
        x = torch.cat([x.flatten() for x in self._tensors()])
        return length(x) if p == 2 else torch.linalg.vector_norm(x, ord=p)

    def sum(self) -> Tensor:
        """The sum of all coordinates, ()."""
        return torch.stack([x.sum() for x in self._tensors()]).sum()

    def clone(self) -> Self:
        """A copy in memory of its own, still differentiable."""
        return self._with([x.clone() for x in self._tensors()])

    def detach(self) -> Self:
        """The same numbers, in the same memory, without their graph."""
        return self._with([x.detach() for x in self._tensors()])

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """The vector on another device or in another dtype; arguments as for Tensor.to."""
        destination(self._tensors()[0], args, kwargs)
        return self._with([x.to(*args, **kwargs) for x in self._tensors()])

    @property
    def dtype(self) -> torch.dtype:
        """That of the sum of all coordinates."""
        dtype, *others = [x.dtype for x in self._tensors()]
        for other in others:
            dtype = torch.promote_types(dtype, other)
        return dtype

    @property
    def device(self) -> torch.device:
        """That of the first tensor."""
        return self._tensors()[0].device

    def _combine(self, op: Callable[[Any, Any], Tensor], other: Any) -> Self:
        others = self._operands(other)
        if others is None:
            return NotImplemented
        return self._with([op(x, y) for x, y in zip(self._tensors(), others, strict=True)])

    def _combine_(self, op: Callable[[Any, Any], Tensor], other: Any) -> Self:
        others = self._operands(other)
        if others is None:
            return NotImplemented
        for x, y in zip(self._tensors(), others, strict=True):
            op(x, y)
        return self

    def _operands(self, other: Any) -> Sequence[Any] | None:
        """What each tensor is combined with; None for what has no arithmetic with vectors."""
        if isinstance(other, type(self)):
            return self._like(other)
        if isinstance(other, Tensor) and other.ndim > 0:
            raise TypeError(
                f"A {type(self).__name__} combines with numbers, 0-d tensors and {type(self).__name__}s; found a "
                f"tensor of shape {tuple(other.shape)}. Make it a {type(self).__name__} first."
            )
        if isinstance(other, bool) or (isinstance(other, complex) and not self.dtype.is_complex):
            raise TypeError(f"A {type(self).__name__} of {self.dtype} does not combine with {other!r}.")
        if isinstance(other, Number | Tensor):
            return [other] * len(self._tensors())
        return None
