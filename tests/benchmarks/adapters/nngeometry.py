"""NNGeometry (PyPI's release)."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
from nngeometry.gram import GramMatrix
from nngeometry.jacobian import Jacobian
from nngeometry.layercollection import LayerCollection
from nngeometry.metrics import FIM, FIM_MonteCarlo
from nngeometry.object import PMatDiag, PMatEKFAC, PMatImplicit, PMatKFAC, PVector
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from tests.benchmarks.networks import Problem

VERSION = version("nngeometry")


class ReadyBatches(DataLoader):
    """A loader, as NNGeometry wants one, that costs nothing: its batches are ready."""

    def __init__(self, problem: Problem):
        examples = [torch.cat(parts) for parts in zip(*problem.batches, strict=True)]
        super().__init__(TensorDataset(*examples), batch_size=len(problem.batches[0][0]))
        self.ready = problem.batches

    def __iter__(self) -> Any:
        return iter(self.ready)


def _matrix(problem: Problem, representation: type, factory: Callable[..., Any], layers: Any = None) -> Any:
    return factory(
        problem.model,
        ReadyBatches(problem),
        representation,
        variant=problem.variant,
        device=problem.device,
        layer_collection=layers,
    )


def _linear_maps(problem: Problem) -> Any:
    layers = LayerCollection()
    for name in problem.linear_maps:
        layers.add_layer_from_model(problem.model, problem.model.get_submodule(name))
    return layers


def _kfac(factory: Callable[..., Any]) -> Callable[[Problem], Callable[[], Any]]:
    def prepare(problem: Problem) -> Callable[[], Any]:
        layers = _linear_maps(problem)
        return lambda: _matrix(problem, PMatKFAC, factory, layers)

    return prepare


def _updated(factory: Callable[..., Any]) -> Callable[[Problem], Callable[[], Any]]:
    def prepare(problem: Problem) -> Callable[[], Any]:
        matrix = _matrix(problem, PMatEKFAC, factory, _linear_maps(problem))
        return lambda: matrix.update_diag(ReadyBatches(problem))

    return prepare


def _mv(problem: Problem) -> Callable[[], Any]:
    matrix = _matrix(problem, PMatImplicit, FIM)
    v = PVector.from_model(problem.model).detach()
    return lambda: matrix.mv(v)


JOBS: dict[str, Callable[[Problem], Callable[[], Any]]] = {
    "diag": lambda problem: lambda: _matrix(problem, PMatDiag, FIM),
    "diag_mc": lambda problem: lambda: _matrix(problem, PMatDiag, FIM_MonteCarlo),
    "kfac": _kfac(FIM),
    "kfac_mc": _kfac(FIM_MonteCarlo),
    "ekfac": _updated(FIM),
    "ekfac_mc": _updated(FIM_MonteCarlo),
    "mv": _mv,
    "ntk": lambda problem: lambda: GramMatrix(problem.model, ReadyBatches(problem)),
    "jacobian": lambda problem: lambda: Jacobian(problem.model, ReadyBatches(problem)),
}

FLAT: dict[str, Callable[[Any, Problem], Tensor]] = {
    "diag": lambda matrix, problem: matrix.get_diag(),
    "kfac": lambda matrix, problem: matrix.get_diag(),
    "mv": lambda v, problem: v.to_torch(),
    "ntk": lambda gram, problem: gram.to_torch().flatten(),
    "jacobian": lambda jacobian, problem: jacobian.to_torch().flatten(),
}
