"""Jacobians by their definition, and the layers of nngeo.nn that the tests run through; nothing here is nngeo's."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def rows(model: nn.Module, x: Tensor, wrt: str = "input") -> Tensor:
    """J (b, o, n) by plain autograd: one example and one output after the other."""
    leaves = [p for p in model.parameters() if p.requires_grad]
    found = []
    for example in x:
        leaf = example.detach()[None].clone().requires_grad_()
        outputs = model(leaf).reshape(-1)
        by = [leaf] if wrt == "input" else leaves
        found.append(torch.stack([_row(outputs[j], by) for j in range(len(outputs))]))
    return torch.stack(found)


def _row(output: Tensor, by: list[Tensor]) -> Tensor:
    found = torch.autograd.grad(output, by, retain_graph=True, allow_unused=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).reshape(-1) for g, p in zip(found, by, strict=True)])


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """A float64 model whose parameters depend on nothing but the seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make().double()


def randn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def diagonal(matrix: Tensor) -> Tensor:
    return matrix.diagonal(dim1=-2, dim2=-1)
