"""curvlinops, without its checks for determinism."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
import torch.nn.functional as F
from curvlinops import EKFACLinearOperator, FisherType, GGNLinearOperator, KFACLinearOperator
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.benchmarks.jobs import VECTORS
from tests.benchmarks.networks import Problem

VERSION = version("curvlinops-for-pytorch")


class MeanLoss(nn.CrossEntropyLoss):
    """The mean over examples and positions of logits (b, ..., class)."""

    def forward(self, outputs: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(outputs.flatten(0, -2), y.flatten())


def _factored(problem: Problem, operator: type, fisher: FisherType) -> Any:
    layers = [problem.model.get_submodule(name) for name in problem.linear_maps]
    parameters = [parameter for layer in layers for parameter in layer.parameters()]
    terms = problem.batches[0][1][0].numel()
    model: Any = problem.model
    return operator(
        model,
        nn.CrossEntropyLoss(),
        parameters,
        problem.batches,
        check_deterministic=False,
        fisher_type=fisher,
        separate_weight_and_bias=False,
        num_per_example_loss_terms=terms,
        num_data=problem.n_examples,
    )


def _kfac(fisher: FisherType) -> Callable[[Problem], Callable[[], Any]]:
    def prepare(problem: Problem) -> Callable[[], Any]:
        def run() -> Any:
            operator = _factored(problem, KFACLinearOperator, fisher)
            operator.compute_kronecker_factors()
            return operator

        return run

    return prepare


def _updated(fisher: FisherType) -> Callable[[Problem], Callable[[], Any]]:
    def prepare(problem: Problem) -> Callable[[], Any]:
        operator = _factored(problem, EKFACLinearOperator, fisher)
        operator.compute_eigenvalue_correction()

        def run() -> None:
            operator._corrected_eigenvalues.clear()
            operator.compute_eigenvalue_correction()

        return run

    return prepare


def _mv(columns: int) -> Callable[[Problem], Callable[[], Any]]:
    def prepare(problem: Problem) -> Callable[[], Any]:
        parameters = list(problem.model.parameters())
        model: Any = problem.model
        operator = GGNLinearOperator(
            model,
            MeanLoss(),
            parameters,
            problem.batches,
            check_deterministic=False,
            num_data=problem.n_examples,
        )
        if columns == 1:
            v = torch.cat([parameter.detach().flatten() for parameter in parameters])
        else:
            v = torch.randn(operator.shape[1], columns, device=problem.device)

        def run() -> Tensor:
            with sdpa_kernel(SDPBackend.MATH):  # fused attention has no forward-mode derivative
                return operator @ v

        return run

    return prepare


JOBS: dict[str, Callable[[Problem], Callable[[], Any]]] = {
    "kfac": _kfac(FisherType.TYPE2),
    "kfac_mc": _kfac(FisherType.MC),
    "ekfac": _updated(FisherType.TYPE2),
    "ekfac_mc": _updated(FisherType.MC),
    "mv": _mv(1),
    "linearized": _mv(VECTORS),
}


def _diagonal(operator: Any, problem: Problem) -> Tensor:
    """Layer by layer: weights, then bias."""
    parts = []
    for name in problem.linear_maps:
        inputs, gradients = operator._input_covariances[name], operator._gradient_covariances[name]
        own = torch.outer(gradients.diagonal(), inputs.diagonal())
        bias = problem.model.get_submodule(name).bias is not None
        parts += [own[:, :-1].flatten(), own[:, -1]] if bias else [own.flatten()]
    return torch.cat(parts)


FLAT: dict[str, Callable[[Any, Problem], Tensor]] = {
    "kfac": _diagonal,
    "mv": lambda v, problem: v,
}
