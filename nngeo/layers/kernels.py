"""Kernels that can be differentiated twice, and forward."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextmanager
def plain_kernels(model: nn.Module) -> Iterator[None]:
    """Attention by plain matrix products; recurrent layers, if the model has any, by plain cells.

    Fused attention has no forward-mode derivative and no second derivative, on any device; nor have the fused
    recurrent kernels of oneDNN and cuDNN. The inference path of nn.TransformerEncoderLayer has no derivative at all.
    """
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with ExitStack() as stack:
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            if any(isinstance(module, nn.RNNBase) for module in model.modules()):
                stack.enter_context(_plain_recurrence())
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)


@contextmanager
def _plain_recurrence() -> Iterator[None]:
    with ExitStack() as stack:
        # Setting oneDNN's flags warns about a setting for Intel GPUs that is not touched here.
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message="TF32 acceleration")
        stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
        stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        yield
