"""A symmetric matrix over the parameters of one layer: what a layer-wise representation is made of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from nngeo.layers.collection import Layer
from nngeo.linalg.arguments import shown, tensor
from nngeo.linalg.cache import Cache
from nngeo.linalg.matrixview import MatrixView
from nngeo.linalg.memory import require_memory
from nngeo.linalg.precision import FullPrecision
from nngeo.linalg.spectrum import Spectrum, logarithm, power
from nngeo.linalg.symmetric import rounding_of, spectral_norm
from nngeo.representations.estimate import positive_count

if TYPE_CHECKING:
    from typing_extensions import Self

    from nngeo.generators import BatchRecord, LayerRecord

Statistic = tuple[Tensor | None, ...]

BLOCKS: dict[str, type[Block]] = {}


@dataclass(frozen=True, eq=False)
class Block(FullPrecision, ABC):
    """A symmetric matrix over the p parameters of one layer; its operations act on the last axis of (..., p).

    Fields are tensors, and a MatrixView or None. What is derived from them is cached, and never part of the state.
    """

    axes: ClassVar[dict[str, str]] = {}  # {field: letters of its axes}: n, o, i of the view, j = i - 1, or any other
    takes_dense: ClassVar[bool] = False  # whether there is a `from_dense`
    _cache: Cache = field(default_factory=Cache, init=False, repr=False)

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        BLOCKS[cls.__name__] = cls

    # Estimation

    @staticmethod
    @abstractmethod
    def statistic(record: LayerRecord, into: Sequence[Tensor] = (), **options: Any) -> Statistic:
        """What one record adds to the sums, in tensors of its own; None where it adds nothing.

        It may add in place to the sums so far, `into`, and return these.

        A record holds some of the cotangents of a mini-batch: statistics of inputs alone count where `record.first`.
        """

    @classmethod
    @abstractmethod
    def from_means(cls, layer: Layer, view: MatrixView | None, *means: Tensor) -> Block:
        """From the sums divided by the number of examples."""

    @classmethod
    @abstractmethod
    def zeros(cls, layer: Layer, like: Tensor) -> Self:
        """The block of a layer that no example reached, of the dtype and device of a tensor."""

    @classmethod
    def from_dense(cls, layer: Layer, matrix: Tensor) -> Block:
        """The block that represents a matrix (p, p), as of a Hessian, which has no gradients of examples."""
        raise NotImplementedError(f"{cls.__name__} is made of gradients of examples, not of a dense matrix.")

    @classmethod
    def stored(cls, record: LayerRecord, **options: Any) -> int:
        """The number of entries to allocate, where it is large beside the layer's own."""
        return 0

    def second_moments(self, record: LayerRecord) -> Statistic:
        """What one record adds to scalings in the block's own eigenbasis; nothing for a block without one."""
        return ()

    def rescaled(self, *means: Tensor) -> Block:
        """The block with the means of `second_moments` as scalings."""
        return self

    # Algebra

    @abstractmethod
    def mv(self, v: Tensor) -> Tensor: ...

    @abstractmethod
    def solve(self, v: Tensor, regul: float) -> Tensor:
        """`(self + regul I)^-1 v`, exactly."""

    @abstractmethod
    def diag(self) -> Tensor:
        """(p,)."""

    @abstractmethod
    def eigenvalues(self) -> Tensor:
        """All p of them, in any shape and order."""

    @abstractmethod
    def scaled(self, factor: float | Tensor) -> Self: ...

    @abstractmethod
    def added(self, other: Self) -> Self: ...

    def added_exactly(self, other: Block) -> Block:
        """The sum, where `added` may be an approximation."""
        return self.added(other)

    def empty(self) -> Self:
        """Zero in the form of this block, as of no examples."""
        return self.scaled(0.0)

    def pooled(self, other: Self, weight: float, other_weight: float) -> Self:
        """The block of two sets of examples, whose sums are averaged with these weights."""
        return self.scaled(weight).added(other.scaled(other_weight))

    # Damping and functions: by a dense matrix, where the block does not know better

    def shifted(self, damping: Tensor) -> Block:
        """With damping, 0-d or (p,), added to the diagonal."""
        raise NotImplementedError(
            f"{type(self).__name__} has no damped form: give it a method `shifted`, solve with `regul`, or add the "
            "damping to another representation, as PMatBlockDiag."
        )

    def function(self, f: Callable[[Tensor], Tensor]) -> Block:
        """With f, which takes tensors of any shape, applied to the eigenvalues."""
        return self._as_dense().function(f)

    def spectrum(self) -> Spectrum:
        """All p eigenvalues, zero where rounding can't tell them from it, with the eigenbasis."""
        return self._as_dense().spectrum()

    def inverse(self) -> Block:
        """Raises ValueError for a singular block."""
        return self.function(partial(power, exponent=-1.0))

    def logdet(self) -> Tensor:
        """0-d; raises ValueError for a block that is not positive definite."""
        return logarithm(self.spectrum().values).sum()

    def apply(self, f: Callable[[Tensor], Tensor], v: Tensor) -> Tensor:
        """`function(f).mv(v)`, without the matrix."""
        spectrum = self.spectrum()
        return spectrum.back(spectrum.into(v) * f(spectrum.values))

    def _as_dense(self) -> Block:
        like = self.diag()
        instead = "Use a 0-d damping for each layer: it keeps the structure of Kronecker factors."
        require_memory(f"The dense form of a {type(self).__name__}", len(like) ** 2, like.dtype, like.device, instead)
        return BLOCKS["DenseBlock"](self.to_torch())  # type: ignore[call-arg]

    def numel(self) -> int:
        """p."""
        return len(self.diag())

    def trace(self) -> Tensor:
        """0-d."""
        return self.diag().sum()

    def norm(self, ord: str | int) -> Tensor:
        """0-d; "fro", 2 or -2."""
        return spectral_norm(self.eigenvalues(), ord)

    def rounding(self) -> float:
        """See `rounding_of`; 0 where entries are solved."""
        return rounding_of(self.norm("fro"))

    def to_torch(self) -> Tensor:
        """(p, p), a new tensor."""
        diag = self.diag()
        return self.mv(torch.eye(len(diag), dtype=diag.dtype, device=diag.device))

    def solvers(self) -> dict[str, Callable[[Tensor, float], Tensor]]:
        """Ways to solve beside the default one, by name."""
        return {}

    # State

    def tensors(self) -> dict[str, Tensor | list[int | bool] | None]:
        """The fields as plain values."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.init}
        return {name: list(vars(v).values()) if isinstance(v, MatrixView) else v for name, v in values.items()}

    def symmetric_parts(self) -> tuple[Tensor, ...]:
        """The fields that are symmetric matrices (..., m, m)."""
        return ()

    @classmethod
    def picked(cls, state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
        """The values of `tensors` from a state in which their names have a prefix."""
        keys = [f.name for f in fields(cls) if f.init]
        if missing := [key for key in keys if prefix + key not in state]:
            raise ValueError(f"it has no {', '.join(missing)}")
        return {key: state[prefix + key] for key in keys}

    @classmethod
    def from_tensors(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `tensors`.

        Raises:
            ValueError, TypeError: a tensor has other axes than it should have, or is not of floating-point numbers.
        """
        views = {name: MatrixView(*v) for name, v in values.items() if isinstance(v, list)}
        sizes = {letter: size for view in views.values() for letter, size in zip("noi", view.shape, strict=True)}
        sizes |= {"j": sizes["i"] - 1} if sizes else {}
        for name, forms in cls.axes.items():
            x = values[name]
            if x is not None and not any(_fits(tensor(name, x, forms).shape, form, sizes) for form in forms.split("|")):
                raise ValueError(f"{name!r} is {shown(x)}, and should be ({forms}) with {sizes}")
        return cls(**(dict(values) | views))


