"""Jacobian-vector products of the whole model, without layers: forward over a recorded reverse graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError

from nngeo.generators.batches import Batch, Function
from nngeo.generators.sources import Replay
from nngeo.generators.untouched import untouched
from nngeo.layers.collection import LayerCollection
from nngeo.layers.kernels import plain_kernels
from nngeo.layers.replace import call_with


@dataclass(frozen=True)
class Linearized:
    """Outputs (b, ...) of a batch, their derivative J v along parameters v, and the pull-back w -> J' w (P,)."""

    outputs: Tensor
    pushed: Tensor | None
    pull: Callable[[Tensor], Tensor]


def linearized(
    model: nn.Module, function: Function | None, layers: LayerCollection, batch: Batch, v: Tensor | None
) -> Linearized:
    """One forward in dual numbers that records the reverse graph, too; `pull` is one backward.

    Where a kernel of the model has no forward-mode derivative, or another one than its gradient, J v is taken by
    differentiating `w -> J' w`.
    """
    with untouched(model), torch.enable_grad(), plain_kernels(model):
        if v is None or _stops_gradients(model):
            return _reverse(model, function, layers, batch, v)
        try:
            return _forward(model, function, layers, batch, v)
        except (NotImplementedError, RuntimeError) as error:
            if "forward AD" not in str(error) and "forward-mode" not in str(error):
                raise
            return _reverse(model, function, layers, batch, v)


def _forward(
    model: nn.Module, function: Function | None, layers: LayerCollection, batch: Batch, v: Tensor
) -> Linearized:
    leaves = {name: p.detach().requires_grad_() for name, p in layers.named_parameters(model)}
    tangents = split_by_parameter(layers, v.to(next(iter(leaves.values()))))
    with forward_ad.dual_level():
        duals = {
            f"model.{name}": forward_ad.make_dual(leaf, tangent)
            for (name, leaf), tangent in zip(leaves.items(), tangents, strict=True)
        }
        outputs, pushed = forward_ad.unpack_dual(call_with(Replay(model, function), duals, (batch.content,), {}))
    pull = _pull_back(outputs, list(leaves.values()))

    def pull_again(w: Tensor) -> Tensor:
        try:
            return pull(w)
        except CheckpointError:  # activation checkpointing has run the model again, with its own parameters
            with untouched(model), torch.enable_grad(), plain_kernels(model):
                return _reverse(model, function, layers, batch, None).pull(w)

    pushed = torch.zeros_like(outputs) if pushed is None else pushed
    return Linearized(outputs.detach(), pushed.detach(), pull_again)


def _reverse(
    model: nn.Module, function: Function | None, layers: LayerCollection, batch: Batch, v: Tensor | None
) -> Linearized:
    leaves = [p.requires_grad_() for p in layers.parameters(model)]
    outputs = Replay(model, function)(batch.content)
    pushed = None
    if v is not None:
        pushed = torch.zeros_like(outputs)
        if outputs.requires_grad:
            # J v is the derivative, along v, of the linear function w -> J' w.
            w = torch.zeros_like(outputs, requires_grad=True)
            pulled = torch.autograd.grad(outputs, leaves, w, create_graph=True, allow_unused=True)
            tangents = split_by_parameter(layers, v.to(outputs))
            pairs = [(g, t) for g, t in zip(pulled, tangents, strict=True) if g is not None]
            (pushed,) = torch.autograd.grad([g for g, _ in pairs], w, [t for _, t in pairs], retain_graph=True)
    return Linearized(outputs.detach(), None if pushed is None else pushed.detach(), _pull_back(outputs, leaves))


def split_by_parameter(layers: LayerCollection, v: Tensor) -> list[Tensor]:
    """(P,) -> the parameters' shapes, in order."""
    parts = layers.split(v)
    return [part for name in layers for part in layers.split_layer(name, parts[name]).values()]


def _stops_gradients(model: nn.Module) -> bool:
    """Whether forward mode would differ from the gradient: rows at `padding_idx` have a tangent, but no gradient."""
    return any(getattr(module, "padding_idx", None) is not None for module in model.modules())


def _pull_back(outputs: Tensor, leaves: list[Tensor]) -> Callable[[Tensor], Tensor]:
    def pull(w: Tensor) -> Tensor:
        found: tuple[Tensor | None, ...] = (None,) * len(leaves)
        if outputs.requires_grad:
            found = torch.autograd.grad(outputs, leaves, w.to(outputs), retain_graph=True, allow_unused=True)
        parts = [torch.zeros_like(p) if g is None else g for p, g in zip(leaves, found, strict=True)]
        return torch.cat([part.flatten() for part in parts])

    return pull
