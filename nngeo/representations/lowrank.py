"""Scaled rows of the Jacobian: as many of them as cotangents and examples."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nngeo.linalg.arguments import tensor
from nngeo.linalg.cache import Cache, version
from nngeo.linalg.decompose import svd
from nngeo.linalg.length import length
from nngeo.linalg.lowrank import LowRankPlusDiagonal
from nngeo.linalg.spectrum import Spectrum, cleaned
from nngeo.linalg.symmetric import rounding_of, spectral_norm
from nngeo.representations.base import PMat
from nngeo.representations.damping import Damping
from nngeo.representations.finite import require_finite
from nngeo.representations.jacobians import jacobian_of
from nngeo.representations.lowrankdiag import PMatLowRankPlusDiag, require_eigenbasis

if TYPE_CHECKING:
    from typing_extensions import Self


class PMatLowRank(PMat):
    """`R' R` for rows `data` R (k, n, P), the Jacobian divided by sqrt(n). Exact, and positive semidefinite.

    Memory and products O(k n P); `solve` O((k n)^2 P) once for all `regul`.

    >>> import torch
    >>> from nngeo.layers.collection import LayerCollection
    >>> layers = LayerCollection.from_model(torch.nn.Linear(1, 1))
    >>> F = PMatLowRank(layers, data=torch.tensor([[[1.0, 2.0]]]))
    >>> F.to_torch(), F.norm(2), F.norm(-2)
    (tensor([[1., 2.],
            [2., 4.]]), tensor(5.), tensor(0.))
    """

    data: Tensor

    def _estimate(self, examples: Any) -> tuple[Tensor, int]:
        data, n = jacobian_of(self, examples, pad=True)
        require_finite({name: [part] for name, part in self.layer_collection.split(data).items()}, "this PMatLowRank")
        return data.div_(n**0.5), n

    def _checked(self, data: Any) -> Tensor:
        tensor("data", data, "(k, n, P)")
        p = self.layer_collection.numel()
        if data.ndim != 3 or data.shape[-1] != p:
            raise ValueError(f"`data` should be (k, n, {p}), is {tuple(data.shape)}.")
        return data

    @property
    def rows(self) -> Tensor:
        """(k n, P)."""
        return self.data.flatten(0, 1)

    def svd(self) -> tuple[Tensor, Tensor]:
        """Singular values (r,) of the rows, descending, and right singular vectors (r, P), r = min(k n, P); once."""
        cache = self.__dict__.setdefault("_cache", Cache())
        return cache.get("svd", (id(self.data), *version(self.data)), self._svd)

    def _svd(self) -> tuple[Tensor, Tensor]:
        return svd(self.rows, "rows")

    def _mv(self, v: Tensor) -> Tensor:
        return (v @ self.rows.mT) @ self.rows

    def _solve(self, v: Tensor, regul: float) -> Tensor:
        """Exact also for what lies outside the span of the rows, where the matrix is `regul` times the identity."""
        s, vt = self.svd()
        within = v @ vt.mT
        outside = v - within @ vt
        outside -= (outside @ vt.mT) @ vt  # again, against rounding: it is divided by `regul`
        full = len(s) == v.shape[-1]
        if regul == 0:
            kept = s > len(s) * torch.finfo(s.dtype).eps * s.amax()
            lost = length(within[..., ~kept], -1) + (0 if full else length(outside, -1))
            if bool((lost > 1e3 * torch.finfo(s.dtype).eps * length(v, -1)).any()):
                raise ValueError(
                    f"The matrix has rank {int(kept.sum())} of {v.shape[-1]}, and the right-hand side is not in its "
                    "range: solve with `regul` > 0."
                )
            return (within[..., kept] / s[kept] / s[kept]) @ vt[kept]  # whose square may be zero
        solved = (within / (s.square() + regul)) @ vt
        return solved if full else solved + outside / regul

    def _resolution(self) -> float:
        cache = self.__dict__.setdefault("_cache", Cache())  # without the singular values, which "cg" does not need
        return cache.get("rounding", (id(self.data), *version(self.data)), lambda: rounding_of(self._norm("fro")))

    def _diag(self) -> Tensor:
        return self.rows.square().sum(0)

    def trace(self) -> Tensor:
        """The trace, 0-d."""
        return self.data.square().sum()

    def _norm(self, ord: str | int) -> Tensor:
        m, p = self.rows.shape
        if ord == "fro":
            size = self.rows.detach().abs().max()
            rows = self.rows / torch.where(size > 0, size, 1)
            return size * (size * length(rows @ rows.mT if m <= p else rows.mT @ rows))
        if ord == -2 and m < p:
            return self.data.new_zeros(())
        return spectral_norm(self.svd()[0].square(), ord)

    def _dense(self) -> Tensor:
        return self.rows.mT @ self.rows

    def get_eigendecomposition(self) -> tuple[Tensor, Tensor]:
        """The r = min(k n, P) largest eigenvalues (r,), descending, and eigenvectors (P, r); all others are zero."""
        s, vt = self.svd()
        return s.square(), vt.mT

    def _shifted(self, damping: Damping) -> PMatLowRankPlusDiag:
        return PMatLowRankPlusDiag(self.layer_collection, data=self._form().shifted(damping.flat()))

    def _function(self, f: Callable[[Tensor], Tensor]) -> PMatLowRankPlusDiag:
        return PMatLowRankPlusDiag(self.layer_collection, data=self._form().function(f))

    def _spectrum(self) -> Spectrum:
        require_eigenbasis(self)
        return self._form().spectrum()

    def _logdet(self) -> Tensor:
        return self._form().logdet()

    def _top(self, k: int) -> tuple[Tensor, Tensor]:
        return self._form().top(k)

    def _draws(self, normal: Callable[[int], Tensor], f: Callable[[Tensor], Tensor]) -> Tensor:
        return self._form().function(f).mv(normal(self.layer_collection.numel()))

    def _form(self) -> LowRankPlusDiagonal:
        def thin() -> tuple[Tensor, Tensor]:
            s, vt = self.svd()
            return cleaned(s).square(), vt

        rows = self.rows
        return LowRankPlusDiagonal(rows, rows.new_ones(len(rows)), rows.new_zeros(()), thin)

    def _scaled(self, factor: float | Tensor) -> Self:
        if factor < 0:
            raise NotImplementedError(
                "A negative multiple, or a difference, of low-rank matrices is not of the form R'R. Use PMatDense."
            )
        return self._like(factor**0.5 * self.data, self.n_examples)

    def _added(self, other: Self) -> Self:
        same = len(self.data) == len(other.data)
        parts = [x.data if same else x.rows[None] for x in (self, other)]
        return self._like(torch.cat(parts, 1), self._joint_count(other))
