"""Matrices that are block diagonal by layer: the loop over mini-batches and layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nngeo.layers.collection import Layer
from nngeo.linalg.outer import MatrixView
from nngeo.linalg.symmetric import spectral_norm
from nngeo.representations.base import PMat, entry
from nngeo.representations.block import BLOCKS, Block, Sums

if TYPE_CHECKING:
    from typing_extensions import Self


class LayerwisePMat(PMat):
    """A matrix that is zero between layers, with one Block for each: `data` is {layer name: Block}.

    A representation names its `block_type`; or chooses one for each layer.
    """

    block_type: type[Block]
    data: dict[str, Block]

    def block_type_for(self, layer: Layer, view: MatrixView | None) -> type[Block]:
        """The type of a layer's block; `view` is None where the layer has no Kronecker factors."""
        return self.block_type

    def _options(self) -> dict[str, Any]:
        """Keyword arguments for the blocks' `statistic`."""
        return {}

    # Estimation

    def _estimate(self, examples: Any) -> tuple[dict[str, Block], int]:
        batches = self._records(examples)
        if batches is None:
            return self._from_diagonal_blocks(examples)
        layers, sums, options = self.layer_collection, Sums(), self._options()
        kinds: dict[str, tuple[type[Block], MatrixView | None]] = {}
        for batch in batches:
            for name, record in batch.layers.items():
                if record.parts and name not in kinds:
                    kinds[name] = self.block_type_for(record.layer, record.view), record.view
                like = record.like
            if batch.first and not sums.n_examples:
                stored = sum(kind.stored(batch.layers[name], **options) for name, (kind, _) in kinds.items())
                self._require_memory(f"The blocks of {type(self).__name__}", stored, like.dtype, like.device)
            sums.add(batch, lambda record: kinds[record.layer.name][0].statistic(record, **options))
        means, data = sums.means(), {}
        for name, layer in layers.layers.items():
            kind, view = kinds.get(name) or (self.block_type_for(layer, None), None)
            data[name] = kind.from_means(layer, view, *means[name]) if name in kinds else kind.zeros(layer, like)
        return data, sums.n_examples

    def _from_diagonal_blocks(self, examples: Any) -> tuple[dict[str, Block], int]:
        layers = self.layer_collection.layers
        kinds = {name: self.block_type_for(layer, None) for name, layer in layers.items()}
        for name, kind in kinds.items():
            if not kind.takes_dense:
                raise NotImplementedError(
                    f"{type(self).__name__} is made of gradients of examples (layer {name!r}), which a Hessian does "
                    "not have. Use PMatDiag, PMatBlockDiag, PMatDense or PMatImplicit for it."
                )
        dense, n = self._source().diagonal_blocks(examples, self.layer_collection)
        return {name: kinds[name].from_dense(layers[name], dense[name]) for name in layers}, n

    def _checked(self, data: Any) -> dict[str, Block]:
        layers = self.layer_collection
        if set(data) != set(layers):
            raise ValueError(f"`data` should have the layers {', '.join(layers)}; it has {', '.join(data)}.")
        for name, block in data.items():
            if not isinstance(block, Block):
                raise TypeError(f"`data` of layer {name!r} should be a Block, is a {type(block).__name__}.")
            if (p := len(block.diag())) != layers[name].numel():
                raise ValueError(f"The block of layer {name!r} is over {p} parameters, not {layers[name].numel()}.")
        return {name: data[name] for name in layers}

    # Algebra

    def _each(self, apply: Callable[[Block, Tensor], Tensor], v: Tensor) -> Tensor:
        parts = self.layer_collection.split(v)
        return torch.cat([apply(block, parts[name]) for name, block in self.data.items()], -1)

    def _mv(self, v: Tensor) -> Tensor:
        return self._each(lambda block, part: block.mv(part), v)

    def _solve(self, v: Tensor, regul: float) -> Tensor:
        return self._each(lambda block, part: block.solve(part, regul), v)

    def _solvers(self) -> dict[str, Callable[..., Tensor]]:
        names = {name for block in self.data.values() for name in block.solvers()}

        def solver(name: str) -> Callable[..., Tensor]:
            def solve(v: Tensor, regul: float) -> Tensor:
                return self._each(lambda block, part: block.solvers().get(name, block.solve)(part, regul), v)

            return solve

        return super()._solvers() | {name: solver(name) for name in sorted(names)}

    def get_diag(self) -> Tensor:
        """(P,), the diagonal."""
        return torch.cat([block.diag() for block in self.data.values()])

    def trace(self) -> Tensor:
        """The trace, 0-d."""
        return torch.stack([block.trace() for block in self.data.values()]).sum()

    def _norm(self, ord: str | int) -> Tensor:
        return spectral_norm(torch.stack([block.norm(ord) for block in self.data.values()]), ord)

    def _dense(self) -> Tensor:
        return torch.block_diag(*[block.to_torch() for block in self.data.values()])

    def _scaled(self, factor: float) -> Self:
        return self._like({name: block.scaled(factor) for name, block in self.data.items()}, self.n_examples)

    def _added(self, other: Self) -> Self:
        for name, block in self.data.items():
            if type(block) is not type(other.data[name]):
                kinds = f"{type(block).__name__} and {type(other.data[name]).__name__}"
                raise NotImplementedError(f"Layer {name!r} has different blocks in the two terms: {kinds}.")
        blocks = {name: block.added(other.data[name]) for name, block in self.data.items()}
        return self._like(blocks, self._joint_count(other))

    # State

    @property
    def _sample(self) -> Tensor:
        block = next(iter(self.data.values()))
        return next(value for value in block.tensors().values() if isinstance(value, Tensor))

    def _state(self) -> dict[str, Any]:
        state: dict[str, Any] = {"blocks": {name: type(block).__name__ for name, block in self.data.items()}}
        for name, block in self.data.items():
            state |= {f"{name}/{key}": value for key, value in block.tensors().items()}
        return state

    def _load(self, state: Mapping[str, Any], to: Callable[[Tensor], Tensor]) -> dict[str, Block]:
        data = {}
        for name, kind in entry(state, "blocks").items():
            keys = [f.name for f in fields(BLOCKS[kind]) if f.init]
            if missing := [key for key in keys if f"{name}/{key}" not in state]:
                raise ValueError(f"The state_dict of layer {name!r} is incomplete: it has no {', '.join(missing)}.")
            values = {key: state[f"{name}/{key}"] for key in keys}
            values = {key: to(value) if isinstance(value, Tensor) else value for key, value in values.items()}
            try:
                data[name] = BLOCKS[kind].from_tensors(values)
                data[name].diag()
            except (AttributeError, RuntimeError, TypeError) as error:
                raise ValueError(f"The state_dict of layer {name!r} is incomplete or damaged: {error}") from error
        return self._checked(data)
