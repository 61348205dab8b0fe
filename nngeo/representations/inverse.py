"""The inverse of a matrix that is never formed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from nngeo.representations.base import PMat
from nngeo.representations.matrixfree import MatrixFree

if TYPE_CHECKING:
    from typing_extensions import Self


class PMatInverse(MatrixFree):
    """`F^-1` by its products, each of which is a solve with F.

    Args:
        matrix: F, positive definite: `F + damping`.
        options: of `F.solve`: `solve`, `rtol`, `preconditioner`, ...; `regul` is 0 if it is not among them.
    """

    data: PMat

    def __init__(self, matrix: PMat, **options: Any):
        super().__init__(matrix.layer_collection, data=matrix)
        self.options = {"regul": 0.0} | options

    def _estimate(self, examples: Any) -> NoReturn:
        raise NotImplementedError("An inverse is not estimated from examples: make it by `F.inv()`.")

    @property
    def dtype(self) -> torch.dtype:
        """That of the results."""
        return self.data.dtype

    @property
    def device(self) -> torch.device:
        """That of the results."""
        return self.data.device

    def _mv(self, v: Tensor) -> Tensor:
        return self.data.solve(v, **self.options)

    def _solve(self, v: Tensor, regul: float, **options: Any) -> Tensor:
        """`(F^-1 + r I)^-1 v = F (F + I / r)^-1 v / r`: a solve with F, damped; a product for r = 0."""
        if regul == 0:
            return self.data.mv(v) + self.options["regul"] * v
        x = self.data.solve(v, **(self.options | options | {"regul": self.options["regul"] + 1 / regul}))
        return (self.data.mv(x) + self.options["regul"] * x) / regul

    def _resolution(self) -> float:
        return 0.0

    def _inverse(self) -> PMat:
        return self.data + self.options["regul"] if self.options["regul"] else self.data

    def _diag(self) -> NoReturn:
        raise NotImplementedError(
            "The diagonal and the trace of an inverse take P solves: `F.inv().estimate_diag()` and `.estimate_trace()` "
            "estimate them from a few. Or use another representation, `F.get_diag(inverse=True)`."
        )

    def _scaled(self, factor: float | Tensor) -> Self:
        new = self._like(self.data * (1 / factor), None)
        new.options = self.options | {"regul": self.options["regul"] / float(factor)}
        return new

    def _added(self, other: Self) -> NoReturn:
        raise NotImplementedError("Sums of inverses are not kept: add their products.")

    def _state(self) -> NoReturn:
        raise NotImplementedError("A PMatInverse holds no data to save: keep the matrix that it inverts.")
