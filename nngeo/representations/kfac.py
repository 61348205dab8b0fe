"""Kronecker factors (Martens & Grosse, 2015; Grosse & Martens, 2016; weight sharing: Eschenhagen et al., 2023)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from nngeo.layers.collection import Layer, LayerCollection
from nngeo.linalg.cache import version
from nngeo.linalg.kronecker import KroneckerBasis, eigenbasis, outer, times
from nngeo.linalg.outer import MatrixView, Sharing
from nngeo.linalg.symmetric import reciprocal
from nngeo.representations.block import Block
from nngeo.representations.layerwise import LayerwisePMat

if TYPE_CHECKING:
    from nngeo.generators import Generator, LayerRecord

Moments = tuple[Tensor | None, Tensor]


def moments(record: LayerRecord, weight_sharing: Sharing) -> Moments:
    """Sums of `a a'` (None but at the first chunk of cotangents) and of `g g'`; see `OuterProducts`."""
    factors = record.factors()
    return factors.input_moment(weight_sharing) if record.first else None, factors.output_moment(weight_sharing)


def zero_view(layer: Layer) -> MatrixView:
    """A layer without known factors as one row; enough for a matrix that is zero."""
    return MatrixView(groups=1, rows=1, columns=layer.numel(), bias=False)


@dataclass(frozen=True, eq=False)
class KroneckerBlock(Block):
    """`V -> G V A` on the layer's matrices V (n, o, i): inputs a (n, i, i), or its diagonal (n, i), and g (n, o, o)."""

    a: Tensor
    g: Tensor
    view: MatrixView

    @staticmethod
    def statistic(record: LayerRecord, **options: Any) -> Moments:
        return moments(record, options["weight_sharing"])

    @classmethod
    def stored(cls, record: LayerRecord, **options: Any) -> int:
        return record.factors().moment_entries(options["weight_sharing"])

    @classmethod
    def from_means(cls, layer: Layer, view: MatrixView | None, *means: Tensor) -> KroneckerBlock:
        assert view is not None  # else the statistic has raised
        a, g = means
        return cls(a, g, view)

    @classmethod
    def zeros(cls, layer: Layer, like: Tensor) -> KroneckerBlock:
        return cls(like.new_zeros(1, layer.numel()), like.new_zeros(1, 1, 1), zero_view(layer))

    def eigen(self) -> tuple[Tensor, Tensor, KroneckerBasis]:
        """Eigenvalues of a (n, i) and of g (n, o), and the basis; computed once."""
        return self._cache.get("eigen", version(self.a, self.g), self._eigen)

    def _eigen(self) -> tuple[Tensor, Tensor, KroneckerBasis]:
        (da, ua), (dg, ug) = eigenbasis(self.a), eigenbasis(self.g)
        assert ug is not None
        return da, dg, KroneckerBasis(ua, ug)

    def mv(self, v: Tensor) -> Tensor:
        return self.view.to_flat(times(self.g @ self.view.to_matrix(v), self.a))

    def solve(self, v: Tensor, regul: float) -> Tensor:
        da, dg, basis = self.eigen()
        return self.view.to_flat(basis.scale(self.view.to_matrix(v), reciprocal(outer(dg, da), regul, "block")))

    def solve_factored(self, v: Tensor, regul: float) -> Tensor:
        """`((G + sqrt(regul) / pi I) (x) (A + pi sqrt(regul) I))^-1 v`, Martens & Grosse (2015), section 6.3.

        pi^2 is the ratio of the mean eigenvalues of A and G; 1 where one of them is zero, as in a layer of dead units.
        """
        da, dg, basis = self.eigen()
        ratio = da.mean(-1, keepdim=True) / dg.mean(-1, keepdim=True)
        pi = ratio.sqrt().where(ratio.isfinite() & (ratio > 0), torch.ones_like(ratio))
        spectrum = outer(dg + regul**0.5 / pi, da + pi * regul**0.5)
        inverse = 1 / spectrum if regul else reciprocal(spectrum, 0.0, "block")
        return self.view.to_flat(basis.scale(self.view.to_matrix(v), inverse))

    def solvers(self) -> dict[str, Callable[[Tensor, float], Tensor]]:
        return {"factored": self.solve_factored}

    def _diagonals(self) -> tuple[Tensor, Tensor]:
        return self.a if self.a.ndim == 2 else self.a.diagonal(dim1=1, dim2=2), self.g.diagonal(dim1=1, dim2=2)

    def diag(self) -> Tensor:
        a, g = self._diagonals()
        return self.view.to_flat(outer(g, a))

    def trace(self) -> Tensor:
        a, g = self._diagonals()
        return (a.sum(-1) * g.sum(-1)).sum()

    def eigenvalues(self) -> Tensor:
        da, dg, _ = self.eigen()
        return outer(dg, da)

    def norm(self, ord: str | int) -> Tensor:
        """Closed forms: those of a Kronecker product are products of the factors'."""
        if ord == "fro":
            return (self.a.flatten(1).norm(dim=1) * self.g.flatten(1).norm(dim=1)).norm()
        da, dg, _ = self.eigen()
        by_group = [d.abs().amax(1) if ord == 2 else d.abs().amin(1) for d in (da, dg)]
        return (by_group[0] * by_group[1]).max() if ord == 2 else (by_group[0] * by_group[1]).min()

    def scaled(self, factor: float) -> KroneckerBlock:
        return KroneckerBlock(self.a, factor * self.g, self.view)

    def added(self, other: KroneckerBlock) -> NoReturn:
        raise NotImplementedError(
            "A sum of Kronecker products is not one. Estimate one matrix from the examples of both, or apply both: "
            "`F1.mv(v) + F2.mv(v)`. PMatDiag, PMatBlockDiag and PMatDense add exactly."
        )


