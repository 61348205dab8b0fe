"""Norm layers on the CPU whose gradients don't depend on how their tensors lie in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.overrides import TorchFunctionMode


def any_strides(modules: Iterable[nn.Module]) -> AbstractContextManager[Any]:
    """Inside, norm layers among the modules have the right gradients for any strides of inputs and gradients.

    Torch 2.13 on the CPU reads one of both as if it lay as the other where one lies like channels last, but for a
    stride of an axis of length one (`image.permute(2, 0, 1)[None]`, `outputs.squeeze(0)`): the gradients of batch norm
    of one example, and of instance norm, are wrong then.
    """
    flat = (nn.BatchNorm1d, nn.InstanceNorm1d)
    found = any(isinstance(module, _NormBase) and not isinstance(module, flat) for module in modules)
    return _Laid() if found else nullcontext()


class _Laid(TorchFunctionMode):
    """Inside, the functions of `LAID` take and give contiguous tensors."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        return LAID.get(func, func)(*args, **(kwargs or {}))


def _batch_norm(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return _laid(F.batch_norm, input, *args, **kwargs) if len(input) == 1 else F.batch_norm(input, *args, **kwargs)


def _instance_norm(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return _laid(F.instance_norm, input, *args, **kwargs)


def _laid(norm: Callable[..., Tensor], input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The gradient that comes back through a flat view is contiguous, too; the copy is one that may be written to."""
    found = norm(input.contiguous(), *args, **kwargs)
    return found.flatten().view(found.shape).clone()


LAID: dict[Any, Callable[..., Tensor]] = {F.batch_norm: _batch_norm, F.instance_norm: _instance_norm}
