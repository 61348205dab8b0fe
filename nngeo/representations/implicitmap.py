"""Products with the Jacobian of a network on given examples, which is never formed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from nngeo.generators.batches import Examples
from nngeo.layers.collection import LayerCollection
from nngeo.linalg.arguments import axis
from nngeo.representations.maps import PFMap

if TYPE_CHECKING:
    from typing_extensions import Self

    from nngeo.generators import JacobianGenerator


class PFMapImplicit(PFMap):
    """`jvp` and `vjp` by running the model on the examples, each time. One-shot iterators are kept as a list.

    >>> import torch
    >>> from nngeo.generators import JacobianGenerator
    >>> from nngeo.layers.collection import LayerCollection
    >>> from nngeo.variants import Exact, make_variant
    >>> model = torch.nn.Linear(2, 1)
    >>> layers = LayerCollection.from_model(model)
    >>> generator = JacobianGenerator(model, Exact(make_variant("regression")))
    >>> J = PFMapImplicit(layers, generator, examples=(torch.eye(2),))
    >>> J.size()
    torch.Size([1, 2, 3])
    """

    generator: JacobianGenerator | None

    def __init__(
        self,
        layer_collection: LayerCollection,
        generator: JacobianGenerator | None = None,
        data: Any = None,
        examples: Any = None,
    ):
        if data is not None:
            raise ValueError("PFMapImplicit holds no data: give `generator` and `examples`.")
        self.examples = None if examples is None else Examples.kept(examples)
        self.scaling = 1.0
        super().__init__(layer_collection, generator, examples=self.examples)

    def _estimate(self, examples: Any) -> tuple[None, None]:
        self._source()
        return None, None

    def _source(self) -> JacobianGenerator:
        return super()._source()  # type: ignore[return-value]

    def _jvp(self, v: Tensor) -> Tensor:
        return self.scaling * self._source().jvp(v, self.examples, self.layer_collection)

    def _vjp(self, u: Tensor) -> Tensor:
        return self.scaling * self._source().vjp(u, self.examples, self.layer_collection)

    def size(self, dim: int | None = None) -> torch.Size | int:
        """(k, n, P), or one of them; the first two from a product, once."""
        p = self.layer_collection.numel()
        if "_outputs" not in self.__dict__:
            self._outputs = self._jvp(torch.zeros(p, dtype=self.dtype, device=self.device)).shape
        size = torch.Size((*self._outputs, p))
        return size if dim is None else size[axis("dim", dim, 3)]

    @property
    def dtype(self) -> torch.dtype:
        """That of the results."""
        return self._source().dtype

    @property
    def device(self) -> torch.device:
        """That of the results."""
        return self._source().device

    def _scaled(self, factor: float) -> Self:
        new = self._like(None, None)
        new.scaling = factor * self.scaling
        return new

    def _added(self, other: Self) -> NoReturn:
        raise NotImplementedError("Sums of implicit maps are not kept: add their products, or use PFMapDense.")
