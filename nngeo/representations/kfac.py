"""Kronecker factors (Martens & Grosse, 2015; Grosse & Martens, 2016; weight sharing: Eschenhagen et al., 2023)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from nngeo.layers.collection import LayerCollection
from nngeo.linalg.arguments import choice
from nngeo.linalg.outer import Sharing
from nngeo.representations.block import Block
from nngeo.representations.kroneckerblock import KroneckerBlock
from nngeo.representations.layerwise import LayerwisePMat

if TYPE_CHECKING:
    from nngeo.generators import Generator


def check_sharing(weight_sharing: str) -> Sharing:
    """The option, if it is known."""
    return choice("weight_sharing", weight_sharing, ("expand", "reduce"))


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

    def _state(self) -> dict[str, Any]:
        return super()._state() | {"weight_sharing": self.weight_sharing}

    def _load(self, state: Mapping[str, Any], to: Callable[[Tensor], Tensor]) -> dict[str, Block]:
        self.weight_sharing = check_sharing(state.get("weight_sharing", "expand"))
        return super()._load(state, to)


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
        found = self._by_layer(lambda name, block: block.eigen())  # type: ignore[attr-defined]
        values = {name: (da, dg) for name, (da, dg, _) in found.items()}
        return values, {name: (basis.ua, basis.ug) for name, (_, _, basis) in found.items()}
