"""Kronecker eigenbasis with exact second moments (George et al., 2018)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from torch import Tensor

from nngeo.generators.batches import Examples, NoBatches
from nngeo.layers.collection import LayerCollection
from nngeo.linalg.arguments import flag, shown
from nngeo.linalg.outer import Sharing
from nngeo.representations.block import Block, Statistic, Sums
from nngeo.representations.eigenblock import KroneckerEigenBlock
from nngeo.representations.finite import require_finite
from nngeo.representations.kfac import FactoredPMat

if TYPE_CHECKING:
    from typing_extensions import Self

    from nngeo.generators import Generator, LayerRecord


class EigenbasisPMat(FactoredPMat):
    """A layer-wise matrix of which some blocks may be KroneckerEigenBlocks."""

    updated = False  # whether the scalings are exact second moments
    _exact = False  # whether an estimate makes them so

    def __init__(
        self,
        layer_collection: LayerCollection,
        generator: Generator | None = None,
        data: Any = None,
        examples: Any = None,
        *,
        weight_sharing: Sharing = "expand",
        update_diag: bool = True,
    ):
        self._exact = flag("update_diag", update_diag)
        super().__init__(layer_collection, generator, data, examples, weight_sharing=weight_sharing)

    def _has_scalings(self) -> bool:
        """Whether there may be KroneckerEigenBlocks."""
        return True

    def _estimate(self, examples: Any) -> tuple[dict[str, Block], int]:
        exact = self._exact and self._has_scalings()
        if exact and isinstance(examples.source if isinstance(examples, Examples) else examples, Iterator):
            self._refuse("is an iterator")
        self.updated = False
        self.data, n = super()._estimate(examples)
        if exact and any(isinstance(block, KroneckerEigenBlock) for block in self.data.values()):
            try:
                found = self._second_pass(examples)
            except NoBatches:
                found = 0
            if found != n:
                self._refuse(f"gave {n} examples, and then {found}")
        return self.data, n

    def _refuse(self, what: str) -> NoReturn:
        raise ValueError(
            f"{type(self).__name__} reads the examples twice, for the eigenvectors and for the scalings along them, "
            f"but `loader` {what}. Give a DataLoader or a list of batches, list(loader); or update_diag=False, which "
            "leaves the scalings of KFAC."
        )

    def update_diag(self, examples: Any) -> None:
        """Set the scalings to the second moments of the gradients in the eigenbasis, which stays as it is.

        An estimate does it by itself, from its own examples, unless update_diag=False. After it, the trace
        is exact, and no other scalings come closer to the exact block (Frobenius norm). One sweep.
        """
        self.n_examples = self._second_pass(examples)

    def _second_pass(self, examples: Any) -> int:
        """Set the scalings, and return the number of examples."""
        sums = Sums()
        for batch in self._source().records(examples, self.layer_collection):
            sums.add(batch, lambda record, into: self.data[record.layer.name].second_moments(record))
        means = sums.means()
        require_finite(means, f"this {type(self).__name__}")
        self.data = {name: block.rescaled(*means[name]) for name, block in self.data.items()}
        self.updated = True
        return sums.n_examples

    def _estimated(self, examples: Any) -> Self:
        """From other examples; where the scalings were updated, those of the examples in the same eigenbasis."""
        if not self.updated:
            new = self._like(None, None)
            new._exact = False
            new.data, new.n_examples = new._estimate(examples)
            return new
        sums, records, options = Sums(), {}, self._options()

        def statistic(record: LayerRecord, into: Sequence[Tensor]) -> Statistic:
            records[record.layer.name] = record
            block = self.data[record.layer.name]
            return block.second_moments(record) or block.statistic(record, into, **options)

        for batch in self._source().records(examples, self.layer_collection):
            sums.add(batch, statistic)
        means = sums.means()
        require_finite(means, f"this {type(self).__name__}")
        data: dict[str, Block] = {}
        for name, block in self.data.items():
            if not means[name]:
                data[name] = block.empty()
            elif isinstance(block, KroneckerEigenBlock):
                data[name] = block.rescaled(*means[name])
            else:
                record = records[name]
                data[name] = block.from_means(record.layer, record.view, *means[name])
        return self._like(data, sums.n_examples)

    def _added(self, other: Self) -> Self:
        return self._both_updated(other, super()._added(other))

    def _pooled(self, other: Self, weight: float, other_weight: float) -> Self:
        return self._both_updated(other, super()._pooled(other, weight, other_weight))

    def _both_updated(self, other: Self, total: Self) -> Self:
        total.updated = self.updated and other.updated
        return total

    def _state(self) -> dict[str, Any]:
        return super()._state() | {"updated": self.updated}

    def _load(self, state: Mapping[str, Any], to: Any) -> dict[str, Block]:
        data = super()._load(state, to)
        if not isinstance(updated := state.get("updated", False), bool):
            raise ValueError(f"The state_dict is damaged: 'updated' is {shown(updated)}, not True or False.")
        self.updated = updated
        return data

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, updated={self.updated})"


class PMatEKFAC(EigenbasisPMat):
    """KFAC's eigenbasis for every layer that is a linear map, with the exact second moments of the gradients along it.

    The trace is exact. Estimating it reads the examples twice, as the scalings are found in the finished eigenbasis.
    Memory O(i^2 + o^2 + o i) a layer; products and solves O(o i (o + i)) a vector, exactly damped.

    Args:
        weight_sharing: see PMatKFAC; it chooses the basis. Updated scalings are exact in either.
        update_diag: without it there is no second pass, and the scalings are those of KFAC, so that shards can be
            pooled, until `update_diag(examples)` is called.

    Raises:
        ValueError: the examples can be read once only.

    >>> import torch
    >>> from nngeo.generators import JacobianGenerator
    >>> from nngeo.layers.collection import LayerCollection
    >>> from nngeo.variants import Exact, make_variant
    >>> model = torch.nn.Linear(2, 1)
    >>> layers = LayerCollection.from_model(model)
    >>> generator = JacobianGenerator(model, Exact(make_variant("regression")))
    >>> F = PMatEKFAC(layers, generator, examples=(torch.eye(2),))
    >>> F
    PMatEKFAC(3 parameters of 1 layer, 2 examples, torch.float32, cpu, updated=True)
    """

    block_type = KroneckerEigenBlock

    def get_eigendecomposition(self) -> tuple[dict[str, Tensor], dict[str, tuple[Tensor | None, Tensor]]]:
        """Eigenvalues {layer: (n, o, i)}, and the factors {layer: (ua, ug)} of the eigenvectors; None: the identity."""
        blocks = {name: block for name, block in self.data.items() if isinstance(block, KroneckerEigenBlock)}
        return {n: block.scalings.clone() for n, block in blocks.items()}, {n: (b.ua, b.ug) for n, b in blocks.items()}
