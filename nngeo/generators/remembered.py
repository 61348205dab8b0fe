"""What was found out about a model, kept as long as its structure and the function that runs it are the same."""

from __future__ import annotations

import weakref
from typing import Any, Generic, TypeVar

from torch import nn

from nngeo.generators.batches import Function
from nngeo.generators.signature import code_of, signature
from nngeo.layers.collection import LayerCollection

Found = TypeVar("Found")

# Structures and functions remembered for one model, and keys of the caller for each: a number in them has many values.
MOST = 64


class Newest(dict[Any, Found]):
    """The `MOST` newest entries."""

    def __setitem__(self, key: Any, found: Found) -> None:
        super().__setitem__(key, found)
        if len(self) > MOST:
            del self[next(iter(self))]


class Remembered(Generic[Found]):
    """Things found by structure, layers and code of the function. They must not refer to the model."""

    def __init__(self) -> None:
        self._found: weakref.WeakKeyDictionary[nn.Module, Newest[Newest[Found]]] = weakref.WeakKeyDictionary()

    def of(self, model: nn.Module, function: Function | None, layers: LayerCollection) -> dict[Any, Found]:
        """What is known, by whatever keys the caller uses; empty, and to be filled, at first."""
        try:
            key = signature(model, layers), None if function is None else code_of(function)
            hash(key)
        except TypeError:  # what such a function refers to can't be compared: it is looked at every time
            return {}
        known = self._found.setdefault(model, Newest())
        if key not in known:
            known[key] = Newest()
        return known[key]
