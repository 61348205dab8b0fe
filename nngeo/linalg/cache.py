"""Derived quantities (eigenbases, Cholesky factors), kept as long as the tensors they came from are unchanged."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

from torch import Tensor


def version(*tensors: Tensor) -> tuple[int, ...]:
    """A count for each tensor that grows when it is changed in place; 0 where torch keeps none (inference mode)."""
    return tuple(0 if tensor.is_inference() else tensor._version for tensor in tensors)


class Cache:
    """One value for each name, made again when its key has changed. Never copied and never pickled.

    >>> cache = Cache()
    >>> cache.get("square", 3, lambda: 9), cache.get("square", 3, lambda: 0), cache.get("square", 4, lambda: 16)
    (9, 9, 16)
    """

    def __init__(self) -> None:
        self._kept: dict[str, tuple[Hashable, Any]] = {}

    def get(self, name: str, key: Hashable, make: Callable[[], Any]) -> Any:
        """The value kept under the name, if its key is this one; else a new one."""
        if not self.holds(name, key):
            self._kept.pop(name, None)  # freed before the next one is made
            self._kept[name] = key, make()
        return self._kept[name][1]

    def holds(self, name: str, key: Hashable) -> bool:
        """Whether `get` would find the value."""
        return name in self._kept and self._kept[name][0] == key

    def __reduce__(self) -> tuple[type[Cache], tuple[()]]:
        return Cache, ()