def check_sharing(weight_sharing: str) -> Sharing:
    """The option, if it is known."""
    if weight_sharing not in ("expand", "reduce"):
        raise ValueError(f"Unknown weight_sharing={weight_sharing!r}; known are 'expand' and 'reduce'.")
    return weight_sharing  # type: ignore[return-value]


class FactoredPMat(LayerwisePMat):
    """A layer-wise matrix of which some blocks are made of Kronecker factors."""

    weight_sharing: Sharing = "expand"

    def __init__(
        self,
        layer_collection: LayerCollection,
        generator: Generator | None = None,
        data: Any = None,
        examples: Any = None,
        *,
        weight_sharing: Sharing = "expand",
    ):
        self.weight_sharing = check_sharing(weight_sharing)
        super().__init__(layer_collection, generator, data, examples)

    def _options(self) -> dict[str, Any]:
        return {"weight_sharing": self.weight_sharing}


class PMatKFAC(FactoredPMat):
    """Kronecker factors of every layer that is a linear map, `1/n sum_bt a a'` and `1/(n t) sum_kbt g g'`.

    Exact for one example without positions, or a deep linear network; else an approximation. Bias and weight are joint.
    Memory O(i^2 + o^2) a layer; `solve` is by eigendecompositions, O(i^3 + o^3) once for all `regul`.
    `solve="factored"` damps the factors instead, see `KroneckerBlock.solve_factored`.

    Args:
        weight_sharing: what positions that share the weight are: "expand", as independent examples; "reduce", inputs
            averaged and gradients summed over positions first.

    >>> import torch
    >>> from nngeo.generators import JacobianGenerator
    >>> from nngeo.layers.collection import LayerCollection
    >>> from nngeo.variants import Exact, make_variant
    >>> model = torch.nn.Linear(2, 1)
    >>> layers = LayerCollection.from_model(model)
    >>> generator = JacobianGenerator(model, Exact(make_variant("regression")))
    >>> F = PMatKFAC(layers, generator, examples=(torch.eye(2),))
    >>> F, F.trace()
    (PMatKFAC(3 parameters of 1 layer, 2 examples, torch.float32, cpu), tensor(2.))
    """

    block_type = KroneckerBlock

    def get_eigendecomposition(
        self,
    ) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, tuple[Tensor | None, Tensor]]]:
        """Eigenvalues {layer: ((n, i), (n, o))} of A and G, and eigenvectors {layer: ((n, i, i), (n, o, o))}.

        Eigenvectors are in columns; those of a diagonal A are None: the identity.
        """
        found = {name: block.eigen() for name, block in self.data.items()}  # type: ignore[attr-defined]
        values = {name: (da, dg) for name, (da, dg, _) in found.items()}
        return values, {name: (basis.ua, basis.ug) for name, (_, _, basis) in found.items()}
