"""Arguments of constructors that stay readable and writable attributes, checked at every write."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor


class Option:
    """An attribute whose new values go through `check(name, value)`, which returns what is kept or raises."""

    def __init__(self, check: Callable[[str, Any], Any]) -> None:
        self.check = check

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, owner: Any, kind: type | None = None) -> Any:
        return self if owner is None else owner.__dict__[f"_{self.name}"]

    def __set__(self, owner: Any, value: Any) -> None:
        owner.__dict__[f"_{self.name}"] = self.check(self.name, value)


class Delegated:
    """An attribute that is one of `with_options`."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, owner: Any, kind: type | None = None) -> Any:
        return self if owner is None else getattr(owner.with_options, self.name)

    def __set__(self, owner: Any, value: Any) -> None:
        setattr(owner.with_options, self.name, value)


def describe(module: object, holder: object | None = None) -> str:
    """`Name(option=value, ...)` with the arguments of the constructor, from who holds them (the module itself if None).

    An option that the holder delegates is part of another one, and is shown there.
    """
    holder = holder or module
    names = [
        n
        for n in inspect.signature(type(module)).parameters
        if not isinstance(getattr(type(holder), n, None), Delegated)
    ]
    return f"{type(module).__name__}({', '.join(f'{name}={_shown(getattr(holder, name))}' for name in names)})"


def _shown(value: Any) -> str:
    return value.__name__ if inspect.isfunction(value) else repr(value)


def short(vector: Tensor) -> str:
    """ "[1., 0.5]" for a vector, two digits after the point; its shape for another tensor."""
    if vector.dim() != 1:
        return f"of shape {tuple(vector.shape)}"
    return f"[{', '.join(f'{value:.2f}'.rstrip('0') for value in vector.tolist())}]"


def named(module: object, vector: Tensor | None) -> str:
    """ "Name" of the class, or "Name([1., 0.5])" where an option has been given."""
    return type(module).__name__ + ("" if vector is None else f"({short(vector)})")


def number(lowest: float = -math.inf, highest: float = math.inf, *, open_ends: str = "", whole: bool = False) -> Option:
    """A number in an interval; `open_ends` has "lowest" or "highest" in it where that end is excluded."""
    kind: Any
    kind, called = (Integral, "a whole number") if whole else (Real, "a number")
    above, below = "lowest" in open_ends, "highest" in open_ends
    ends = [f"{'greater than' if above else 'at least'} {lowest:g}"] if lowest > -math.inf else []
    ends += [f"{'less than' if below else 'at most'} {highest:g}"] if highest < math.inf else []

    def check(name: str, value: Any) -> Any:
        if not isinstance(value, kind):
            raise TypeError(f"{name} should be {called}, found {value!r}.")
        if not (lowest < value if above else lowest <= value) or not (value < highest if below else value <= highest):
            raise ValueError(f"{name} should be {' and '.join(ends) or 'a number'}, found {value!r}.")
        return value

    return Option(check)


def one_of(*choices: Any) -> Option:
    """One of the choices."""

    def check(name: str, value: Any) -> Any:
        if value not in choices:
            raise ValueError(f"Unknown {name} {value!r}; known are {', '.join(map(repr, choices))}.")
        return value

    return Option(check)


def vector(*, optional: bool = True) -> Option:
    """A tensor (m,), or None where that is an option."""

    def check(name: str, value: Any) -> Any:
        if value is None and optional:
            return value
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} should be a tensor (m,), found {type(value).__name__}.")
        if value.dim() != 1:
            raise ValueError(f"{name} should be a tensor (m,), found the shape {tuple(value.shape)}.")
        return value

    return Option(check)


def rows_or(name: str, value: Tensor | None, default: float, statistic: Tensor) -> Tensor:
    """The vector, or m times the default, in the dtype and on the device of a statistic with m rows."""
    if value is None:
        return statistic.new_full((len(statistic),), default)
    if len(value) != len(statistic):
        raise ValueError(f"{name} has {len(value)} entries for a matrix with {len(statistic)} rows.")
    return value.to(statistic)


def check_finite(name: str, matrix: Tensor) -> None:
    """Raises a ValueError that names the rows with NaN or infinite entries."""
    # The sum is one pass without another tensor of that size; it may itself overflow, hence the second look.
    if torch.isfinite(matrix.detach().sum()):
        return
    rows = (~torch.isfinite(matrix)).any(1).nonzero()[:, 0].tolist()
    if rows:
        raise ValueError(
            f"{name} has NaN or infinite entries in the rows {rows[:8]}: some objectives have no finite gradient. "
            "Skip this step, or lower the learning rate or the loss scale."
        )
