"""What autograd says of a few examples: the truth that the plan of a sweep is held to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nngeo.generators.batches import Batch, Function
from nngeo.generators.independence import run
from nngeo.generators.outputs import random_like
from nngeo.generators.record import LayerRecord
from nngeo.generators.untouched import untouched
from nngeo.layers.collection import LayerCollection
from nngeo.layers.replace import replaced


@dataclass(frozen=True)
class Truth:
    """Outputs of b examples, random cotangents (3, b, ...) there, and gradients by the layers, (3, p) each.

    The cotangents reach the first example, the second, and all: three, so that no axis is mistaken for another.
    """

    outputs: Tensor
    cotangents: Tensor
    gradients: dict[str, Tensor]
    unused: list[str]  # parameters that the outputs do not depend on

    @classmethod
    def of(cls, model: nn.Module, function: Function | None, layers: LayerCollection, few: Batch) -> Truth:
        """By three backward passes, with gradients by weights."""
        parameters = dict(layers.named_parameters(model))
        with untouched(model):
            for p in parameters.values():
                p.requires_grad_()
            outputs = run(model, function, few)
            c = torch.stack([random_like(outputs)] * 3)
            c[0, 1:], c[1, :1], c[1, 2:] = 0, 0, 0
            rows = [_autograd(outputs, list(parameters.values()), row) for row in c]
        unused = [name for name, g in zip(parameters, rows[2], strict=True) if g is None]
        by_name = {
            name: [p.new_zeros(p.numel()) if g is None else g.to_dense().flatten() for g in column]
            for (name, p), column in zip(parameters.items(), zip(*rows, strict=True), strict=True)
        }
        gradients = {
            name: torch.stack([torch.cat([by_name[layer.full_name(x)][c] for x in layer.shapes]) for c in range(3)])
            for name, layer in layers.layers.items()
        }
        return cls(outputs.detach(), c, gradients, unused)

    @property
    def rounding(self) -> float:
        """What is as good as zero in an entry of a gradient."""
        everything = max((float(g.abs().max()) for g in self.gradients.values() if g.numel()), default=0.0)
        return min(1e2 * torch.finfo(self.outputs.dtype).eps, 0.03) * everything

    def determines(self, name: str) -> bool:
        """Whether the first or the second example reaches the layer: else all sources look right."""
        return bool(self.gradients[name][:2].norm() > self.rounding)

    def agrees_precisely(self, name: str, record: LayerRecord) -> bool:
        """Whether a layer's gradients are these, and not zero, beside their own size: not by rounding, then."""
        return bool(self.gradients[name][:2].norm() > 0) and self.agrees(name, record, rounding=0.0)

    def agrees(self, name: str, record: LayerRecord, rounding: float | None = None) -> bool:
        """Whether a layer's gradients are these, up to rounding; the errors that are sought are of order one."""
        own = self.gradients[name].to(record.like)
        rounding = self.rounding if rounding is None else rounding
        tolerance = min(10 * torch.finfo(self.outputs.dtype).eps ** 0.5, 0.1) * float(own.norm()) + rounding
        total = -own[2]
        for e in range(record.n_examples):
            total += record.one(2, e)
        errors = [total]
        for c, e in ((0, 0), (0, 1), (1, 0), (1, 1)):
            found = record.one(c, e)
            errors.append(found - own[c] if c == e else found)
        return all(bool(error.norm() <= tolerance) for error in errors)


def has_zeros(model: nn.Module) -> bool:
    """Whether some parameter is zero as a whole: uses of others behind it can't be seen."""
    return any(p.numel() > 0 and not p.any() for p in model.parameters())


@contextmanager
def perturbed(model: nn.Module) -> Iterator[None]:
    """Inside, the model has other parameters near its own, none of them zero (head, gate or adapter)."""
    generator = torch.Generator("cpu").manual_seed(1)
    others = {}
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.is_floating_point():
                noise = torch.randn(p.shape, generator=generator, device="cpu").to(p)
                size = p.norm() / max(1, p.numel()) ** 0.5
                others[name] = nn.Parameter(p + 0.1 * torch.where(size > 0, size, 1.0) * noise, p.requires_grad)
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
