"""Aggregators (a Jacobian to a vector) and weightings (a statistic to weights of rows), and how one makes the other."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

from nngeo.descent.aggregation.options import Delegated, check_finite, describe
from nngeo.descent.aggregation.stateful import Stateful, reset
from nngeo.linalg.arguments import instance
from nngeo.linalg.gramian import row_gramian
from nngeo.linalg.precision import full_precision

Transform = Callable[[Tensor], Tensor]
Statistic = TypeVar("Statistic", bound=Tensor, contravariant=True)


class Weighting(nn.Module, Generic[Statistic]):
    """Weights (m,) from a statistic with m rows: `forward(statistic)`.

    Without a graph where the class says `differentiable = False`. `W << f` is the weighting that looks at
    `f(statistic)`.
    """

    differentiable: bool = True
    reads_values: ClassVar[bool] = True  # else the weights depend on the number of rows only

    def __init__(self) -> None:  # no arguments, where a subclass does not say so
        super().__init__()

    @full_precision
    def __call__(self, statistic: Tensor, /) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.differentiable):
            return super().__call__(statistic)

    def __lshift__(self, fn: Transform) -> ComposedWeighting:
        return ComposedWeighting(self, fn)

    def __repr__(self) -> str:
        return describe(self)


class RowWeighting(Weighting):
    """Weights (m,) from any matrix with m rows, a Jacobian or its Gramian: `weights(matrix)`, where there are rows."""

    @abstractmethod
    def weights(self, matrix: Tensor) -> Tensor:
        """Weights (m,) of the rows of a matrix (m, ...)."""

    def forward(self, matrix: Tensor, /) -> Tensor:
        check_matrix(matrix)
        return self.weights(matrix) if len(matrix) else matrix.new_zeros(0)


class GramianWeighting(Weighting):
    """Weights (m,) from a Gramian (m, m): `weights(gramian)`. Of `J J'`, or of `J1 J2'` where a method says so.

    No rows have no weights, but for a method that `needs_rows`.
    """

    differentiable = False
    needs_rows: ClassVar[bool] = False

    @abstractmethod
    def weights(self, gramian: Tensor) -> Tensor:
        """Weights (m,) from a finite matrix (m, m)."""

    def forward(self, gramian: Tensor, /) -> Tensor:
        check_real("gramian", gramian)
        if gramian.dim() != 2 or gramian.shape[0] != gramian.shape[1]:
            raise ValueError(
                f"gramian should be a square matrix (m, m), found the shape {tuple(gramian.shape)}. "
                "The aggregator of the same name takes a Jacobian (m, n)."
            )
        check_finite("gramian", gramian)
        return self.weights(gramian) if len(gramian) or self.needs_rows else gramian.new_zeros(0)


class ComposedWeighting(Weighting, Stateful):
    """`weighting(fn(statistic))`, in the dtype of the statistic."""

    def __init__(self, weighting: Weighting, fn: Transform) -> None:
        super().__init__()
        self.weighting = weighting
        self.fn = fn

    @property
    def differentiable(self) -> bool:  # type: ignore[override]
        return self.weighting.differentiable

    def forward(self, statistic: Tensor, /) -> Tensor:
        return self.weighting(self.fn(statistic)).to(statistic.dtype)

    def reset(self) -> None:
        reset(self.weighting)

    def __repr__(self) -> str:
        return f"{self.weighting!r} << {_name(self.fn)}"


class Aggregator(nn.Module):
    """One vector (n,) from the rows of a Jacobian (m, n): `forward(matrix)`.

    Without a graph where `differentiable` is false. `A << f` is the aggregator of `f(matrix)`.
    """

    differentiable: bool = True

    def __init__(self) -> None:
        super().__init__()

    @full_precision
    def __call__(self, matrix: Tensor, /) -> Tensor:
        check_matrix(matrix)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.differentiable):
            return super().__call__(matrix)

    def __lshift__(self, fn: Transform) -> ComposedAggregator:
        return ComposedAggregator(self, fn)

    def __repr__(self) -> str:
        return describe(self)

    def __str__(self) -> str:
        return type(self).__name__

    if TYPE_CHECKING:  # the options of a weighting are attributes of its aggregator

        def __getattr__(self, name: str) -> Any: ...
        def __setattr__(self, name: str, value: Any) -> None: ...


class ComposedAggregator(Aggregator, Stateful):
    """`aggregator(fn(matrix))`."""

    def __init__(self, aggregator: Aggregator, fn: Transform) -> None:
        super().__init__()
        self.aggregator = aggregator
        self.fn = fn

    @property
    def differentiable(self) -> bool:  # type: ignore[override]
        return self.aggregator.differentiable

    def forward(self, matrix: Tensor, /) -> Tensor:
        return self.aggregator(self.fn(matrix))

    def reset(self) -> None:
        reset(self.aggregator)

    def __repr__(self) -> str:
        return f"{self.aggregator!r} << {_name(self.fn)}"

    def __str__(self) -> str:
        return f"{self.aggregator} << {_name(self.fn)}"


class WeightedAggregator(Aggregator, Stateful):
    """`weighting(J) @ J`.

    `class X(WeightedAggregator, of=XWeighting)` is all that an aggregator needs whose weighting exists: X is
    constructed with the arguments of XWeighting, which are attributes of both.
    """

    weighting: Weighting
    weighting_type: ClassVar[type[Weighting] | None] = None

    def __init_subclass__(cls, of: type[Weighting] | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if of is None:
            return
        cls.weighting_type = of
        signature = inspect.signature(of)
        setattr(cls, "__signature__", signature)  # noqa: B010 (type checkers know no such attribute)
        for option in signature.parameters.keys() - {"weighting"}:  # an aggregator has one itself
            setattr(cls, option, Delegated(option))

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        make = self.weighting_type or the_weighting
        self._take(make(*args, **kwargs))

    def _take(self, weighting: Weighting) -> None:
        self.weighting = weighting

    @property
    def with_options(self) -> Weighting:
        """The weighting that holds the options."""
        return self.weighting

    @property
    def differentiable(self) -> bool:  # type: ignore[override]
        return self.weighting.differentiable

    def forward(self, matrix: Tensor, /) -> Tensor:
        return self.weighting(matrix) @ matrix

    def reset(self) -> None:
        """Forgets the earlier calls, where the weighting remembers them."""
        reset(self.weighting)

    def __repr__(self) -> str:
        if self.weighting_type is None:
            return f"{type(self).__name__}({self.with_options!r})"
        return describe(self, self.with_options)


class GramianWeightedAggregator(WeightedAggregator):
    """`gramian_weighting(J J') @ J`, with the Gramian in double precision."""

    gramian_weighting: Weighting

    def _take(self, weighting: Weighting) -> None:
        self.gramian_weighting = weighting
        self.weighting = weighting << row_gramian

    @property
    def with_options(self) -> Weighting:
        return self.gramian_weighting


def check_matrix(matrix: Tensor) -> None:
    """Raise unless the matrix is a finite one (m, n) of real numbers."""
    check_real("matrix", matrix)
    if matrix.dim() != 2:
        shape = tuple(matrix.shape)
        raise ValueError(f"matrix should be a Jacobian (m, n) with a row for each objective, found the shape {shape}.")
    check_finite("matrix", matrix)


def the_weighting(weighting: Weighting) -> Weighting:
    """The argument, which has to be a Weighting."""
    return instance("weighting", weighting, Weighting)


def check_real(name: str, matrix: Tensor) -> None:
    """Raise unless something is a tensor of real floating-point numbers."""
    if not isinstance(matrix, Tensor):
        raise TypeError(f"{name} should be a tensor, found {type(matrix).__name__}.")
    if not matrix.is_floating_point():
        hint = " Take a complex number for two real ones: torch.view_as_real." if matrix.is_complex() else ""
        raise TypeError(f"{name} should have real floating-point numbers, found {matrix.dtype}.{hint}")


def _name(fn: Transform) -> str:
    return getattr(fn, "__name__", None) or repr(fn)
