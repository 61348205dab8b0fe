"""BackPACK: quantities of one batch at a time, beside its gradient, averaged here over batches."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
from backpack import backpack, extend
from backpack.extensions import KFAC, KFLR, DiagGGNExact, DiagGGNMC
from torch import Tensor, nn

from tests.benchmarks.networks import Problem

VERSION = version("backpack-for-pytorch")


def _quantity(extension: Callable[[], Any]) -> Callable[[Problem], Callable[[], Any]]:
    """The average over batches of what an extension leaves at each parameter: a tensor, or a list of factors."""

    def prepare(problem: Problem) -> Callable[[], Any]:
        # A model of its own for each job: the converter rewrites it.
        own = [module for module in problem.model.modules() if not type(module).__module__.startswith("torch.nn")]
        model = extend(problem.copy().model, use_converter=bool(own))
        model.eval()  # the converter forgets
        loss = extend(nn.CrossEntropyLoss())
        parameters = list(model.parameters())

        def run() -> list[list[Tensor]]:
            sums: list[list[Tensor]] = []
            for x, y in problem.batches:
                model.zero_grad()
                with backpack(quantity := extension()):
                    loss(model(x), y).backward()
                weight = len(x) / problem.n_examples
                found = [_factors(getattr(parameter, quantity.savefield)) for parameter in parameters]
                for parameter in parameters:
                    delattr(parameter, quantity.savefield)
                if not sums:
                    sums = [[weight * factor for factor in factors] for factors in found]
                else:
                    for factors, more in zip(sums, found, strict=True):
                        for factor, term in zip(factors, more, strict=True):
                            factor.add_(term, alpha=weight)
            return sums

        return run

    return prepare


def _factors(found: Any) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else list(found)


JOBS: dict[str, Callable[[Problem], Callable[[], Any]]] = {
    "diag": _quantity(DiagGGNExact),
    "diag_mc": _quantity(DiagGGNMC),
    "kfac": _quantity(KFLR),
    "kfac_mc": _quantity(KFAC),
}


def _diagonal_of_factors(found: list[list[Tensor]], problem: Problem) -> Tensor:
    parts = []
    for factors in found:
        diagonals = [factor.diagonal() for factor in factors]
        parts.append(diagonals[0] if len(diagonals) == 1 else torch.outer(*diagonals).flatten())
    return torch.cat(parts)


FLAT: dict[str, Callable[[Any, Problem], Tensor]] = {
    "diag": lambda found, problem: torch.cat([factors[0].flatten() for factors in found]),
    "kfac": _diagonal_of_factors,
}
