"""Losses of the networks in cases.py, and their Jacobians row by row: what an engine is compared with."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from nngeo.descent.autogram import Engine
from tests import reference
from tests.cases import CASES, Case

EXACT = {"rtol": 1e-8, "atol": 1e-10}
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)


def scores(outputs: Tensor, k: int = 1) -> Tensor:
    """(b, k), functions of the outputs (b, ...) of each example, none like another."""
    flat = outputs.reshape(len(outputs), -1)
    w = torch.linspace(0.5, 1.5, k * flat.shape[1], dtype=flat.dtype).view(k, -1)
    return (flat.sin()[:, None] * w + 0.3 * flat.square()[:, None] * w.flip(1)).sum(-1)


def outputs(case: Case, model: nn.Module, seed: int = 0) -> Tensor:
    """(b, ...), with their graph."""
    return reference.outputs(model, case.batch(seed), case.function(model))


def losses(case: Case, model: nn.Module, k: int = 0, seed: int = 0) -> Tensor:
    """(b, k), or (b,) for k = 0."""
    found = scores(outputs(case, model, seed), max(k, 1))
    return found if k else found[:, 0]


def whole_losses(case: Case, model: nn.Module, seed: int = 0) -> Tensor:
    """(3,), losses that mix the examples of the batch."""
    found = losses(case, model, 0, seed)
    return torch.stack([found.mean(), found.square().sum(), found[1] - found[0]])


def jacobian(losses: Tensor, parameters: list[nn.Parameter]) -> Tensor:
    """(m, P), by a backward pass for each loss."""
    return torch.stack([reference.gradient(loss, parameters) for loss in losses.flatten()])


def grads(parameters: list[nn.Parameter]) -> Tensor:
    """(P,), what stands in `.grad`."""
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])


def weights(m: int) -> Tensor:
    """(m,), of both signs."""
    return torch.linspace(-0.5, 1.7, m, dtype=torch.float64)


@contextmanager
def slow_accepted() -> Iterator[None]:
    """Inside, layers that no rule serves need no warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*take a backward pass for every one", category=UserWarning)
        yield


def mlp(*sizes: int) -> nn.Sequential:
    """Linear layers with a Tanh between them, in float64."""
    layers: list[nn.Module] = []
    for i, o in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(i, o), nn.Tanh()]
    return nn.Sequential(*layers[:-1]).double()


def plan_of(engine: Engine):
    """The last plan that was made."""
    return list(engine._planner._plans.values())[-1]
