"""What the model returns, checked once: a finite tensor whose first axis is the batch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from nngeo.generators.batches import Batch, Function
from nngeo.generators.untouched import untouched
from nngeo.layers.caches import filled_anew


def tensor_of(outputs: Any) -> Tensor:
    """The outputs as a tensor (b, ...); the `logits` of an output object as Hugging Face models return it."""
    if isinstance(outputs, Tensor):
        return outputs
    logits = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    raise TypeError(
        f"The model returned a {type(outputs).__name__}, not a tensor. Say which tensor is meant by "
        "`function=`, for example function=lambda x, y: model(x)[0]."
    )


def outputs_of(batch: Batch, model: nn.Module, function: Function | None) -> Tensor:
    """The outputs (b, ...) of a batch; the axis of a single example is put back where `.squeeze()` has removed it."""
    with filled_anew(model):
        outputs = tensor_of(batch.run(model, function))
    squeezed = outputs.ndim == 0 or len(outputs) != 1
    return outputs[None] if squeezed and batch.size == 1 else outputs


def check_outputs(outputs: Tensor, batch: Batch, model: nn.Module, function: Function | None) -> None:
    """Raise where outputs can't be (b, ...) with finite entries."""
    if outputs.ndim == 0 or len(outputs) != batch.size:
        raise ValueError(
            f"Outputs have shape {tuple(outputs.shape)}, but the batch holds {batch.size} examples: the first axis "
            "should be the batch. Bring it there by `function=`, for example "
            "function=lambda x, y: model(x).transpose(0, 1)."
        )
    if not outputs.is_floating_point():
        raise TypeError(f"Outputs have dtype {outputs.dtype}; they should be floating point numbers.")
    if not is_finite(outputs):
        raise ValueError(f"Outputs are not finite: {_culprit(batch, model, function)}")


def is_finite(x: Tensor) -> bool:
    """Whether all entries are."""
    # The sum is many times faster; it is not finite where an entry is not, and rarely elsewhere.
    x = x.detach()
    return math.isfinite(x.sum()) or bool(x.isfinite().all())


def _culprit(batch: Batch, model: nn.Module, function: Function | None) -> str:
    """Which module first turned finite inputs into NaN or inf."""
    found: list[str] = []

    def note(name: str, module: nn.Module) -> RemovableHandle:
        def hook(module: nn.Module, args: tuple, out: Any) -> None:
            bad = isinstance(out, Tensor) and out.is_floating_point() and not torch.isfinite(out).all()
            if bad and not found:
                inputs = [a for a in args if isinstance(a, Tensor) and a.is_floating_point()]
                clean = all(torch.isfinite(a).all() for a in inputs)
                where = "its inputs are finite" if clean else "its inputs were not finite either"
                found.append(f"layer {name!r} ({type(module).__name__}) is the first to return NaN or inf; {where}.")

        return module.register_forward_hook(hook)

    handles = [note(name, module) for name, module in model.named_modules() if name]
    try:
        with untouched(model), torch.enable_grad():
            batch.run(model, function)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else "no single layer returns NaN or inf; look at the last operation of the model."


def random_like(outputs: Tensor) -> Tensor:
    """Normal numbers of the shape, dtype and device of the outputs; the same every time."""
    generator = torch.Generator("cpu").manual_seed(0)
    return torch.randn(outputs.shape, generator=generator, device="cpu").to(outputs).detach()


def check_mode(model: nn.Module) -> None:
    """Raise for layers whose outputs mix examples or, in train mode, draw random numbers."""
    for name, module in model.named_modules():
        if getattr(module, "max_norm", None) is not None:
            raise NotImplementedError(
                f"Layer {name!r} ({type(module).__name__}) has max_norm={module.max_norm}: it rewrites its weight when "
                "it runs, so it is no function of it. Set max_norm=None."
            )
        alone = isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None
        if alone:
            raise ValueError(
                f"Layer {name!r} ({type(module).__name__}) has no running statistics, so it mixes the examples of a "
                "batch: gradients of single examples are not defined. Make it with track_running_stats=True."
            )
        # Scripted modules have none of these types, and no flag if they are frozen.
        if not getattr(module, "training", False):
            continue
        random = isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0
        recurrent = isinstance(module, nn.RNNBase) and module.dropout > 0
        attention = isinstance(module, nn.MultiheadAttention) and module.dropout > 0
        mixing = isinstance(module, nn.modules.batchnorm._BatchNorm)
        tracking = isinstance(module, nn.modules.instancenorm._InstanceNorm) and module.track_running_stats
        if random or recurrent or attention or mixing or tracking:
            why = "mixes the examples of a batch" if mixing else "updates its statistics" if tracking else "is random"
            raise ValueError(
                f"Layer {name!r} ({type(module).__name__}) is in train mode, where it {why}: "
                "gradients of single examples are not defined. Call model.eval() first."
            )
