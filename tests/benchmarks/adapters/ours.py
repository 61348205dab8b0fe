"""nngeo."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import nngeo
from nngeo import NTK, PMat, PMatDiag, PMatEKFAC, PMatImplicit, PMatKFAC
from nngeo.layers import LayerCollection
from tests.benchmarks.jobs import VECTORS
from tests.benchmarks.networks import Problem

VERSION = nngeo.__version__


def _fim(problem: Problem, representation: type[PMat], layers: LayerCollection | None = None, **options: Any) -> Any:
    options |= {"variant": problem.variant, "layer_collection": layers}
    return nngeo.FIM(problem.model, problem.batches, representation, **options)


def _monte_carlo(
    problem: Problem, representation: type[PMat], layers: LayerCollection | None = None, **options: Any
) -> Any:
    options |= {"variant": problem.variant, "layer_collection": layers}
    return nngeo.FIM_MonteCarlo(problem.model, problem.batches, representation, **options)


def _linear_maps(problem: Problem) -> LayerCollection | None:
    """The layers with Kronecker factors; None if these are all."""
    return LayerCollection.from_model(problem.model, problem.linear_maps) if problem.has_other_layers else None


def _updated(make: Callable[..., Any]) -> Callable[[Problem], Callable[[], Any]]:
    def prepare(problem: Problem) -> Callable[[], Any]:
        matrix = make(problem, PMatEKFAC, _linear_maps(problem), update_diag=False)

        def update() -> Any:
            matrix.update_diag(problem.batches)
            return matrix

        return update

    return prepare


def _mv(problem: Problem) -> Callable[[], Any]:
    matrix = _fim(problem, PMatImplicit)
    v = nngeo.PVector.from_model(problem.model).detach()
    return lambda: matrix.mv(v)


def _linearized(problem: Problem) -> Callable[[], Any]:
    matrix = _fim(problem, PMatImplicit).linearize()
    vectors = torch.randn(VECTORS, matrix.size(0), device=problem.device)
    return lambda: matrix.mv(vectors)


JOBS = {
    "diag": lambda problem: lambda: _fim(problem, PMatDiag),
    "diag_mc": lambda problem: lambda: _monte_carlo(problem, PMatDiag),
    "kfac": lambda problem: lambda: _fim(problem, PMatKFAC, _linear_maps(problem)),
    "kfac_mc": lambda problem: lambda: _monte_carlo(problem, PMatKFAC, _linear_maps(problem)),
    "ekfac": _updated(_fim),
    "ekfac_mc": _updated(_monte_carlo),
    "mv": _mv,
    "linearized": _linearized,
    "ntk": lambda problem: lambda: NTK(problem.model, problem.batches),
    "jacobian": lambda problem: lambda: nngeo.Jacobian(problem.model, problem.batches),
}


def _diagonal(matrix: PMat, problem: Problem) -> Tensor:
    return matrix.get_diag()


FLAT: dict[str, Callable[[Any, Problem], Tensor]] = {
    "diag": _diagonal,
    "kfac": _diagonal,
    "ekfac": _diagonal,
    "mv": lambda v, problem: v.to_torch(),
    "ntk": lambda K, problem: K.to_torch().flatten(),
    "jacobian": lambda J, problem: J.to_torch().flatten(),
}
