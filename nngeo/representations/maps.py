"""Maps between parameters and outputs: the Jacobian, stored or implicit."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nngeo.layers.collection import Layer, LayerCollection, checked_layers
from nngeo.linalg.arguments import axis, count, shown, tensor
from nngeo.representations.coordinates import coordinates, embed, restrict
from nngeo.representations.estimate import Estimate, check_kind
from nngeo.representations.fspace import FMatDense
from nngeo.representations.jacobians import jacobian_of
from nngeo.representations.memory import copied
from nngeo.vectors import FVector, PVector
from nngeo.vectors.differences import described
from nngeo.vectors.random import standard_normal

if TYPE_CHECKING:
    from typing_extensions import Self

    from nngeo.generators import BatchRecord


class PFMap(Estimate):
    """A linear map from parameters (P,) to outputs on examples (k, n)."""

    @abstractmethod
    def _jvp(self, v: Tensor) -> Tensor: ...

    @abstractmethod
    def _vjp(self, u: Tensor) -> Tensor: ...

    @abstractmethod
    def size(self, dim: int | None = None) -> torch.Size | int:
        """(k, n, P), or one of them."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """That of the results."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """That of the results."""

    def jvp(self, v: PVector) -> FVector:
        """`J v`, (k, n)."""
        if not isinstance(v, PVector):
            raise TypeError(f"jvp takes a PVector, got {type(v).__name__}.")
        flat, _ = coordinates(v, self.layer_collection)
        check_kind(flat, type(self).__name__, self.dtype, self.device)
        return FVector(self._jvp(flat))

    def vjp(self, u: FVector) -> PVector:
        """`J' u`, over the layers of the map."""
        if not isinstance(u, FVector):
            raise TypeError(f"vjp takes an FVector, got {type(u).__name__}.")
        if tuple(u.size()) != (size := tuple(self.size())[:2]):  # type: ignore[arg-type]
            raise ValueError(f"Expected an FVector {size}, got one of size {tuple(u.size())}.")
        check_kind(u.to_torch(), type(self).__name__, self.dtype, self.device)
        return PVector(self.layer_collection, vector_repr=self._vjp(u.to_torch()))

    def __matmul__(self, other: Any) -> Any:
        return self.jvp(other) if isinstance(other, PVector) else NotImplemented

    @property
    def T(self) -> Transpose:
        """The transpose: `J.T @ u` is `J.vjp(u)`."""
        return Transpose(self)

    def get_device(self) -> torch.device:
        """`device`, under its name in NNGeometry."""
        return self.device


@dataclass(frozen=True)
class Transpose:
    """The transpose of a map, for products with `@`."""

    T: PFMap

    def __matmul__(self, other: Any) -> Any:
        return self.T.vjp(other) if isinstance(other, FVector) else NotImplemented


class PFMapDense(PFMap):
    """The Jacobian, `data` (k, n, P).

    >>> import torch
    >>> from nngeo.layers.collection import LayerCollection
    >>> layers = LayerCollection.from_model(torch.nn.Linear(1, 1))
    >>> J = PFMapDense(layers, data=torch.tensor([[[1.0, 2.0], [0.0, 1.0]]]))
    >>> (J @ J.T).to_matrix()
    tensor([[5., 2.],
            [2., 1.]])
    """

    data: Tensor

    def _estimate(self, examples: Any) -> tuple[Tensor, int]:
        return jacobian_of(self, examples)

    def _checked(self, data: Any) -> Tensor:
        tensor("data", data, "(k, n, P)")
        p = self.layer_collection.numel()
        if data.ndim != 3 or data.shape[-1] != p:
            raise ValueError(f"`data` should be (k, n, {p}), is {tuple(data.shape)}.")
        return data

    @classmethod
    def from_dict(
        cls, layer_collection: LayerCollection, generator: Any, data_dict: Mapping[str, Sequence[Tensor]]
    ) -> Self:
        """From {layer name: (weight, bias)}, tensors (k, n, *shape) in the order of `Layer.shapes`."""
        checked_layers(layer_collection)
        if not isinstance(data_dict, Mapping) or set(data_dict) != set(layer_collection):
            found = ", ".join(map(str, data_dict)) if isinstance(data_dict, Mapping) else shown(data_dict)
            raise ValueError(
                f"`data_dict` should have the layers {', '.join(layer_collection)}; it has {found or 'none'}."
            )
        flat = {}
        for name, parts in data_dict.items():
            given = [tuple(tensor(name, x, "(k, n, *shape)").shape[2:]) for x in parts]
            if given != [tuple(shape) for shape in layer_collection[name].shapes.values()]:
                raise ValueError(
                    f"`data_dict` of layer {name!r} should be (k, n, *shape), {described(layer_collection[name])}."
                )
            flat[name] = torch.cat([part.flatten(2) for part in parts], -1)
        return cls(layer_collection, generator, data=layer_collection.join(flat))

    def _jvp(self, v: Tensor) -> Tensor:
        return self.data @ v

    def _vjp(self, u: Tensor) -> Tensor:
        return torch.einsum("kn,knp->p", u, self.data)

    def __matmul__(self, other: Any) -> Any:
        if isinstance(other, Transpose) and isinstance(other.T, PFMapDense):
            right = restrict(other.T.data, other.T.layer_collection, self.layer_collection, "PFMapDense")
            return FMatDense(self.layer_collection, data=torch.einsum("knp,lmp->knlm", self.data, right))
        return super().__matmul__(other)

    def to_torch(self) -> Tensor:
        """(k, n, P), a new tensor; `data` is the one that is there.

        Raises:
            MemoryError: the copy would not fit.
        """
        return copied(f"A copy of this {type(self).__name__}", self.data)

    def to_torch_layer(self, name: str) -> tuple[Tensor, ...]:
        """The tensors (k, n, *shape) of the parameters of one layer."""
        self.layer_collection[name]  # raises for another name
        part = self.layer_collection.split(self.data)[name]
        return tuple(self.layer_collection.split_layer(name, part).values())

    def iter_by_layer(self) -> Iterator[tuple[str, Layer, tuple[Tensor, ...]]]:
        """Name, layer and `to_torch_layer` of every layer."""
        for name, layer in self.layer_collection.layers.items():
            yield name, layer, self.to_torch_layer(name)

    def size(self, dim: int | None = None) -> torch.Size | int:
        """(k, n, P), or one of them."""
        return self.data.shape if dim is None else self.data.shape[axis("dim", dim, 3)]

    @property
    def dtype(self) -> torch.dtype:
        """That of the results."""
        return self.data.dtype

    @property
    def device(self) -> torch.device:
        """That of the results."""
        return self.data.device

    def _scaled(self, factor: float) -> Self:
        return self._like(factor * self.data, self.n_examples)

    def _added(self, other: Self) -> Self:
        if self.data.shape != other.data.shape:
            raise ValueError(f"Sum of maps {tuple(self.data.shape)} and {tuple(other.data.shape)}.")
        return self._like(self.data + other.data, self.n_examples)

    def __repr__(self) -> str:
        return f"PFMapDense({tuple(self.data.shape)}, {self.dtype}, {self.device})"


@coordinates.register(PFMapDense)
def _(x: PFMapDense, layers: LayerCollection) -> tuple[Tensor, Callable[[Tensor], PFMapDense]]:
    own = x.layer_collection
    flat = restrict(x.data, own, layers, "PFMapDense")
    return flat, lambda y: PFMapDense(own, x.generator, data=embed(y, layers, own))


@coordinates.register(Transpose)
def _(x: Transpose, layers: LayerCollection) -> tuple[Tensor, Callable[[Tensor], Transpose]]:
    flat, back = coordinates(x.T, layers)
    return flat, lambda y: Transpose(back(y))


def random_pfmap(
    layer_collection: LayerCollection,
    output_size: tuple[int, int],
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    generator: torch.Generator | None = None,
) -> PFMapDense:
    """A map (k, n, P) of standard normal numbers, for `output_size` (k, n)."""
    if not isinstance(output_size, Sequence) or len(output_size) != 2:
        raise TypeError(f"`output_size` should be two numbers (k, n); got {shown(output_size)}.")
    k, n = (count("output_size", size, least=0) for size in output_size)
    shape = (k, n, checked_layers(layer_collection).numel())
    return PFMapDense(layer_collection, data=standard_normal(shape, device, dtype, generator))


# Jacobians from records


def flat_jacobian(batch: BatchRecord, layers: LayerCollection) -> Tensor:
    """(k, b, P) of one mini-batch, or of a chunk of its cotangents."""
    return layers.join({name: record.jacobian() for name, record in batch.layers.items()})
