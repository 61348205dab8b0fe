"""Models that let the data decide which rows a layer sees: mixtures of experts, sorted or compacted tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten

from nngeo.generators.recording import Recording
from nngeo.generators.watch import LayoutChanged

# Operations that pick rows by tensors. Where a model has any, every mini-batch is tested by one more backward.
_PICKS = {"nonzero", "argwhere", "masked_select", "index_select", "gather", "take", "take_along_dim", "topk", "sort"}
_PICKS |= {"argsort", "index_add", "index_add_", "index_copy", "index_copy_", "index_put", "index_put_", "scatter"}
_PICKS |= {"scatter_", "scatter_add", "scatter_add_"}


class Routing(TorchFunctionMode):
    """Notes whether rows are picked by tensors while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.found = False

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("__getitem__", "__setitem__"):
            self.found |= any(isinstance(leaf, Tensor) for leaf in tree_flatten(args[1])[0])
        self.found |= name in _PICKS
        return func(*args, **(kwargs or {}))


def check_rows(recording: Recording) -> None:
    """Raise LayoutChanged where rows that the plan gives to one example depend on another.

    Cotangents reach every second example; at the rows of the others, gradients must be zero.
    """
    b, outputs = recording.batch.size, recording.outputs
    if b == 1 or not outputs.requires_grad:
        return
    reached = (torch.arange(b, device="cpu") % 2 == 0).to(outputs.device)
    noise = torch.randn(outputs.shape, generator=torch.Generator("cpu").manual_seed(0), device="cpu").to(outputs)
    grads = recording.pull((noise * reached.view(b, *[1] * (outputs.ndim - 1)))[None], retain=True)
    for source in recording.plan.sources.values():
        for host in source.hosts:
            for view, call, found in recording.views(host, source, grads[host]):
                for j, g in enumerate(found):
                    if g is not None and view.gradient(call, j, g)[0, ~reached].any():
                        raise LayoutChanged(host)
