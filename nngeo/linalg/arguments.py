"""Arguments of public calls, checked where they come in: each function returns the value in one form, or raises."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from numbers import Integral, Real
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class UnknownName(KeyError, ValueError):
    """No layer or parameter has this name."""

    def __str__(self) -> str:
        return str(self.args[0])  # KeyError shows a text in quotes


def number(
    name: str,
    value: Any,
    *,
    least: float = -math.inf,
    most: float = math.inf,
    below: float = math.inf,
    positive: bool = False,
) -> float:
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
    bounded = (least, most, below) != (-math.inf, math.inf, math.inf)
    if bounded and not (least <= value <= most and (value < below or below == math.inf)):  # nan, too
        end = f"below {below:g}" if below < math.inf else f"{most:g}"
        from_least = f"be at least {least:g}" if least else "not be negative"
        ends = from_least if end == "inf" else f"be from {least:g} to {end}"
        raise ValueError(f"`{name}` must {ends}; got {value:g}.")
    if not math.isfinite(value):
        raise ValueError(f"`{name}` should be finite; got {value}.")
    if positive and not value > 0:
        raise ValueError(f"`{name}` should be positive; got {value:g}.")
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


def sizes(name: str, value: Any) -> tuple[int, ...]:
    """One or more sizes, whole numbers from 1 on, as a tuple.

    Raises:
        TypeError, ValueError: they are none.
    """
    given = tuple(value) if isinstance(value, tuple | list) else (value,)
    return tuple(count(name, size) for size in given)


def choice(name: str, value: Any, known: Iterable[T]) -> T:
    """One of the known values; the error suggests the nearest name.

    Raises:
        ValueError: it is none of them.
    """
    known = list(known)
    plain = isinstance(value, str | int | float | None) and not isinstance(value, bool)
    found = [x for x in known if plain and x == value]
    if not found:
        names = ", ".join(map(repr, known))
        raise ValueError(f"Unknown {name}={shown(value)}; known are {names}.{suggestion(value, known)}")
    return found[0]


def flag(name: str, value: Any) -> bool:
    """True or False.

    Raises:
        TypeError: it is neither.
    """
    if not isinstance(value, bool):
        raise TypeError(f"`{name}` should be True or False; got {shown(value)}.")
    return value


def axis(name: str, value: Any, ndim: int) -> int:
    """The index of one of so many axes.

    Raises:
        TypeError, ValueError: it is no whole number, or outside of them.
    """
    return count(name, value, least=-ndim, most=ndim - 1)


def instance(name: str, value: Any, kind: Any, hint: str = "") -> Any:
    """An object of a class; `hint` says how one is made.

    Raises:
        TypeError: it is none.
    """
    if not isinstance(value, kind):
        made = f": make one of it, {value.__name__}()" if isinstance(value, type) and issubclass(value, kind) else ""
        raise TypeError(f"`{name}` should be a {kind.__name__}{hint and f', {hint}'}; got {shown(value)}{made}.")
    return value


def takes_options(what: str, function: Callable[..., Any], options: Iterable[str]) -> None:
    """Raise TypeError unless a function takes these keywords; `what` is its name for users."""
    parameters = inspect.signature(function).parameters.values()
    known = [x.name for x in parameters if x.kind is x.KEYWORD_ONLY or x.default is not x.empty]
    if any(x.kind is x.VAR_KEYWORD for x in parameters):
        return
    if unknown := [name for name in options if name not in known]:
        takes = f"it takes {', '.join(known)}" if known else "it takes none"
        raise TypeError(f"{what} has no option {', '.join(unknown)}; {takes}.")


def callback(name: str, value: Any, of: str = "", *, optional: bool = False) -> Any:
    """What can be called, and is no class (but a partial one); `of` says what it is called with, for messages.

    Raises:
        TypeError: it is none.
    """
    if not (value is None and optional) and (not callable(value) or isinstance(value, type)):
        what = f"a function{of and f' {of}'}{', or None' if optional else ''}"
        raise TypeError(f"`{name}` should be {what}; got {shown(value)}.")
    return value


def random_source(value: Any) -> torch.Generator | None:
    """A torch.Generator, or None for torch's global one.

    Raises:
        TypeError: it is neither.
    """
    if not (value is None or isinstance(value, torch.Generator)):
        raise TypeError(f"`generator` should be a torch.Generator or None; got {shown(value)}.")
    return value


def device_named(value: Any) -> torch.device:
    """A device of this machine.

    Raises:
        TypeError, ValueError: it is no device, or one of a kind that is not available here.
    """
    if not isinstance(value, torch.device | str | int) or isinstance(value, bool):
        raise TypeError(f"`device` should be a torch.device or its name; got {shown(value)}.")
    try:
        device = torch.device(value)
    except RuntimeError as error:
        raise ValueError(f"device={value!r} is no device of this machine: {str(error).splitlines()[0]}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device={str(value)!r}, but no GPU is available to torch (torch.cuda.is_available() is False)."
        )
    return device


def floating(value: Any) -> torch.dtype:
    """A dtype of real floating-point numbers.

    Raises:
        TypeError: it is none.
    """
    if not isinstance(value, torch.dtype) or not value.is_floating_point:
        raise TypeError(f"`dtype` should be one of floating-point numbers (torch.float64); got {value!r:.60}.")
    return value


def destination(like: Tensor, args: tuple[Any, ...], options: dict[str, Any]) -> None:
    """Raise unless a tensor can be brought to where the arguments of `Tensor.to` say, in floating-point numbers.

    Raises:
        TypeError, ValueError: they are no such arguments, or name what is not available.
    """
    for value in (*args, *options.values()):
        if isinstance(value, str):
            device_named(value)
        elif isinstance(value, torch.dtype):
            floating(value)
        elif isinstance(value, torch.device):
            device_named(value)
    try:
        like.detach().flatten()[:0].to(*args, **options)
    except (RuntimeError, AssertionError, TypeError) as error:
        what = ", ".join([*map(shown, args), *(f"{name}={shown(x)}" for name, x in options.items())])
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"to({what}): no such device or dtype, or it is not available here: {reason}") from error


def tensor(name: str, value: Any, shape: str, *, ndim: int | None = None, real: bool = True) -> Tensor:
    """A tensor, of real floating-point numbers if `real`, with `ndim` axes; `shape` describes it for messages.

    Raises:
        TypeError: it is no tensor, or one of integers, booleans or complex numbers.
        ValueError: it has another number of axes.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"`{name}` should be a tensor {shape}; got {shown(value)}.")
    if real and not value.is_floating_point():
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
    if isinstance(value, torch.device | torch.dtype):
        return str(value)
    return f"a {type(value).__name__}" if not isinstance(value, type) else f"the class {value.__name__}"


def suggestion(value: Any, known: Iterable[Any]) -> str:
    """ " Did you mean ...?", where a name is near to a known one; else ""."""
    names = [name for name in known if isinstance(name, str)]
    near = get_close_matches(value, names, 1) if isinstance(value, str) else []
    return f" Did you mean {near[0]!r}?" if near else ""
