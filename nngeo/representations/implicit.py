"""Products with a matrix that is never formed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from nngeo.generators.batches import Examples
from nngeo.layers.collection import Layer, LayerCollection
from nngeo.representations.base import PMat
from nngeo.representations.estimate import positive_count
from nngeo.representations.solvers import cg, symmetric_map

if TYPE_CHECKING:
    from typing_extensions import Self

    from nngeo.generators import Generator

SMALL = 4096  # parameters up to which a norm may form the matrix


class PMatImplicit(PMat):
    """Products by running the model on the examples again, each time: memory O(P), a sweep for each `mv`.

    `solve` is by conjugate gradients, a sweep an iteration; its options are those of `solvers.cg`. It holds no data:
    only the generator and the examples, which must be the same at every sweep. One-shot iterators are kept as a list.

    >>> import torch
    >>> from nngeo.generators import JacobianGenerator
    >>> from nngeo.layers.collection import LayerCollection
    >>> from nngeo.variants import Exact, make_variant
    >>> model = torch.nn.Linear(2, 1)
    >>> layers = LayerCollection.from_model(model)
    >>> generator = JacobianGenerator(model, Exact(make_variant("regression")))
    >>> F = PMatImplicit(layers, generator, examples=(torch.eye(2),))
    >>> F.mv(torch.tensor([1.0, 0.0, 0.0]))
    tensor([0.5000, 0.0000, 0.5000])
    """

    def __init__(
        self,
        layer_collection: LayerCollection,
        generator: Generator | None = None,
        data: Any = None,
        examples: Any = None,
    ):
        if data is not None:
            raise ValueError("PMatImplicit holds no data: give `generator` and `examples`.")
        self.examples = None if examples is None else Examples.kept(examples)
        self.scaling = 1.0
        super().__init__(layer_collection, generator, examples=self.examples)

    def _estimate(self, examples: Any) -> tuple[None, None]:
        self._source()
        return None, None

    @property
    def dtype(self) -> torch.dtype:
        """That of the results."""
        return self._source().dtype

    @property
    def device(self) -> torch.device:
        """That of the results."""
        return self._source().device

    def _product(self, v: Tensor) -> Tensor:
        """One sweep for each row of v (..., P)."""
        rows = [
            self._source().mv(row, self.examples, self.layer_collection) for row in v.detach().reshape(-1, v.shape[-1])
        ]
        return self.scaling * torch.stack(rows).reshape(v.shape)

    def _mv(self, v: Tensor) -> Tensor:
        return symmetric_map(v, self._product) if v.numel() else v.clone()

    def _solve(self, v: Tensor, regul: float, **options: Any) -> Tensor:
        return cg(self, v, regul, **options)

    def _dense(self) -> Tensor:
        return self.scaling * self._source().dense(self.examples, self.layer_collection)[0]

    def get_diag(self) -> Tensor:
        """(P,), in one sweep, from the squares of gradients; layer by layer from dense blocks if there are none."""
        layers = self.layer_collection
        batches = self._records(self.examples)
        if batches is None:
            return self.scaling * torch.cat([self._dense_block(layer).diagonal() for layer in layers.layers.values()])
        total, n = torch.zeros(layers.numel(), dtype=self.dtype, device=self.device), 0
        for batch in batches:
            total += layers.join({name: record.squares() for name, record in batch.layers.items()})
            n += batch.n_examples if batch.first else 0
        return total.mul_(self.scaling / positive_count(n))

    def _dense_block(self, layer: Layer) -> Tensor:
        self._require_memory(f"The block of layer {layer.name!r}", layer.numel() ** 2, self.dtype, self.device)
        return self._source().dense(self.examples, LayerCollection([layer]))[0]

    def _norm(self, ord: str | int) -> Tensor:
        p = self.layer_collection.numel()
        if ord != "fro" or p > SMALL:
            raise NotImplementedError(
                f"norm({ord!r}) of a PMatImplicit over {p} parameters: only the Frobenius norm, and only up to {SMALL} "
                "parameters, where it forms the matrix. Use another representation, or `to_torch()`."
            )
        return self.to_torch().norm()

    def _scaled(self, factor: float) -> Self:
        new = self._like(None, None)
        new.scaling = factor * self.scaling
        return new

    def _added(self, other: Self) -> NoReturn:
        raise NotImplementedError(
            "A sum of implicit matrices would be over two sets of examples. Add the products: `F1.mv(v) + F2.mv(v)`."
        )

    def _state(self) -> NoReturn:
        raise NotImplementedError("A PMatImplicit holds no data to save: keep the model and the examples.")

    def load_state_dict(self, state: Any) -> NoReturn:
        """Not defined: there are no data."""
        self._state()
