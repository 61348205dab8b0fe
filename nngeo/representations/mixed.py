"""A representation for each layer, estimated in one sweep."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from nngeo.layers.collection import Layer, LayerCollection
from nngeo.linalg.arguments import flag, shown
from nngeo.linalg.matrixview import MatrixView
from nngeo.linalg.outer import Sharing
from nngeo.representations.block import Block
from nngeo.representations.blockdiag import DenseBlock
from nngeo.representations.eigenblock import KroneckerEigenBlock
from nngeo.representations.ekfac import EigenbasisPMat
from nngeo.representations.layerwise import LayerwisePMat

if TYPE_CHECKING:
    from typing_extensions import Self

    from nngeo.generators import Generator

Representation = type[LayerwisePMat]
Mapped = Mapping[Any, Representation]  # keys: module types and layer names


class PMatEKFACBlockDiag(EigenbasisPMat):
    """EKFAC for the layers that are linear maps, dense blocks for the others.

    >>> import torch
    >>> from nngeo.generators import JacobianGenerator
    >>> from nngeo.layers.collection import LayerCollection
    >>> from nngeo.variants import Exact, make_variant
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2))
    >>> layers = LayerCollection.from_model(model)
    >>> generator = JacobianGenerator(model, Exact(make_variant("regression")))
    >>> F = PMatEKFACBlockDiag(layers, generator, examples=(torch.eye(2),))
    >>> {name: type(block).__name__ for name, block in F.data.items()}
    {'0': 'KroneckerEigenBlock', '1': 'DenseBlock'}
    """

    def block_type_for(self, layer: Layer, view: MatrixView | None) -> type[Block]:
        """The type of a layer's block; `view` is None where the layer has no Kronecker factors."""
        return DenseBlock if view is None else KroneckerEigenBlock

    def _block_types(self) -> tuple[type[Block], ...]:
        return DenseBlock, KroneckerEigenBlock


class PMatMixed(EigenbasisPMat):
    """A block of its own representation for each layer.

    Args:
        default_representation: of the layers that the mapping does not name; PMatDiag, PMatBlockDiag, PMatKFAC,
            PMatEKFAC or PMatQuasiDiag.
        map_layers_to: {layer name or module type: representation}. A name goes before a type, an earlier type before
            a later one; a type stands for its subclasses, too.
        weight_sharing: as for PMatKFAC.
        update_diag: whether PMatEKFAC's scalings are exact, for which the examples are read twice.

    >>> import torch
    >>> from nngeo.generators import JacobianGenerator
    >>> from nngeo.layers.collection import LayerCollection
    >>> from nngeo.variants import Exact, make_variant
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2))
    >>> layers = LayerCollection.from_model(model)
    >>> generator = JacobianGenerator(model, Exact(make_variant("regression")))
    >>> from nngeo.representations import PMatDiag, PMatKFAC
    >>> mapping = {torch.nn.Linear: PMatKFAC}
    >>> F = PMatMixed.from_mapping(layers, generator, PMatDiag, mapping, examples=(torch.eye(2),))
    >>> {name: type(block).__name__ for name, block in F.data.items()}
    {'0': 'KroneckerBlock', '1': 'DiagBlock'}
    """

    default_representation: Representation | None = None
    map_layers_to: Mapped = {}

    def __init__(
        self,
        layer_collection: LayerCollection,
        generator: Generator | None = None,
        data: Any = None,
        examples: Any = None,
        *,
        default_representation: Representation | None = None,
        map_layers_to: Mapped | None = None,
        weight_sharing: Sharing = "expand",
        update_diag: bool = True,
    ):
        flag("update_diag", update_diag)
        if not (map_layers_to is None or isinstance(map_layers_to, Mapping)):
            raise TypeError(
                "`map_layers_to` should be a dict, {layer name or module type: representation}; got "
                f"{shown(map_layers_to)}."
            )
        self.default_representation, self.map_layers_to = default_representation, dict(map_layers_to or {})
        for representation in [default_representation, *self.map_layers_to.values()]:
            if representation is not None:
                _check_representation(representation)
        super().__init__(
            layer_collection, generator, data, examples, weight_sharing=weight_sharing, update_diag=update_diag
        )

    @classmethod
    def from_mapping(
        cls,
        layer_collection: LayerCollection,
        generator: Generator | None,
        default_representation: Representation | None,
        map_layers_to: Mapped,
        data: Any = None,
        examples: Any = None,
        **options: Any,
    ) -> Self:
        """The constructor, with the arguments in NNGeometry's order."""
        return cls(
            layer_collection,
            generator,
            data,
            examples,
            default_representation=default_representation,
            map_layers_to=map_layers_to,
            **options,
        )

    def _estimate(self, examples: Any) -> tuple[dict[str, Block], int]:
        modules = self._modules()
        for key in self.map_layers_to:
            if not any(_matches(key, name, module) for name, module in modules.items()):
                there = ", ".join(f"{name!r} ({layer.kind})" for name, layer in self.layer_collection.layers.items())
                raise ValueError(f"`map_layers_to` names {key!r}, which no layer is; there are {there}.")
        return super()._estimate(examples)

    def _has_scalings(self) -> bool:
        chosen = (self.default_representation, *self.map_layers_to.values())
        return any(kind is not None and kind.block_type is KroneckerEigenBlock for kind in chosen)

    def block_type_for(self, layer: Layer, view: MatrixView | None) -> type[Block]:
        """The block of the representation that the layer is mapped to."""
        module = self._modules()[layer.name]
        by_name = self.map_layers_to.get(layer.name)
        by_type = (r for key, r in self.map_layers_to.items() if _matches(key, layer.name, module))
        representation = by_name or next(by_type, self.default_representation)
        if representation is None:
            raise ValueError(
                f"Layer {layer.name!r} ({layer.kind}) is not in `map_layers_to`, and there is no "
                "`default_representation`."
            )
        return representation.block_type

    def _block_types(self) -> tuple[type[Block], ...]:
        return (Block,)

    def _modules(self) -> dict[str, nn.Module]:
        return self.layer_collection.get_layerid_module_map(self._source().model)


def _matches(key: Any, name: str, module: nn.Module) -> bool:
    return isinstance(module, key) if isinstance(key, type) else key == name


def _check_representation(representation: Any) -> None:
    if not isinstance(getattr(representation, "block_type", None), type):
        found = getattr(representation, "__name__", repr(representation))
        raise TypeError(
            f"A layer of PMatMixed can't be represented by {found}: choose one that is made of one kind of block, as "
            "PMatDiag, PMatBlockDiag, PMatKFAC, PMatEKFAC or PMatQuasiDiag."
        )
