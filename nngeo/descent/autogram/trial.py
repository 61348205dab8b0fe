"""A random combination of the rows of J, by the choices of a plan and by autograd."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nngeo.descent.autogram.choices import Choice
from nngeo.descent.autogram.graph import Graph
from nngeo.descent.autogram.hooks import Watcher
from nngeo.descent.autogram.objectives import Objectives
from nngeo.descent.autogram.plan import Plan
from nngeo.descent.autogram.pulled import Pulled
from nngeo.descent.autogram.weighted import weighted


@dataclass
class Trial:
    """What the choices for some layers are held to.

    The combination has numbers (k, 1) for losses times numbers (1, b) for examples. The first go through the graph; the
    second are applied by the factors, which have to tell the examples apart. It takes one backward pass to the modules,
    and one with gradients by parameters.
    """

    plan: Plan
    graph: Graph
    objectives: Objectives
    watcher: Watcher
    names: Sequence[str]
    hosts: Iterable[str]
    failed: set[Choice] = field(default_factory=set)  # those that raised an error

    def __post_init__(self) -> None:
        objectives, losses = self.objectives, self.objectives.losses
        generator = torch.Generator("cpu").manual_seed(0)
        k, self.b = (_numbers(shape, generator).to(losses) for shape in ((objectives.k, 1), (1, objectives.b)))
        self.truth = self._by_autograd(objectives.joined(k * self.b).view_as(losses))
        mixed = objectives.joined(k.expand(-1, objectives.b)).view(1, *losses.shape)
        self.pulled = Pulled(self.plan, self.graph, objectives, self.watcher).pull(mixed, set(self.hosts), retain=True)
        found = [g for g in self.pulled.by_edge.values() if g is not None]
        found += [g for grads in self.truth.values() for g in grads.values()]
        # Of the coarsest numbers that the backward pass went through.
        self.eps = max(torch.finfo(g.dtype).eps for g in (losses, *found))

    def _by_autograd(self, cotangent: Tensor) -> dict[str, dict[str, Tensor]]:
        layers = [self.plan.layers[name] for name in self.names]
        owned = [
            (layer.name, x, self.plan.model.get_parameter(layer.full_name(x))) for layer in layers for x in layer.shapes
        ]
        there = [(name, x, p) for name, x, p in owned if id(p) in self.graph.parameters]
        losses = self.objectives.losses
        found = gradients(losses, [p for *_, p in there], cotangent)
        truth: dict[str, dict[str, Tensor]] = {name: {} for name in self.names}
        for (name, x, _), g in zip(there, found, strict=True):
            if g is not None:
                self.plan.sparse |= {name} if g.is_sparse else set()
                truth[name][x] = g.to_dense()
        return truth

    @property
    def rounding(self) -> float:
        """What is as good as zero in an entry of a gradient."""
        largest = [float(g.abs().max()) for grads in self.truth.values() for g in grads.values() if g.numel()]
        return min(1e2 * self.eps, 0.03) * max(largest, default=0.0)

    def determines(self, name: str, rounding: float) -> bool:
        """Whether the layer has a gradient: else all choices look right."""
        return any(bool(g.norm() > rounding) for g in self.truth[name].values())

    def applies(self, name: str) -> bool:
        """Whether the modules of a choice are called, for a fast rule as often as the parameters are used."""
        choice, layer = self.plan.choices[name], self.plan.layers[name]
        if choice.in_sums:
            return bool(self.plan.added.get(name))
        if choice.in_graph:
            return bool(self.plan.products[name])
        uses = [use for use in self.graph.uses if use.module in choice.source.hosts]
        if not choice.source.fast or not uses:
            return bool(uses)
        for local in layer.shapes:
            p = self.plan.model.get_parameter(layer.full_name(local))
            holders = [use for use in uses if local in self.plan.names(layer, use.module).values()]
            if id(p) in self.graph.parameters and self.graph.edges_to(p) > len(holders):
                return False
        return True

    def agrees(self, name: str, rounding: float) -> bool:
        """Whether the choice for a layer gives autograd's gradients, up to rounding: errors sought are of order one."""
        # Convolutions and products on GPUs may round float32 to ten bits.
        relative = min(10 * max(self.eps, 4e-6 if self.eps > 1e-10 else 0.0) ** 0.5, 0.1)
        try:
            found = weighted(self.pulled.record(name), self.b)
        except Exception:  # whatever a module raises when it is run in a way it was not made for
            self.failed.add(self.plan.choices[name])
            return False
        for local, g in found.items():
            own = self.truth[name].get(local)
            own = torch.zeros_like(g) if own is None else own.to(g)
            if not bool((g - own).norm() <= relative * own.norm() + rounding):
                return False
        return True


HIDDEN = (
    "The model uses activation checkpointing with use_reentrant=True, which hides its graph from autograd.grad. Use "
    "torch.utils.checkpoint.checkpoint(..., use_reentrant=False)."
)


def _numbers(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Random, of both signs, none of them small."""
    size, sign = (torch.rand(shape, generator=generator, device="cpu") for _ in range(2))
    return (0.5 + size) * (sign - 0.5).sign()


def gradients(losses: Tensor, parameters: list[Tensor], cotangent: Tensor) -> tuple[Tensor | None, ...]:
    """Autograd's, None where a parameter has no influence; the graph is kept."""
    try:
        return torch.autograd.grad(losses, parameters, cotangent, retain_graph=True, allow_unused=True)
    except RuntimeError as error:
        if "use_reentrant" in str(error):
            raise NotImplementedError(HIDDEN) from error
        if "donated" in str(error):
            raise NotImplementedError(
                "A compiled model frees what a second backward pass needs. Give the model that was compiled: "
                "model._orig_mod."
            ) from error
        raise
