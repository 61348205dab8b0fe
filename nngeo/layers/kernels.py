"""Kernels that can be differentiated twice, and forward."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from nngeo.layers.strides import LAID
from nngeo.layers.turn import TURN


@contextmanager
def plain_kernels(model: nn.Module, *, twice: bool = True) -> Iterator[None]:
    """Attention by plain matrix products; recurrent layers, if the model has any, by plain cells.

    Fused attention has no forward-mode derivative and no second derivative, on any device; nor have the fused
    recurrent kernels of oneDNN and cuDNN. The inference path of nn.TransformerEncoderLayer has no derivative at all.
    Some operations have a second derivative that is wrong (fused weight norm in torch 2.13: by 10 to 300 % of its norm;
    distances under two vmaps), or none (distances, the hard sigmoid, group norm of channels last). Their first
    derivatives are right, so without `twice` they are left alone, which spares a look at every operation.
    """
    with TURN:
        fastpath = torch.backends.mha.get_fastpath_enabled()
        try:
            torch.backends.mha.set_fastpath_enabled(False)
            with ExitStack() as stack:
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
                if twice:
                    stack.enter_context(_Plain())
                if any(isinstance(module, nn.RNNBase) for module in model.modules()):
                    stack.enter_context(_plain_recurrence())
                yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fastpath)


class _Plain(TorchFunctionMode):
    """Inside, the functions of `_PLAIN` are sums and products, which can be differentiated twice."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        return _PLAIN.get(func, func)(*args, **(kwargs or {}))


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    return v * (g / torch.norm_except_dim(v, 2, dim))


def _hard_sigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    found = F.relu6(input + 3) / 6
    return input.copy_(found) if inplace else found


def _cdist(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: str | None = None) -> Tensor:
    return _length(x1.unsqueeze(-2) - x2.unsqueeze(-3), p)


def _pdist(input: Tensor, p: float = 2.0) -> Tensor:
    i, j = torch.triu_indices(len(input), len(input), 1, device=input.device)
    return _length(input[i] - input[j], p)


def _length(x: Tensor, p: float) -> Tensor:
    """The p-norm over the last axis; where it is zero it has no derivatives, as torch has it."""
    if p == 0:
        return (x != 0).to(x).sum(-1)
    if p == float("inf"):
        return x.abs().amax(-1)
    total = (x.square() if p == 2 else x.abs().pow(p)).sum(-1)
    return torch.where(total == 0, 0.0, torch.where(total == 0, 1.0, total).pow(1 / p))


def _group_norm(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return F.group_norm(input.contiguous(), *args, **kwargs)


_PLAIN: dict[Any, Callable[..., Tensor]] = {
    torch._weight_norm: _weight_norm,
    F.hardsigmoid: _hard_sigmoid,
    torch.cdist: _cdist,
    torch.pdist: _pdist,
    F.group_norm: _group_norm,
    **LAID,
}


@contextmanager
def _plain_recurrence() -> Iterator[None]:
    with ExitStack() as stack:
        # Setting oneDNN's flags warns about a setting for Intel GPUs that is not touched here.
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message="TF32 acceleration")
        stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
        stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        yield
