"""Arguments of public calls, checked where they come in: each function returns the value in one form, or raises."""

from __future__ import annotations

import math
from collections.abc import Iterable
from difflib import get_close_matches
from numbers import Integral, Real
from typing import Any, TypeVar

from torch import Tensor

T = TypeVar("T")


def number(name: str, value: Any, *, least: float = -math.inf, most: float = math.inf) -> float:
    """A finite number in an interval, from a number or a tensor with one entry.

    Raises:
        TypeError: it is none.
        ValueError: not finite, or outside of the interval.
    """
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        value = value.item()
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"`{name}` should be a number; got {shown(value)}.")
    value = float(value)
    if not math.isfinite(value):
        raise ValueError(f"`{name}` should be finite; got {value}.")
    if not least <= value <= most:
        ends = (
            "not be negative"
            if (least, most) == (0, math.inf)
            else f"be at least {least:g}"
            if most == math.inf
            else f"be from {least:g} to {most:g}"
        )
        raise ValueError(f"`{name}` must {ends}; got {value:g}.")
    return value


def count(name: str, value: Any, *, least: int = 1, most: int | None = None, of: str = "") -> int:
    """A whole number in an interval; `of` says what the upper end is, for messages.

    Raises:
        TypeError: it is no whole number.
        ValueError: outside of the interval.
    """
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"`{name}` should be a whole number; got {shown(value)}.")
    value = int(value)
    if value < least or (most is not None and value > most):
        ends = f"at least {least}" if most is None else f"from {least} to {most}{of and f', {of}'}"
        raise ValueError(f"`{name}` should be {ends}; got {value}.")
    return value


def choice(name: str, value: Any, known: Iterable[T]) -> T:
    """One of the known values; the error suggests the nearest name.

    Raises:
        ValueError: it is none of them.
    """
    known = list(known)
    found = [x for x in known if type(x) is type(value) and x == value]
    if not found:
        *first, last = map(repr, known)
        names = f"{', '.join(first)} and {last}" if first else last
        raise ValueError(f"Unknown {name}={value!r}; known are {names}.{suggestion(value, known)}")
    return found[0]


def tensor(name: str, value: Any, shape: str, *, ndim: int | None = None) -> Tensor:
    """A tensor of real floating-point numbers, with `ndim` axes; `shape` describes it for messages.

    Raises:
        TypeError: it is no tensor, or one of integers, booleans or complex numbers.
        ValueError: it has another number of axes.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"`{name}` should be a tensor {shape}; got {shown(value)}.")
    if not value.is_floating_point():
        raise TypeError(f"`{name}` should be a tensor {shape} of floating-point numbers; it is {value.dtype}.")
    if ndim is not None and value.ndim != ndim:
        raise ValueError(f"`{name}` should be a tensor {shape}; it has the shape {tuple(value.shape)}.")
    return value


def shown(value: Any) -> str:
    """What a value is, for messages: short ones themselves, tensors and containers by kind and size."""
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)} of {value.dtype}"
    if isinstance(value, str | int | float | complex | bool | None):
        return repr(value)[:80]
    return f"a {type(value).__name__}" if not isinstance(value, type) else f"the class {value.__name__}"


def suggestion(value: Any, known: Iterable[Any]) -> str:
    """ " Did you mean ...?", where a name is near to a known one; else ""."""
    names = [name for name in known if isinstance(name, str)]
    near = get_close_matches(value, names, 1) if isinstance(value, str) else []
    return f" Did you mean {near[0]!r}?" if near else ""
