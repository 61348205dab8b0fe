"""Variants by name, and functions as variants."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor

from nngeo.linalg.arguments import callback, instance, suggestion
from nngeo.variants.base import Cotangents, Variant, keep

VARIANTS: dict[str, Callable[..., Variant]] = {}

Registered = TypeVar("Registered", bound=Callable[..., Any])


class FunctionVariant(Variant):
    """The metric whose cotangents are `function(outputs, *targets)`, (k, b, *outputs). It has no draws or gradients."""

    def __init__(self, function: Callable[..., Tensor], name: str | None = None):
        self.function = callback("function", function, "(outputs, *targets)")
        if name is not None:
            instance("name", name, str)
        self.name = name or str(getattr(function, "__name__", type(function).__name__))

    def exact(self, outputs: Tensor, targets: tuple[Any, ...] = (), mask: Tensor | None = None) -> Cotangents:
        c = self.function(outputs.detach(), *targets)
        if not isinstance(c, Tensor):
            raise TypeError(f"Variant {self.name!r} must return a tensor (k, b, *outputs); found {type(c).__name__}.")
        if c.ndim == 0 or c.shape[1:] != outputs.shape:
            expected = ", ".join(["k", *map(str, outputs.shape)])
            raise ValueError(
                f"Variant {self.name!r} returned shape {tuple(c.shape)}; it must return cotangents (k, b, *outputs), "
                f"here ({expected})."
            )
        return Cotangents.from_tensor(keep(self.counted(outputs, targets, mask), c.detach().to(outputs)))


def register_variant(name: str) -> Callable[[Registered], Registered]:
    """A decorator that makes a Variant class, or a function `outputs, *targets -> c (k, b, *outputs)`, known by a name.

    >>> import torch
    >>> @register_variant("first_output")
    ... def first_output(outputs, *targets):
    ...     c = torch.zeros_like(outputs)
    ...     c[:, 0] = 1
    ...     return c[None]
    >>> make_variant("first_output").exact(torch.randn(1, 3)).all()
    tensor([[[1., 0., 0.]]])
    """

    instance("name", name, str)

    def register(variant: Registered) -> Registered:
        is_class = inspect.isclass(variant) and issubclass(variant, Variant)
        make = variant if is_class else _Named(variant, name)
        # Running a notebook's cell again defines the same thing again; taking another's name is a mistake.
        if name in VARIANTS and _origin(VARIANTS[name]) != _origin(make):
            raise ValueError(f"The name {name!r} is taken by {_origin(VARIANTS[name])}; choose another one.")
        if is_class:
            variant.name = name  # type: ignore[attr-defined]
        VARIANTS[name] = make
        return variant

    return register


def make_variant(variant: str | Variant | Callable[..., Any], **options: Any) -> Variant:
    """A Variant from its name or a function `outputs, *targets -> c (k, b, *outputs)`; one given comes back as it is.

    Options go to the variant, if it takes them: `covariance` (regression), `ignore_index` (segmentation_logits and
    token_logits).

    >>> make_variant("regression", covariance=4.0)
    <Variant 'regression'>
    """
    if isinstance(variant, Variant):
        return _call(lambda: variant, variant.name, options)
    if isinstance(variant, str):
        if variant not in VARIANTS:
            raise ValueError(
                f"Unknown variant {variant!r}; known are {', '.join(VARIANTS)}, or pass a function."
                f"{suggestion(variant, VARIANTS)}"
            )
        return _call(VARIANTS[variant], variant, options)
    if inspect.isclass(variant) and issubclass(variant, Variant):
        return _call(variant, variant.name or variant.__name__, options)
    if callable(variant) and not inspect.isclass(variant):
        made: Variant = FunctionVariant(variant)
        return _call(lambda: made, made.name, options)
    raise TypeError(f"`variant` must be a name, a Variant or a function; found {type(variant).__name__}.")


class _Named:
    """A function that waits to be a FunctionVariant of a given name."""

    def __init__(self, function: Callable[..., Tensor], name: str):
        self.function, self.name = function, name

    def __call__(self) -> Variant:
        return FunctionVariant(self.function, self.name)


def _origin(make: Any) -> str:
    made = make.function if isinstance(make, _Named) else make
    return f"{made.__module__}.{getattr(made, '__qualname__', type(made).__name__)}"


def _call(make: Callable[..., Variant], name: str, options: dict[str, Any]) -> Variant:
    if not options:
        return make()
    known = list(inspect.signature(make).parameters)
    if unusable := [option for option in options if option not in known]:
        takes = f"it takes {', '.join(known)}" if known else "it takes none"
        raise TypeError(f"Variant {name!r} cannot use the option {', '.join(unusable)}; {takes}.")
    return make(**options)
