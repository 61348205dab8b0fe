"""What weightings remember from call to call."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn


class Stateful(ABC):
    """Something that remembers its earlier calls."""

    @abstractmethod
    def reset(self) -> None:
        """Forgets the earlier calls."""


class Memory(Stateful, nn.Module):
    """A module whose `memory` (tensors and numbers by name) goes with `state_dict()` and is empty after `reset()`."""

    def __init__(self) -> None:
        super().__init__()
        self.memory: dict[str, Any] = {}

    def reset(self) -> None:
        self.memory = {}

    def recall(self, like: Tensor, shape: tuple[int, ...], **fresh: Any) -> list[Any]:
        """The remembered values of the names of `fresh`, which are taken where nothing was remembered for this shape.

        Tensors come in the dtype and on the device of `like`.
        """
        if self.memory.get("shape") != shape:
            self.memory = {"shape": shape, **fresh}
        return [value.to(like) if isinstance(value, Tensor) else value for value in map(self.memory.get, fresh)]

    def remember(self, **values: Any) -> None:
        self.memory.update(values)

    def get_extra_state(self) -> dict[str, Any]:
        return self.memory

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.memory = dict(state)


def reset(module: nn.Module) -> None:
    """Resets a module that is stateful."""
    if isinstance(module, Stateful):
        module.reset()
