"""Losses of torch that weigh the examples of a batch against each other: in the loss of one example that is lost."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

DIVIDING = (F.cross_entropy, F.nll_loss)  # whose mean is over the weights of a batch
WEIGHTED = (F.binary_cross_entropy, F.binary_cross_entropy_with_logits)  # by tensors that may be as long as the batch


class Weighing(TorchFunctionMode):
    """Refuse such losses, while one is called on one example; note which targets are ignored in a mean."""

    def __init__(self) -> None:
        super().__init__()
        self.ignored: set[tuple[str, int]] = set()

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func in DIVIDING:
            self._dividing(func.__name__, _named(func, args, kwargs))
        elif func in WEIGHTED:
            _weighted(func.__name__, _named(func, args, kwargs))
        return func(*args, **(kwargs or {}))

    def _dividing(self, name: str, given: dict[str, Any]) -> None:
        if given["reduction"] != "mean" or given["target"].is_floating_point():
            return
        if given["weight"] is not None:
            raise ValueError(_message(name, "weight=..."))
        self.ignored.add((name, given["ignore_index"]))

    def check(self, targets: tuple[Any, ...]) -> None:
        """Raise where a target is one of those that are ignored."""
        for name, index in self.ignored:
            for target in targets:
                if isinstance(target, Tensor) and bool((target == index).any()):
                    raise ValueError(_message(name, f"ignore_index={index}"))


def _weighted(name: str, given: dict[str, Any]) -> None:
    shape, weight = given["input"].shape, given["weight"]
    if weight is not None and torch.broadcast_shapes(shape, weight.shape) != shape:
        raise ValueError(
            f"`loss_fn` calls {name} on one example, of shape {tuple(shape)}, with weights {tuple(weight.shape)} of a "
            "whole batch. Let them be a further target, loss_fn(outputs, target, weight), and stand in the batch."
        )


def _message(name: str, why: str) -> str:
    return (
        f"`loss_fn` calls {name}({why}, reduction='mean'), which divides by the weight of what counts in a batch: in "
        "the loss of one example that cancels. Use reduction='sum'; the matrix is the mean over the examples."
    )


def _named(func: Any, args: tuple, kwargs: dict[str, Any] | None) -> dict[str, Any]:
    bound = inspect.signature(func).bind(*args, **(kwargs or {}))
    bound.apply_defaults()
    return bound.arguments
