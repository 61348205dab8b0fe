"""Plain metrics: diagonal, dense, by a factor, and low rank plus diagonal."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nngeo.linalg.decompose import eigh
from nngeo.products.metric import Identity, Metric, Signed, check_shape, cotangents, diagonal, of_examples, rows_of
from nngeo.products.space import Space
from nngeo.representations import Block, DiagBlock

__all__ = ["Dense", "Diagonal", "Factor", "Identity", "LowRankPlusDiagonal", "Metric"]


@dataclass(frozen=True)
class Diagonal(Metric):
    """diag(d), for d (b, n), or (n,) for all examples; entries may be negative.

    >>> from nngeo.products import jTmjp
    >>> jTmjp(torch.nn.Identity(), torch.zeros(1, 2), Diagonal(torch.tensor([1.0, -2.0])), result="trace")
    tensor([-1.])
    """

    d: Tensor

    def check(self, space: Space) -> None:
        check_shape(self.d, "Diagonal", "d", space, (space.d,))

    def apply(self, v: Tensor, space: Space) -> Tensor:
        return self.d * v

    def factors(self, space: Space) -> list[Signed]:
        d = self.d.detach().expand(space.b, space.d)
        terms = [Signed(1.0, diagonal(d.clamp(min=0).sqrt()))]
        return terms + [Signed(-1.0, diagonal((-d).clamp(min=0).sqrt()))] if (d < 0).any() else terms

    def columns(self, space: Space) -> Tensor:
        return torch.diag_embed(self.d.sqrt()).expand(space.b, -1, -1).transpose(0, 1)

    def signed(self, signs: Tensor, space: Space) -> Tensor | None:
        return None if (self.d < 0).any() else self.d.sqrt() * signs

    def by_layer(self, space: Space) -> dict[str, Block] | None:
        if space.layers is None:
            return None
        return {name: DiagBlock(self.d[..., place]) for name, place in space.slices().items()}

    def examples(self, rows: slice) -> Diagonal:
        return Diagonal(of_examples(self.d, 1, rows))


@dataclass(frozen=True)
class Dense(Metric):
    """A matrix m (b, n, n), or (n, n) for all examples. It may be indefinite, and need not be symmetric.

    >>> from nngeo.products import jTmjp
    >>> jTmjp(torch.nn.Identity(), torch.zeros(1, 2), Dense(torch.tensor([[0.0, 1.0], [0.0, 0.0]])))
    tensor([[[0., 1.],
             [0., 0.]]])
    """

    m: Tensor

    @property
    def symmetric(self) -> bool:  # type: ignore[override]
        """Whether it equals its transpose, up to rounding."""
        m = self.m.detach()
        return bool((m - m.mT).abs().max() <= 10 * torch.finfo(m.dtype).eps * m.abs().max()) if m.numel() else True

    def check(self, space: Space) -> None:
        check_shape(self.m, "Dense", "m", space, (space.d, space.d))

    def apply(self, v: Tensor, space: Space) -> Tensor:
        if self.m.ndim == 2:
            return v @ self.m.mT
        return torch.einsum("bij,mbj->mbi", self.m, v)

    def factors(self, space: Space) -> list[Signed]:
        """By an eigendecomposition, O(n^3) for each matrix."""
        # In float32 for half precision, for which there is none.
        wide = self.m.detach().to(torch.promote_types(self.m.dtype, torch.float32))
        values, vectors = eigh(wide, "metric")
        values = torch.where(values.abs() > _rounding(values), values, 0)
        roots = [(vectors * part.clamp(min=0).sqrt()[..., None, :]).to(self.m.dtype) for part in (values, -values)]
        terms = [Signed(sign, cotangents(root, space)) for sign, root in zip((1.0, -1.0), roots, strict=True)]
        return terms if (values < 0).any() else terms[:1]

    def cost(self, space: Space) -> float:
        return float(space.d) ** 2

    def factors_cost(self, space: Space) -> float:
        return 25.0 * space.d**3 / (space.b if self.m.ndim == 2 else 1)

    def examples(self, rows: slice) -> Dense:
        return Dense(of_examples(self.m, 2, rows))

    def transposed(self) -> Dense:
        return Dense(self.m.mT)

    def symmetric_part(self) -> Dense:
        return Dense((self.m + self.m.mT) / 2)


@dataclass(frozen=True)
class Factor(Metric):
    """`V V'` for v (b, n, r), or (n, r) for all examples.

    >>> from nngeo.products import jTmjp
    >>> jTmjp(torch.nn.Identity(), torch.zeros(1, 2), Factor(torch.tensor([[1.0], [2.0]])))
    tensor([[[1., 2.],
             [2., 4.]]])
    """

    v: Tensor

    def check(self, space: Space) -> None:
        check_factor(self.v, "Factor", space)

    def apply(self, v: Tensor, space: Space) -> Tensor:
        return self._times(self._transposed_times(v))

    def _transposed_times(self, v: Tensor) -> Tensor:
        return v @ self.v if self.v.ndim == 2 else torch.einsum("bir,mbi->mbr", self.v, v)

    def _times(self, u: Tensor) -> Tensor:
        return u @ self.v.mT if self.v.ndim == 2 else torch.einsum("bir,mbr->mbi", self.v, u)

    def rank(self, space: Space) -> int:
        return self.v.shape[-1]

    def factors(self, space: Space) -> list[Signed]:
        return [Signed(1.0, cotangents(self.v.detach(), space))]

    def cost(self, space: Space) -> float:
        return 2.0 * self.v.shape[-1] * space.d

    def columns(self, space: Space) -> Tensor:
        return rows_of(self.v, space)

    def signed(self, signs: Tensor, space: Space) -> Tensor | None:
        return self._times(signs)

    def sign_count(self, space: Space) -> int:
        return self.v.shape[-1]

    def examples(self, rows: slice) -> Factor:
        return Factor(of_examples(self.v, 2, rows))


@dataclass(frozen=True)
class LowRankPlusDiagonal(Metric):
    """`V V' + diag(d)` for v (b, n, r) or (n, r), and d (b, n) or (n,).

    >>> from nngeo.products import jTmjp
    >>> jTmjp(torch.nn.Identity(), torch.zeros(1, 2), LowRankPlusDiagonal(torch.ones(2, 1), torch.ones(2)))
    tensor([[[2., 1.],
             [1., 2.]]])
    """

    v: Tensor
    d: Tensor

    def check(self, space: Space) -> None:
        check_factor(self.v, "LowRankPlusDiagonal", space)
        check_shape(self.d, "LowRankPlusDiagonal", "d", space, (space.d,))

    def _parts(self) -> tuple[Factor, Diagonal]:
        return Factor(self.v), Diagonal(self.d)

    def apply(self, v: Tensor, space: Space) -> Tensor:
        low, diagonal = self._parts()
        return low.apply(v, space) + diagonal.apply(v, space)

    def rank(self, space: Space) -> int:
        return self.v.shape[-1] + space.d

    def factors(self, space: Space) -> list[Signed]:
        return [term for part in self._parts() for term in part.factors(space)]

    def cost(self, space: Space) -> float:
        return sum(part.cost(space) for part in self._parts())

    def signed(self, signs: Tensor, space: Space) -> Tensor | None:
        low, diagonal = self._parts()
        rest = diagonal.signed(signs[..., self.v.shape[-1] :], space)
        return None if rest is None else low._times(signs[..., : self.v.shape[-1]]) + rest

    def sign_count(self, space: Space) -> int:
        return self.v.shape[-1] + space.d

    def examples(self, rows: slice) -> LowRankPlusDiagonal:
        return LowRankPlusDiagonal(of_examples(self.v, 2, rows), of_examples(self.d, 1, rows))


def check_factor(v: Tensor, kind: str, space: Space) -> None:
    """Raise unless v is (d, r) or (b, d, r), for any r."""
    space.check_kind(v, f"{kind}.v")
    check_shape(v, kind, "v", space, (space.d, v.shape[-1] if v.ndim else 1))


def _rounding(values: Tensor) -> Tensor:
    return values.shape[-1] * torch.finfo(values.dtype).eps * values.abs().amax(-1, keepdim=True)
