"""Margin losses of which torch has no second derivative, written out."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


def multi_margin_loss(
    input: Tensor,
    target: Tensor,
    p: int = 1,
    margin: float = 1.0,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """As torch.nn.functional has it: the sum over classes j but y of `w_y max(0, margin - x_y + x_j)^p / C`."""
    x, y = (input, target[:, None]) if input.ndim == 2 else (input[None], target.reshape(1, 1))
    gaps = (margin - x.gather(1, y) + x).clamp(min=0)
    gaps = gaps**p if weight is None else gaps**p * weight[y]
    others = torch.arange(x.shape[1], device=x.device) != y
    return _reduced((gaps * others).sum(1) / x.shape[1], input.ndim == 1, reduction)


def multilabel_margin_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """As torch.nn.functional has it: the sum over labels y and classes j that are none of `max(0, 1 - x_y + x_j) / C`.

    The labels of an example end with the first -1.
    """
    x, y = (input, target) if input.ndim == 2 else (input[None], target[None])
    listed = (y >= 0).long().cumprod(1)
    classes = torch.arange(x.shape[1], device=x.device)
    is_label = ((y[:, :, None] == classes) & (listed[:, :, None] == 1)).any(1)
    gaps = (1 - x.gather(1, y.clamp(min=0))[:, :, None] + x[:, None]).clamp(min=0)
    return _reduced(
        (gaps * (listed[:, :, None] * ~is_label[:, None])).sum((1, 2)) / x.shape[1], input.ndim == 1, reduction
    )


class WrittenOut(TorchFunctionMode):
    """Inside, these losses are the ones above, which can be differentiated twice."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        return _WRITTEN.get(func, func)(*args, **(kwargs or {}))


_WRITTEN: dict[Any, Any] = {
    F.multi_margin_loss: multi_margin_loss,
    F.multilabel_margin_loss: multilabel_margin_loss,
}


def _reduced(losses: Tensor, single: bool, reduction: str) -> Tensor:
    if reduction == "none":
        return losses[0] if single else losses
    return losses.sum() if reduction == "sum" else losses.mean()
