"""Kernels that can be differentiated twice, and forward."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode


@contextmanager
def plain_kernels(model: nn.Module, *, twice: bool = True) -> Iterator[None]:
    """Attention by plain matrix products; recurrent layers, if the model has any, by plain cells.

    Fused attention has no forward-mode derivative and no second derivative, on any device; nor have the fused
    recurrent kernels of oneDNN and cuDNN. The inference path of nn.TransformerEncoderLayer has no derivative at all.
    The second derivative of fused weight norm is wrong (torch 2.13: by 10 to 300 % of its norm); its first derivatives
    are right, so without `twice` it is left alone, which spares a look at every operation.
    """
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with ExitStack() as stack:
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            if twice:
                stack.enter_context(_PlainWeightNorm())
            if any(isinstance(module, nn.RNNBase) for module in model.modules()):
                stack.enter_context(_plain_recurrence())
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)


class _PlainWeightNorm(TorchFunctionMode):
    """Weight norm as a product of differentiable operations."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is torch._weight_norm:
            return _weight_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    return v * (g / torch.norm_except_dim(v, 2, dim))


@contextmanager
def _plain_recurrence() -> Iterator[None]:
    with ExitStack() as stack:
        # Setting oneDNN's flags warns about a setting for Intel GPUs that is not touched here.
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message="TF32 acceleration")
        stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
        stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        yield
