"""Matrices that are block diagonal by layer: the loop over mini-batches and layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nngeo.layers.collection import Layer
from nngeo.linalg.arguments import shown, tensor
from nngeo.linalg.matrixview import MatrixView
from nngeo.linalg.spectrum import Spectrum
from nngeo.linalg.symmetric import require_symmetric, spectral_norm
from nngeo.representations.base import MATRICES, PMat, entry
from nngeo.representations.block import BLOCKS, Block, Sums
from nngeo.representations.damping import Damping
from nngeo.representations.finite import require_finite

if TYPE_CHECKING:
    from typing_extensions import Self


# What wrong or missing tensors of a block raise.
DAMAGES = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError, ZeroDivisionError)

HOLDERS: dict[type[Block], type[LayerwisePMat]] = {}  # the class that is made of each type of block


@contextmanager
def named(name: str) -> Iterator[None]:
    """Errors about values inside name the layer."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"Layer {name!r}: {error}") from error


class LayerwisePMat(PMat):
    """A matrix that is zero between layers, with one Block for each: `data` is {layer name: Block}.

    A representation names its `block_type`; or chooses one for each layer.
    """

    block_type: type[Block]
    data: dict[str, Block]

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if "block_type" in cls.__dict__:
            HOLDERS[cls.block_type] = cls

    def block_type_for(self, layer: Layer, view: MatrixView | None) -> type[Block]:
        """The type of a layer's block; `view` is None where the layer has no Kronecker factors."""
        return self.block_type

    @property
    def _needs_factors(self) -> bool:
        """Whether blocks are made of the factors of linear maps, rather than of gradients."""
        return not getattr(self, "block_type", Block).takes_dense

    def _options(self) -> dict[str, Any]:
        """Keyword arguments for the blocks' `statistic`."""
        return {}

    # Estimation

    def _estimate(self, examples: Any) -> tuple[dict[str, Block], int]:
        batches = self._records(examples, factors=self._needs_factors)
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
            sums.add(batch, lambda record, into: kinds[record.layer.name][0].statistic(record, into, **options))
            del batch, record  # so that their memory serves the next
        means, data = sums.means(), {}
        require_finite(means, f"this {type(self).__name__}")
        for name, layer in layers.layers.items():
            kind, view = kinds.get(name) or (self.block_type_for(layer, None), None)
            with named(name):
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
        require_finite({name: [block] for name, block in dense.items()}, f"this {type(self).__name__}")
        return {name: kinds[name].from_dense(layers[name], dense[name]) for name in layers}, n

    def _checked(self, data: Any) -> dict[str, Block]:
        layers = self.layer_collection
        if not isinstance(data, Mapping):
            raise TypeError(f"`data` should be a dict of blocks, {{layer name: Block}}; it is {shown(data)}.")
        if set(data) != set(layers):
            raise ValueError(f"`data` should have the layers {', '.join(layers)}; it has {', '.join(map(str, data))}.")
        for name, block in data.items():
            if not isinstance(block, Block):
                raise TypeError(f"`data` of layer {name!r} should be a Block, is {shown(block)}.")
            if not isinstance(block, allowed := self._block_types()):
                raise ValueError(
                    f"{type(self).__name__} is made of {', '.join(kind.__name__ for kind in allowed)}; the block of "
                    f"layer {name!r} is a {type(block).__name__}. PMatMixed takes any."
                )
            if (p := block.numel()) != layers[name].numel():
                raise ValueError(f"The block of layer {name!r} is over {p} parameters, not {layers[name].numel()}.")
            for matrices in block.symmetric_parts():
                require_symmetric(matrices, f"A matrix of the block of layer {name!r}")
        return {name: data[name] for name in layers}

    def _block_types(self) -> tuple[type[Block], ...]:
        """The types that blocks may have."""
        return (getattr(self, "block_type", Block),)  # a subclass that chooses for each layer may have none

    # Algebra

    def _each(self, apply: Callable[[Block, Tensor], Tensor], v: Tensor) -> Tensor:
        parts = self.layer_collection.split(v)
        return torch.cat(list(self._by_layer(lambda name, block: apply(block, parts[name])).values()), -1)

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

    def _diag(self) -> Tensor:
        return torch.cat([block.diag() for block in self.data.values()])

    def trace(self) -> Tensor:
        """The trace, 0-d."""
        return torch.stack([block.trace() for block in self.data.values()]).sum()

    def _norm(self, ord: str | int) -> Tensor:
        return spectral_norm(torch.stack(list(self._by_layer(lambda name, block: block.norm(ord)).values())), ord)

    def _resolution(self) -> float:
        return max(block.rounding() for block in self.data.values())

    def _dense(self) -> Tensor:
        return torch.block_diag(*[block.to_torch() for block in self.data.values()])

    # Damping and functions, block by block

    def _of(self, make: Callable[[str, Block], Any]) -> LayerwisePMat:
        """The matrix of other blocks, `make(name, block)`: of the class that is made of such blocks."""
        blocks = self._by_layer(make)
        if all(type(blocks[name]) is type(block) for name, block in self.data.items()):
            return self._derived(blocks)
        kinds = {type(block) for block in blocks.values()}
        kind = HOLDERS[kinds.pop()] if len(kinds) == 1 and kinds <= set(HOLDERS) else MATRICES["PMatMixed"]
        return kind(self.layer_collection, data=blocks)  # type: ignore[return-value]

    def _by_layer(self, make: Callable[[str, Block], Any]) -> dict[str, Any]:
        """What `make` returns for each layer; its errors name the layer."""
        found = {}
        for name, block in self.data.items():
            with named(name):
                found[name] = make(name, block)
        return found

    def _shifted(self, damping: Damping) -> LayerwisePMat:
        parts = damping.by_layer()
        return self._of(lambda name, block: block.shifted(parts[name]))

    def _function(self, f: Callable[[Tensor], Tensor]) -> LayerwisePMat:
        return self._of(lambda name, block: block.function(f))

    def _inverse(self) -> LayerwisePMat:
        return self._of(lambda name, block: block.inverse())

    def _logdet(self) -> Tensor:
        return torch.stack(list(self._by_layer(lambda name, block: block.logdet()).values())).sum()

    def _draws(self, normal: Callable[[int], Tensor], f: Callable[[Tensor], Tensor]) -> Tensor:
        parts = self.layer_collection.split(normal(self.layer_collection.numel()))
        return torch.cat(list(self._by_layer(lambda name, block: block.apply(f, parts[name])).values()), -1)

    def _spectrum(self) -> Spectrum:
        spectra = self._by_layer(lambda name, block: block.spectrum())
        split = self.layer_collection.split
        return Spectrum(
            torch.cat([spectrum.values for spectrum in spectra.values()]),
            lambda v: torch.cat([spectra[name].into(part) for name, part in split(v).items()], -1),
            lambda c: torch.cat([spectra[name].back(part) for name, part in split(c).items()], -1),
        )

    def _scaled(self, factor: float | Tensor) -> Self:
        return self._like({name: block.scaled(factor) for name, block in self.data.items()}, self.n_examples)

    def _joined(self, other: LayerwisePMat, join: Callable[[Block, Block], Block]) -> dict[str, Block]:
        """`join` of the blocks of each layer; where they are of two types, of which one is zero, of the other alone."""
        blocks = {}
        for name, block in self.data.items():
            term = other.data[name]
            kinds = f"{type(block).__name__} and {type(term).__name__}"
            if type(block) is not type(term):
                # A layer that no example reached has a block of a type that does not fit, and is zero.
                used = [x for x in (block, term) if bool(x.diag().any())]
                if len(used) > 1:
                    raise NotImplementedError(f"Layer {name!r} has different blocks in the two terms: {kinds}.")
                block, term = (block, block.empty()) if used[:1] != [term] else (term.empty(), term)
            blocks[name] = join(block, term)
        return blocks

    def _added(self, other: Self) -> Self:
        blocks = self._joined(other, lambda block, term: block.added(term))
        return self._like(blocks, self._joint_count(other))

    def _pooled(self, other: Self, weight: float, other_weight: float) -> Self:
        blocks = self._joined(other, lambda block, term: block.pooled(term, weight, other_weight))
        return self._like(blocks, self._joint_count(other))

    def _added_exactly(self, other: Any) -> LayerwisePMat:
        if not isinstance(other, LayerwisePMat) or other.layer_collection != self.layer_collection:
            self._check_term(other)
        new = self._of(lambda name, block: block.added_exactly(other.data[name]))
        new.n_examples = self._joint_count(other)
        return new

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
        data, kinds = {}, entry(state, "blocks")
        if not isinstance(kinds, Mapping):
            raise ValueError(f"The state_dict is damaged: 'blocks' is {shown(kinds)}, not a dict of names.")
        for name, kind in kinds.items():
            try:
                values = BLOCKS[kind].picked(state, f"{name}/")
                values = {key: to(value) if isinstance(value, Tensor) else value for key, value in values.items()}
                data[name] = BLOCKS[kind].from_tensors(values)
                data[name].mv(tensor("the diagonal", data[name].diag(), "(p,)", ndim=1))
            except DAMAGES as error:
                raise ValueError(f"The state_dict of layer {name!r} is incomplete or damaged: {error}") from error
        return self._checked(data)
