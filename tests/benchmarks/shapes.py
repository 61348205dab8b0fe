"""The sizes of a network's layers, read off one batch: what floors are computed from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tests.benchmarks.networks import Problem
from tests.benchmarks.operations import Operations


@dataclass(frozen=True)
class LinearMap:
    """A layer that applies one matrix (o, i) to t positions of every example; `bias` is 1 or 0 columns."""

    t: int
    i: int
    o: int
    bias: int
    first: bool  # its input does not depend on parameters: nothing is propagated below it

    @property
    def product(self) -> int:
        """Multiply-adds of its forward, which are also those of either gradient; per example."""
        return self.t * self.i * self.o


@dataclass(frozen=True)
class Shapes:
    """Sizes of a network: per example, but for `parameters`, which are all the network's."""

    maps: tuple[LinearMap, ...]
    rest: int  # multiply-adds of the forward between layers: attention
    entries: int  # of the inputs and outputs of all layers
    parameters: int
    outputs: int  # of an example, positions included: cotangents of the identity
    n: int  # examples
    batches: int
    cotangents: int  # of the exact Fisher

    @property
    def forward(self) -> int:
        """Multiply-adds."""
        return sum(layer.product for layer in self.maps) + self.rest

    @property
    def backward(self) -> int:
        """Multiply-adds of one cotangent's way to the first layer, without gradients by weights."""
        return sum(layer.product for layer in self.maps if not layer.first) + 2 * self.rest

    @property
    def by_weights(self) -> int:
        """Multiply-adds of gradients by the weights, summed or not."""
        return sum(layer.product for layer in self.maps)


def shapes_of(problem: Problem) -> Shapes:
    """The sizes, by hooks on one batch."""
    x, _ = problem.batches[0]
    b = len(x)
    maps: list[LinearMap] = []
    entries = 0

    def look(module: nn.Module, args: Any, out: Tensor) -> None:
        nonlocal entries
        entries += (args[0].numel() + out.numel()) // b
        if isinstance(module, nn.Linear | nn.Conv2d):
            o, i = module.weight.shape[0], module.weight[0].numel()
            maps.append(
                LinearMap(out.numel() // (b * o), i, o, int(module.bias is not None), not args[0].requires_grad)
            )

    owners = [module for module in problem.model.modules() if list(module.parameters(recurse=False))]
    handles = [module.register_forward_hook(look) for module in owners]
    try:
        with Operations() as counted, torch.enable_grad():
            out = problem.model(x)
    finally:
        for handle in handles:
            handle.remove()
    terms = out.numel() // (b * problem.outputs)  # positions of the outputs
    return Shapes(
        maps=tuple(maps),
        rest=counted.multiply_adds // b - sum(layer.product for layer in maps),
        entries=entries,
        parameters=sum(p.numel() for p in problem.model.parameters()),
        outputs=out.numel() // b,
        n=problem.n_examples,
        batches=len(problem.batches),
        cotangents=terms * (problem.outputs - 1),
    )
