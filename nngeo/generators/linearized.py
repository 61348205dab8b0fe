"""Jacobian-vector products of the whole model, without layers: forward over a recorded reverse graph."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError

from nngeo.generators.batches import Batch, Function
from nngeo.generators.independence import FirstExamples, check_independence
from nngeo.generators.sources import Replay
from nngeo.generators.untouched import untouched
from nngeo.layers.collection import LayerCollection
from nngeo.layers.kernels import plain_kernels
from nngeo.layers.replace import call_with


@dataclass(frozen=True)
class Linearized:
    """Outputs (b, ...) of a batch, their derivative J v along parameters v (or 0), and the pull-back w -> J' w (P,)."""

    outputs: Tensor
    pushed: Tensor
    pull: Callable[[Tensor], Tensor]


class Linearizer:
    """Linearizes a model at mini-batches, in the cheapest way in which it can be.

    By one forward in dual numbers that records the reverse graph, too; `pull` is then one backward. Where a kernel of
    the model has no forward-mode derivative, or another one than its gradient (torch.no_grad and `padding_idx` stop
    gradients, but not tangents: the first mini-batch is tested), J v is the derivative of `w -> J' w`.
    """

    def __init__(self, model: nn.Module, function: Function | None, layers: LayerCollection):
        self.model, self.function, self.layers = model, function, layers
        padded = any(getattr(module, "padding_idx", None) is not None for module in model.modules())
        self._forward_mode = not padded
        self._known = False  # whether the first mini-batch has been looked at

    def at(self, batch: Batch, v: Tensor | None) -> Linearized:
        """The model at a batch, and J v if v (P,) is given."""
        with untouched(self.model), torch.enable_grad(), plain_kernels(self.model), warnings.catch_warnings():
            # The first forward-mode derivative of a process warns about torch's own use of torch.jit.
            warnings.filterwarnings("ignore", message=".*torch.jit", category=DeprecationWarning)
            if not self._known:
                self._look_at(FirstExamples.of(batch))
            forward = self._forward_mode and v is not None
            return self._forward(batch, v) if forward else self._reverse(batch, v)  # type: ignore[arg-type]

    def _look_at(self, examples: FirstExamples) -> None:
        check_independence(self.model, self.function, examples)
        self._known = True
        try:
            self._forward_mode = self._forward_mode and self._is_adjoint(examples.two)
        except (NotImplementedError, RuntimeError) as error:
            if not any(words in str(error) for words in ("forward AD", "forward mode AD", "forward-mode")):
                raise
            self._forward_mode = False

    def _is_adjoint(self, batch: Batch) -> bool:
        """Whether <w, J v> = <J' w, v> for random v and w: forward mode and gradients are of one function."""
        generator = torch.Generator("cpu").manual_seed(0)
        like = next(self.layers.parameters(self.model))
        v = torch.randn(self.layers.numel(), generator=generator, device="cpu").to(like)
        found = self._forward(batch, v)
        w = torch.randn(found.outputs.shape, generator=generator, device="cpu").to(found.outputs)
        products, others = (w * found.pushed).double(), (found.pull(w).to(v) * v).double()
        scale = products.norm() + others.norm()
        tolerance = 10 * torch.finfo(found.outputs.dtype).eps ** 0.5
        return bool((products.sum() - others.sum()).abs() <= tolerance * scale)

    def _forward(self, batch: Batch, v: Tensor) -> Linearized:
        leaves = {name: p.detach().requires_grad_() for name, p in self.layers.named_parameters(self.model)}
        tangents = split_by_parameter(self.layers, v.to(next(iter(leaves.values()))))
        with forward_ad.dual_level():
            duals = {
                f"model.{name}": forward_ad.make_dual(leaf, tangent)
                for (name, leaf), tangent in zip(leaves.items(), tangents, strict=True)
            }
            outputs = call_with(Replay(self.model, self.function), duals, (batch.content,), {})
            outputs, pushed = forward_ad.unpack_dual(outputs)
        pull = _pull_back(outputs, list(leaves.values()))

        def pull_again(w: Tensor) -> Tensor:
            try:
                return pull(w)
            except CheckpointError:  # activation checkpointing has run the model again, with its own parameters
                return self.at(batch, None).pull(w)

        return Linearized(outputs.detach(), _or_zero(pushed, outputs), pull_again)

    def _reverse(self, batch: Batch, v: Tensor | None) -> Linearized:
        leaves = [p.requires_grad_() for p in self.layers.parameters(self.model)]
        outputs = Replay(self.model, self.function)(batch.content)
        pushed = None
        if v is not None and outputs.requires_grad:
            w = torch.zeros_like(outputs, requires_grad=True)
            pulled = torch.autograd.grad(outputs, leaves, w, create_graph=True, allow_unused=True)
            tangents = split_by_parameter(self.layers, v.to(outputs))
            pairs = [(g, t) for g, t in zip(pulled, tangents, strict=True) if g is not None]
            (pushed,) = torch.autograd.grad([g for g, _ in pairs], w, [t for _, t in pairs], retain_graph=True)
        return Linearized(outputs.detach(), _or_zero(pushed, outputs), _pull_back(outputs, leaves))


def split_by_parameter(layers: LayerCollection, v: Tensor) -> list[Tensor]:
    """(P,) -> the parameters' shapes, in order."""
    parts = layers.split(v)
    return [part for name in layers for part in layers.split_layer(name, parts[name]).values()]


def _or_zero(pushed: Tensor | None, outputs: Tensor) -> Tensor:
    return torch.zeros_like(outputs) if pushed is None else pushed.detach()


def _pull_back(outputs: Tensor, leaves: list[Tensor]) -> Callable[[Tensor], Tensor]:
    def pull(w: Tensor) -> Tensor:
        found: tuple[Tensor | None, ...] = (None,) * len(leaves)
        if outputs.requires_grad:
            found = torch.autograd.grad(outputs, leaves, w.to(outputs), retain_graph=True, allow_unused=True)
        parts = [torch.zeros_like(p) if g is None else g for p, g in zip(leaves, found, strict=True)]
        return torch.cat([part.flatten() for part in parts])

    return pull
