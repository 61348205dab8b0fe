"""What autograd says of a few examples: the truth that the plan of a sweep is held to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from nngeo.generators.outputs import random_like
from nngeo.generators.record import LayerRecord
from nngeo.layers.collection import LayerCollection
from nngeo.layers.replace import replaced


@dataclass(frozen=True)
class Truth:
    """Outputs of b examples, random cotangents (2, b, ...) there, and gradients (p,) by the layers.

    They are those of the first row of cotangents, summed over examples. The second row is the first times a factor for
    each example, a power of two. Gradients of single examples for the second row, each divided by its factor, have the
    same sum: if each depends on its own cotangent only and is right; for random ones, only then.
    """

    outputs: Tensor
    cotangents: Tensor
    factors: Tensor
    gradients: dict[str, Tensor]
    unused: list[str]  # parameters that the outputs do not depend on

    @classmethod
    def of(cls, model: nn.Module, layers: LayerCollection, outputs: Tensor) -> Truth:
        """Find the truth by one backward pass, with gradients with respect to the weights."""
        parameters, c = dict(layers.named_parameters(model)), random_like(outputs)
        found = dict(zip(parameters, _autograd(outputs, list(parameters.values()), c), strict=True))
        flat = {
            name: p.new_zeros(p.numel()) if (g := found[name]) is None else g.to_dense().flatten()
            for name, p in parameters.items()
        }
        gradients = {
            name: torch.cat([flat[layer.full_name(x)] for x in layer.shapes]) for name, layer in layers.layers.items()
        }
        factors = torch.pow(-2.0, torch.arange(len(c), device="cpu")).to(c)
        scaled = c * factors.view(-1, *[1] * (c.ndim - 1))
        unused = [name for name, g in found.items() if g is None]
        return cls(outputs.detach(), torch.stack([c, scaled]), factors, gradients, unused)

    @cached_property
    def rounding(self) -> float:
        """What is as good as zero in an entry of a gradient."""
        everything = max((float(g.abs().max()) for g in self.gradients.values() if g.numel()), default=0.0)
        return min(1e2 * torch.finfo(self.outputs.dtype).eps, 0.03) * everything

    def determines(self, name: str) -> bool:
        """Whether some example reaches the layer: else all sources look right."""
        return bool(self.gradients[name].norm() > self.rounding)

    def agrees_precisely(self, name: str, record: LayerRecord) -> bool:
        """Whether a layer's gradients are these, and not zero, beside their own size: not by rounding, then."""
        return bool(self.gradients[name].norm() > 0) and self.agrees(name, record, rounding=0.0)

    def agrees(self, name: str, record: LayerRecord, rounding: float | None = None) -> bool:
        """Whether a layer's gradients for the second row of cotangents are these, up to rounding.

        The errors that are sought are of order one.
        """
        own = self.gradients[name].to(record.like)
        rounding = self.rounding if rounding is None else rounding
        tolerance = min(10 * torch.finfo(self.outputs.dtype).eps ** 0.5, 0.1) * float(own.norm()) + rounding
        (found,) = record.combined(1 / self.factors.to(record.like)[None, None])
        return bool((found - own).norm() <= tolerance)


def has_zeros(model: nn.Module) -> bool:
    """Whether some parameter is zero as a whole: uses of others behind it can't be seen."""
    return any(p.numel() > 0 and not p.any() for p in model.parameters())


@contextmanager
def perturbed(model: nn.Module) -> Iterator[None]:
    """Inside, the model has other parameters near its own, none of them zero (head, gate or adapter).

    Entries that are not zero keep their sign: they may be variances.
    """
    generator = torch.Generator("cpu").manual_seed(1)
    others = {}
    with torch.inference_mode(False), torch.no_grad():
        for name, p in model.named_parameters():
            if p.is_floating_point():
                noise = torch.randn(p.shape, generator=generator, device="cpu").clamp_(-5, 5).to(p)
                size = p.norm() / max(1, p.numel()) ** 0.5
                filled = torch.where(p == 0, torch.where(size > 0, size, 1.0), p)
                others[name] = nn.Parameter(p + 0.1 * filled * noise, p.requires_grad)
    with replaced(model, others):
        yield


def _autograd(outputs: Tensor, parameters: list[nn.Parameter], c: Tensor) -> tuple[Tensor | None, ...]:
    if not outputs.requires_grad:
        return (None,) * len(parameters)
    try:
        return torch.autograd.grad(outputs, parameters, c, retain_graph=True, allow_unused=True)
    except RuntimeError as error:
        if "use_reentrant" not in str(error):
            raise
        raise NotImplementedError(
            "The model uses activation checkpointing with use_reentrant=True, which hides its graph from "
            "autograd.grad. Use torch.utils.checkpoint.checkpoint(..., use_reentrant=False)."
        ) from error
