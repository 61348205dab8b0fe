"""A low-rank matrix plus a diagonal: what a PMatLowRank is with damping, and what its functions are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from nngeo.linalg.arguments import count, flag, random_source, shown, tensor
from nngeo.linalg.lowrank import LowRankPlusDiagonal
from nngeo.linalg.spectrum import Spectrum
from nngeo.linalg.symmetric import rounding_of, spectral_norm
from nngeo.representations.base import PMat, entry
from nngeo.representations.damping import Damping
from nngeo.representations.dense import PMatDense

if TYPE_CHECKING:
    from typing_extensions import Self


def require_eigenbasis(matrix: PMat) -> None:
    """Nothing, if all P eigenvectors fit into memory."""
    p = matrix.layer_collection.numel()
    matrix._require_memory(f"The eigenbasis of a {type(matrix).__name__}", p**2, matrix.dtype, matrix.device)


class PMatLowRankPlusDiag(PMat):
    """`V' diag(c) V + diag(d)`, with r rows V (r, P), weights c of any sign, and d 0-d or (P,); made by `F + damping`.

    Memory and products O(r P). With 0-d damping all operations are exact in O(r^2 P), the eigenbasis once; with (P,)
    `solve`, `inv`, `logdet` and `sample` are, by Woodbury's identity, and other functions form the matrix.

    Args:
        data: a LowRankPlusDiagonal, or a tuple of its tensors (V, c, d).

    >>> import torch
    >>> from nngeo.layers.collection import LayerCollection
    >>> from nngeo.representations import PMatLowRank
    >>> layers = LayerCollection.from_model(torch.nn.Linear(1, 1))
    >>> F = PMatLowRank(layers, data=torch.tensor([[[1.0, 2.0]]])) + 1.0
    >>> F.inv().inv().to_torch()
    tensor([[2.0000, 2.0000],
            [2.0000, 5.0000]])
    """

    data: LowRankPlusDiagonal

    def _estimate(self, examples: Any) -> NoReturn:
        raise NotImplementedError("Estimate a PMatLowRank, and add damping to it: `FIM(..., PMatLowRank) + damping`.")

    def _checked(self, data: Any) -> LowRankPlusDiagonal:
        if not isinstance(data, LowRankPlusDiagonal):
            if not isinstance(data, tuple | list) or len(data) != 3:
                raise TypeError(f"`data` should be three tensors (V, c, d); it is {shown(data)}.")
            rows, weights, diagonal = (tensor("data", x, "(V, c, d)") for x in data)
            data = LowRankPlusDiagonal(rows, weights, diagonal)
        p, shapes = self.layer_collection.numel(), [tuple(x.shape) for x in (data.rows, data.weights, data.diagonal)]
        if shapes[0][1:] != (p,) or shapes[1] != shapes[0][:1] or shapes[2] not in ((), (p,)):
            raise ValueError(f"`data` should be of shapes (r, {p}), (r,) and () or ({p},); they are {shapes}.")
        return data

    @property
    def _sample(self) -> Tensor:
        return self.data.rows

    def _of(self, data: LowRankPlusDiagonal) -> Self:
        return self._derived(data)

    def _as_dense(self) -> PMatDense:
        return PMatDense(self.layer_collection, data=self.to_torch())

    def _mv(self, v: Tensor) -> Tensor:
        return self.data.mv(v)

    def _solve(self, v: Tensor, regul: float) -> Tensor:
        data = self.data.shifted(self.data.diagonal.new_tensor(regul))
        return data.solve(v) if data.invertible else self._as_dense()._solve(v, regul)

    def _resolution(self) -> float:
        return rounding_of(self._norm("fro"))

    def _diag(self) -> Tensor:
        return self.data.diag()

    def _dense(self) -> Tensor:
        return self.data.to_torch()

    def _norm(self, ord: str | int) -> Tensor:
        if self.data.isotropic:
            return spectral_norm(self.data.eigenvalues(), ord)
        if ord != "fro":
            return self._as_dense().norm(ord)
        values, d = self.data.eigen()[0], self.data.diagonal
        # |V'cV|^2 + 2 <V'cV, d> + |d|^2, in float64, where no square leaves the range.
        values, d, low = values.double(), d.double(), (self.data.diag() - d).double()
        return (values.square().sum() + (d * (2 * low + d)).sum()).sqrt().to(self.dtype)

    # Damping and functions

    def _shifted(self, damping: Damping) -> Self:
        return self._of(self.data.shifted(damping.flat()))

    def _function(self, f: Callable[[Tensor], Tensor]) -> PMat:
        return self._of(self.data.function(f)) if self.data.isotropic else self._as_dense()._function(f)

    def _inverse(self) -> PMat:
        if self.data.invertible:
            return self._of(self.data.inverse())
        return self._as_dense().inv()

    def _logdet(self) -> Tensor:
        return self.data.logdet() if self.data.invertible else self._as_dense().logdet()

    def _spectrum(self) -> Spectrum:
        require_eigenbasis(self)
        return self.data.spectrum() if self.data.isotropic else self._as_dense()._spectrum()

    def _top(self, k: int) -> tuple[Tensor, Tensor]:
        return self.data.top(k) if self.data.isotropic else super()._top(k)

    def _draws(self, normal: Callable[[int], Tensor], f: Callable[[Tensor], Tensor]) -> Tensor:
        return self._function(f)._mv(normal(self.layer_collection.numel()))

    def sample(self, n: int = 1, generator: torch.Generator | None = None, *, inverse: bool = True) -> Tensor:
        """(n, P); see `PMat.sample`. With a (P,) diagonal the draws are not those of other representations.

        They are `V' c^(1/2) z1 + d^(1/2) z2`, which has covariance F, and the inverse of F times that: O(r P) a draw.
        """
        if self.data.isotropic or not self.data.positive:
            return super().sample(n, generator, inverse=inverse)
        count("n", n, least=0)
        random_source(generator)
        values, vectors = self.data.eigen()
        size = (n, len(values) + self.layer_collection.numel())
        device = self.device if generator is None else generator.device
        z = torch.randn(size, generator=generator, dtype=self.dtype, device=device).to(self.device)
        z1, z2 = z[:, : len(values)], z[:, len(values) :]
        draws = (z1 * values.sqrt()) @ vectors + z2 * self.data.diagonal.sqrt()
        return self._solve(draws, 0.0) if flag("inverse", inverse) else draws

    # Sums and state

    def _scaled(self, factor: float | Tensor) -> Self:
        return self._of(self.data.scaled(factor))

    def _added(self, other: PMatLowRankPlusDiag) -> Self:
        rows = torch.cat([self.data.rows, other.data.rows])
        weights = torch.cat([self.data.weights, other.data.weights])
        return self._of(LowRankPlusDiagonal(rows, weights, self.data.diagonal + other.data.diagonal))

    def _state(self) -> dict[str, Any]:
        data = self.data
        return {name: getattr(data, name).detach() for name in ("rows", "weights", "diagonal")}

    def _load(self, state: Mapping[str, Any], to: Callable[[Tensor], Tensor]) -> LowRankPlusDiagonal:
        return self._checked(tuple(to(entry(state, name)) for name in ("rows", "weights", "diagonal")))
