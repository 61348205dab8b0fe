"""Full precision inside the autocast regions of the caller, which would multiply in bfloat16 without a word."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from inspect import isfunction
from typing import Any, ParamSpec, TypeVar

import torch

DEVICES = ("cpu", "cuda", "xpu", "mps")

P = ParamSpec("P")
R = TypeVar("R")


def full_precision(function: Callable[P, R]) -> Callable[P, R]:
    """The same function, run with autocast switched off on every device where it is on."""

    @wraps(function)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        if not torch._C._is_any_autocast_enabled():
            return function(*args, **kwargs)
        with ExitStack() as stack:
            for device in DEVICES:
                if torch.is_autocast_enabled(device):
                    stack.enter_context(torch.autocast(device, enabled=False))
            return function(*args, **kwargs)

    return guarded


class FullPrecision:
    """A mixin: public methods and operators, those of subclasses included, are run in `full_precision`."""

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        for name, member in list(vars(cls).items()):
            operator = name.startswith("__") and name.endswith("__")
            if isfunction(member) and (operator or not name.startswith("_")):
                setattr(cls, name, full_precision(member))
            elif isinstance(member, classmethod | staticmethod) and not name.startswith("_"):
                setattr(cls, name, type(member)(full_precision(member.__func__)))
