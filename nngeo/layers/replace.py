"""Run a module with other tensors in place of its parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from nngeo.layers.caches import emptied
from nngeo.layers.turn import TURN


@contextmanager
def replaced(module: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Parameters, by name, are these tensors inside; everywhere where the module and its children hold them.

    `torch.func.functional_call` (torch 2.13) leaves its tensors in a model of which a module is registered under two
    names; here every module is visited once, and tied parameters move together. Caches of the parameters are empty.
    """
    with TURN:
        by_id = {id(module.get_parameter(name)): tensor for name, tensor in tensors.items()}
        places = [
            (child._parameters, name, p)
            for child in module.modules()
            for name, p in child._parameters.items()
            if id(p) in by_id
        ]
        try:
            for own, name, p in places:
                own[name] = by_id[id(p)]  # type: ignore[assignment]
            with emptied(module):
                yield
        finally:
            for own, name, p in places:
                own[name] = p


def call_with(module: nn.Module, tensors: Mapping[str, Tensor], args: tuple, kwargs: dict[str, Any]) -> Any:
    """The module's output with some of its parameters replaced."""
    with replaced(module, tensors):
        return module(*args, **kwargs)