def _fits(shape: Sequence[int], letters: str, sizes: Mapping[str, int]) -> bool:
    """Whether axes with the same letter have the same size, that of the letter where it is known."""
    found = dict(sizes)
    return len(shape) == len(letters) and all(found.setdefault(x, n) == n for x, n in zip(letters, shape, strict=True))


@dataclass
class Sums:
    """Sums over mini-batches of the statistics of every layer, and the number of examples they are of."""

    by_layer: dict[str, list[Tensor]] = field(default_factory=dict)
    n_examples: int = 0

    def add(self, batch: BatchRecord, statistic: Callable[[LayerRecord, Sequence[Tensor]], Statistic]) -> None:
        """Add one mini-batch, or the next chunk of its cotangents. Layers that it did not use add nothing."""
        self.n_examples += batch.n_examples if batch.first else 0
        for name, record in batch.layers.items():
            sums = self.by_layer.setdefault(name, [])
            terms = statistic(record, sums) if record.parts else ()
            if sums:
                for total, term in zip(sums, terms, strict=False):
                    if term is not None and term is not total:
                        total += term
            else:
                sums.extend(terms)  # type: ignore[arg-type]  # the first chunk of a mini-batch has all

    def means(self) -> dict[str, list[Tensor]]:
        """The sums divided by the number of examples, in their own memory."""
        n = positive_count(self.n_examples)
        return {name: [total.div_(n) for total in sums] for name, sums in self.by_layer.items()}
