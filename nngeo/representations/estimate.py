"""What the matrices over parameters and outputs, and the maps between them, have in common."""

from __future__ import annotations

import copy
import pickle
from abc import ABC, abstractmethod
from collections.abc import Iterator
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nngeo.layers.collection import LayerCollection, checked_layers
from nngeo.linalg.arguments import number, shown
from nngeo.linalg.precision import FullPrecision

if TYPE_CHECKING:
    from typing_extensions import Self

    from nngeo.generators import BatchRecord, Generator


def checked_generator(value: Any) -> Generator | None:
    """What runs a model, or None.

    Raises:
        TypeError: it is neither.
    """
    if not (value is None or hasattr(value, "model")):
        raise TypeError(f"`generator` should be a Generator, which runs a model, or None; got {shown(value)}.")
    return value


class Estimate(FullPrecision, ABC):
    """Estimated by a generator from examples, or made of data; an element of a vector space.

    Copies share the generator. A pickle keeps it where it can be pickled; else what needs it says that it is gone.
    """

    n_examples: int | None = None  # seen by the estimate; None where there was none
    generator: Generator | None
    data: Any
    _weights: tuple[int, ...] | None = None  # versions of the parameters at the estimate

    __array_ufunc__ = None  # `array + matrix` is an error, not an array of matrices

    def __init__(
        self,
        layer_collection: LayerCollection,
        generator: Generator | None = None,
        data: Any = None,
        examples: Any = None,
    ):
        if (data is None) == (examples is None):
            raise ValueError(f"{type(self).__name__} takes exactly one of `data` and `examples`.")
        self.layer_collection, self.generator = checked_layers(layer_collection), checked_generator(generator)
        if data is None:
            self.data, self.n_examples = self._estimate(examples)
            self._weights = self._versions_of_weights()
        else:
            self.data = self._checked(data)

    @abstractmethod
    def _estimate(self, examples: Any) -> tuple[Any, int | None]:
        """Data, and the number of examples seen."""

    @abstractmethod
    def _scaled(self, factor: Any) -> Self:
        """A multiple, by a number or by a 0-d tensor with a gradient."""

    @abstractmethod
    def _added(self, other: Self) -> Self:
        """The sum with one of the same class and size."""

    def _checked(self, data: Any) -> Any:
        """The data that a user gave, in the form in which it is kept."""
        return data

    def _like(self, data: Any, n_examples: int | None) -> Self:
        """Other data with the same layers, generator and options."""
        new = copy.copy(self)
        new.__dict__.pop("_cache", None)
        new.data, new.n_examples = data, n_examples
        return new

    # Examples

    def _source(self) -> Generator:
        if self.generator is None:
            raise ValueError(
                f"This {type(self).__name__} has no generator to run the model with: it was made from data, or came "
                "from a pickle whose generator could not be pickled. Set `generator`, or estimate it anew."
            )
        return self.generator

    def _records(self, examples: Any, factors: bool = True) -> Iterator[BatchRecord] | None:
        """What the mini-batches left at the layers; None for a matrix without a square root (a Hessian).

        `factors` says whether the factors of linear maps are needed, or gradients do.
        """
        generator = self._source()
        try:
            return generator.records(examples, self.layer_collection, factors)
        except NotImplementedError:
            return None

    def _versions_of_weights(self) -> tuple[int, ...]:
        """What torch counts up when a parameter is changed in place."""
        parameters = self.layer_collection.parameters(self._source().model)
        return tuple(-1 if p.is_inference() else p._version for p in parameters)

    # Arithmetic

    def __mul__(self, factor: float | Tensor) -> Self:
        if isinstance(factor, Tensor) and factor.numel() == 1:
            # One with a gradient keeps it: multiples are differentiable in the factor.
            factor = factor.reshape(()) if factor.requires_grad else factor.item()
        if isinstance(factor, Tensor):
            if factor.ndim:
                return NotImplemented
            number("factor", factor)
            return self._scaled(factor)
        return self._scaled(number("factor", factor)) if isinstance(factor, Real) else NotImplemented

    __rmul__ = __mul__

    def __truediv__(self, factor: float | Tensor) -> Self:
        if not isinstance(factor, Real | Tensor) or (isinstance(factor, Tensor) and factor.numel() != 1):
            return NotImplemented
        if not number("divisor", factor):
            raise ValueError(f"A {type(self).__name__} can't be divided by 0.")
        return self * (1 / factor)

    def __neg__(self) -> Self:
        return self._scaled(-1.0)

    def __add__(self, other: Self) -> Self:
        self._check_term(other)
        return self._added(other)

    def __radd__(self, other: int) -> Self:
        return self if isinstance(other, int) and other == 0 else NotImplemented  # the start of sum([...])

    def __sub__(self, other: Self) -> Self:
        self._check_term(other)
        return self._added(other._scaled(-1.0))

    def _check_term(self, other: Any) -> None:
        if type(other) is not type(self):
            raise TypeError(
                f"A {type(self).__name__} can be added to another one only, not to a {type(other).__name__}: "
                "bring both to one representation (the tensors of `.to_torch()` always add)."
            )
        if other.layer_collection != self.layer_collection:
            raise ValueError(f"Sum over different layers: {self.layer_collection} and {other.layer_collection}.")

    def _joint_count(self, other: Estimate) -> int | None:
        counts = (self.n_examples, other.n_examples)
        return None if None in counts else sum(counts)  # type: ignore[arg-type]

    # Copies

    def __copy__(self) -> Self:
        new = object.__new__(type(self))
        new.__dict__.update(self.__dict__)
        return new

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        new = copy.copy(self)
        shared = {"generator", "examples", "layer_collection"}
        new.__dict__.update({k: copy.deepcopy(v, memo) for k, v in self.__dict__.items() if k not in shared})
        return new

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__ | {"_weights": None}  # which are counted anew after a pickle
        try:
            state["generator"] = pickle.dumps(self.generator)
        except Exception:  # pickle raises anything at all: a model may hold locks, lambdas, open files
            state["generator"] = pickle.dumps(None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.generator = pickle.loads(state["generator"])


def positive_count(n: int) -> int:
    """The number of examples, if there are any."""
    if not n:
        raise ValueError("`examples` holds no examples: the loader is empty, or was read to its end before.")
    return n


def kind(x: Tensor) -> str:
    """The dtype and device of a tensor, for messages."""
    return f"{x.dtype} on {x.device}"


def check_kind(x: Tensor, what: str, dtype: torch.dtype, device: torch.device) -> None:
    """Nothing, if the tensor has this dtype and device.

    Raises:
        ValueError: with the two kinds and the call that converts one into the other.
    """
    if x.dtype != dtype or x.device.type != device.type:
        argument = "dtype" if x.dtype != dtype else "device"
        raise ValueError(
            f"{what} is {dtype} on {device}, what it is applied to is {kind(x)}. Convert it: `v.to(F.{argument})`."
        )
