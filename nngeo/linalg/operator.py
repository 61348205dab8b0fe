"""What matrix-free methods ask of a matrix, and what they give back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator
from torch import Tensor

from nngeo.linalg.arguments import count, random_source
from nngeo.linalg.length import length

# Elements of the vectors that a method holds at a time where it can choose: 2**26 are 256 MiB in float32.
BUDGET = 2**26


class Operator(Protocol):
    """A symmetric matrix (P, P) that is known by its products; every PMat is one."""

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    def mv(self, v: Tensor) -> Tensor:
        """The product with every row of (m, P)."""

    def size(self, dim: int) -> Any:
        """P, for dim 0 and 1."""


@dataclass(frozen=True)
class Products:
    """The matrix whose product with rows (m, P) is a function."""

    product: Callable[[Tensor], Tensor]
    p: int
    dtype: torch.dtype
    device: torch.device

    def mv(self, v: Tensor) -> Tensor:
        """The product with every row of (m, P)."""
        return self.product(v)

    def size(self, dim: int) -> int:
        """P, for dim 0 and 1."""
        return self.p


class Estimated(NamedTuple):
    """A random estimate and its standard error, of the same shape: the deviation of the mean over independent draws.

    The error is itself an estimate, from the spread of the draws; it does not see a bias.
    """

    value: Tensor
    error: Tensor

    @classmethod
    def mean(cls, draws: Tensor) -> Estimated:
        """Of draws (samples, ...), independent and identically distributed."""
        mean, n = draws.mean(0), len(draws)
        return cls(mean, length(draws - mean, 0) / (n * (n - 1)) ** 0.5)


def rademacher(m: int, matrix: Operator, generator: torch.Generator | None) -> Tensor:
    """(m, P) of +1 and -1, from the generator, or else from torch's global one."""
    device = matrix.device if random_source(generator) is None else generator.device  # type: ignore[union-attr]
    bits = torch.randint(2, (m, int(matrix.size(0))), generator=generator, device=device)
    return (2 * bits - 1).to(matrix.device, matrix.dtype)


def normal(m: int, matrix: Operator, generator: torch.Generator | None) -> Tensor:
    """(m, P) of standard normal numbers, from the generator, or else from torch's global one."""
    device = matrix.device if random_source(generator) is None else generator.device  # type: ignore[union-attr]
    drawn = torch.randn(m, int(matrix.size(0)), generator=generator, device=device, dtype=matrix.dtype)
    return drawn.to(matrix.device)


def groups(samples: int, each: int) -> Iterator[int]:
    """Numbers of samples that add up to `samples`, so that `each` elements for every one fit the budget."""
    step = max(1, BUDGET // max(1, each))
    for start in range(0, samples, step):
        yield min(step, samples - start)


def check_samples(samples: int, least: int, what: str) -> None:
    """Nothing, if there are enough.

    Raises:
        ValueError: with the least number that gives a standard error.
    """
    if count("samples", samples, least=0) < least:
        raise ValueError(f"{what} takes at least {least} samples (products with the matrix); got samples={samples}.")


def scipy_operator(matrix: Operator) -> LinearOperator:
    """The matrix for SciPy: float64 vectors on the CPU, converted at every product."""
    p = int(matrix.size(0))

    def product(columns: np.ndarray) -> np.ndarray:
        rows = torch.as_tensor(np.ascontiguousarray(columns.T)).reshape(-1, p).to(matrix.device, matrix.dtype)
        return matrix.mv(rows).detach().to("cpu", torch.float64).numpy().reshape(columns.T.shape).T

    return LinearOperator((p, p), matvec=product, rmatvec=product, matmat=product, dtype=np.float64)
