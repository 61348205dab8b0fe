"""What autograd says of two examples: the truth that the plan of a sweep is held to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nngeo.generators.batches import Batch, Function
from nngeo.generators.independence import run
from nngeo.generators.untouched import untouched
from nngeo.layers.collection import LayerCollection

# Which examples each cotangent reaches. There are three, so that no axis is mistaken for another.
_REACH = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], device="cpu")


@dataclass(frozen=True)
class Truth:
    """Outputs of two examples, random cotangents (3, 2, ...) there, and gradients by the layers, (2, p) each."""

    outputs: Tensor
    cotangents: Tensor
    gradients: dict[str, Tensor]
    unused: list[str]  # parameters that the outputs do not depend on

    @classmethod
    def of(cls, model: nn.Module, function: Function | None, layers: LayerCollection, two: Batch) -> Truth:
        """By two backward passes, with gradients by weights."""
        parameters = dict(layers.named_parameters(model))
        with untouched(model):
            for p in parameters.values():
                p.requires_grad_()
            outputs = run(model, function, two)
            generator = torch.Generator("cpu").manual_seed(0)
            noise = torch.randn(outputs.shape, generator=generator, device="cpu").to(outputs)
            c = torch.stack([noise] * 3) * _REACH.to(noise).view(3, 2, *[1] * (outputs.ndim - 1))
            rows = [_autograd(outputs, list(parameters.values()), row) for row in c[:2]]
        unused = [name for name, g in zip(parameters, rows[0], strict=True) if g is None]
        pairs = {
            name: torch.stack([torch.zeros_like(p) if g is None else g for g in pair])
            for (name, p), pair in zip(parameters.items(), zip(*rows, strict=True), strict=True)
        }
        gradients = {
            name: torch.cat([pairs[layer.full_name(local)].reshape(2, -1) for local in layer.shapes], 1)
            for name, layer in layers.layers.items()
        }
        return cls(outputs.detach(), c, gradients, unused)

    def agrees(self, name: str, found: Tensor) -> bool:
        """Whether gradients (3, 2, p) of a layer are these, up to rounding; errors that are sought are of order one."""
        own = self.gradients[name].to(found)
        precision = torch.finfo(self.outputs.dtype).eps
        everything = max(float(g.abs().max()) for g in self.gradients.values() if g.numel())
        rounding = min(1e3 * precision, 0.03) * everything
        tolerance = min(10 * precision**0.5, 0.1) * float(own.norm()) + rounding
        return bool((found - own * _REACH.to(found)[..., None]).norm() <= tolerance)


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
