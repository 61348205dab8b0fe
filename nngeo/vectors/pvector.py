"""Vectors over the parameters of a network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from nngeo.layers.collection import LayerCollection, checked_layers, layers_of
from nngeo.linalg.arguments import UnknownName, choice, instance, shown, tensor
from nngeo.vectors.arithmetic import Arithmetic
from nngeo.vectors.differences import described, differences, listed

ByLayer = dict[str, tuple[Tensor, ...]]


class PVector(Arithmetic):
    """A vector over the parameters of a LayerCollection: flat (P,), or one tensor for each parameter.

    It stays in the representation it is given, keeps the graph of its tensors, and never copies them unless it must.

    Args:
        vector_repr: (P,), in the order of the collection.
        dict_repr: {layer name: (weight, bias)}, tensors in the order and shapes of `Layer.shapes`.

    >>> model = nn.Linear(2, 1)
    >>> w = PVector.from_model(model)
    >>> step = w - 0.1 * w
    >>> step.to_torch().shape, step.to_torch().requires_grad
    (torch.Size([3]), True)
    >>> w
    PVector(3 coordinates of 1 layer, by parameter, torch.float32, cpu)
    """

    def __init__(
        self,
        layer_collection: LayerCollection,
        vector_repr: Tensor | None = None,
        dict_repr: Mapping[str, Sequence[Tensor]] | None = None,
    ):
        if (vector_repr is None) == (dict_repr is None):
            raise ValueError("Give exactly one of `vector_repr` and `dict_repr`.")
        checked_layers(layer_collection)
        if vector_repr is not None and tensor("vector_repr", vector_repr, "(P,)", real=False).shape != (
            layer_collection.numel(),
        ):
            raise ValueError(
                f"`vector_repr` must have shape ({layer_collection.numel()},), the size of the LayerCollection; "
                f"found {tuple(vector_repr.shape)}."
            )
        self.layer_collection = layer_collection
        self.vector_repr = vector_repr
        self.dict_repr: ByLayer | None = None if dict_repr is None else _checked(layer_collection, dict_repr)

    @classmethod
    def from_model(cls, model: nn.Module, layer_collection: LayerCollection | None = None) -> PVector:
        """The parameters themselves, not copies: differentiable, and changed by in-place arithmetic."""
        layers = layers_of(model, layer_collection)
        return cls.from_dict(layers, dict(layers.named_parameters(model)))

    @classmethod
    def from_model_grad(
        cls,
        model: nn.Module,
        layer_collection: LayerCollection | None = None,
        *,
        missing: Literal["error", "zero"] = "error",
    ) -> PVector:
        """The `.grad` of the parameters, not copies.

        A parameter without one is an error, or zero if `missing="zero"` (for what the outputs do not depend on).
        """
        choice("missing", missing, ("error", "zero"))
        layers = layers_of(model, layer_collection)
        parameters = dict(layers.named_parameters(model))
        without = [name for name, parameter in parameters.items() if parameter.grad is None]
        if without and missing == "error":
            raise ValueError(
                f"No gradient for {listed(without)}: call backward() first, or pass missing='zero' for zeros where "
                "the outputs do not depend on a parameter."
            )
        grads = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in parameters.items()}
        return cls.from_dict(layers, {name: g.to_dense() if g.is_sparse else g for name, g in grads.items()})

    @classmethod
    def from_dict(
        cls, layer_collection: LayerCollection, tensors: Mapping[str, Sequence[Tensor]] | Mapping[str, Tensor]
    ) -> PVector:
        """From {layer name: (weight, bias)}, as in `to_dict`, or {full parameter name: tensor}, as in a state dict."""
        checked_layers(layer_collection)
        if not isinstance(tensors, Mapping):
            raise TypeError(f"`tensors` should be a dict of tensors; got {shown(tensors)}.")
        named = {name: value for name, value in tensors.items() if isinstance(value, Tensor)}
        by_layer = {name: value for name, value in tensors.items() if not isinstance(value, Tensor)}
        if named and by_layer:
            raise ValueError("`tensors` must have layer names or parameter names as its keys, not both.")
        if not named:
            return cls(layer_collection, dict_repr=by_layer)
        names = layer_collection.names
        missing, unknown = [n for n in names if n not in named], [n for n in named if n not in names]
        if missing or unknown:
            raise ValueError(
                f"`tensors` does not fit the LayerCollection: {listed(missing)} missing, {listed(unknown)} unknown. "
                "A state dict holds buffers, too: take dict(model.named_parameters())."
            )
        layers = layer_collection.layers.items()
        return cls(
            layer_collection,
            dict_repr={name: tuple(named[layer.full_name(local)] for local in layer.shapes) for name, layer in layers},
        )

    def to_model(self, model: nn.Module) -> None:
        """Copy the coordinates into the model's parameters, in place."""
        with torch.no_grad():
            for (_, x), parameter in zip(self, self.layer_collection.parameters(model), strict=True):
                parameter.copy_(x)

    copy_to_model = to_model

    def add_to_model(self, model: nn.Module) -> None:
        """Add the coordinates to the model's parameters, in place."""
        with torch.no_grad():
            for (_, x), parameter in zip(self, self.layer_collection.parameters(model), strict=True):
                parameter.add_(x.to(parameter))

    def to_torch(self) -> Tensor:
        """(P,), in the order of the collection."""
        return torch.cat([x.flatten() for x in self._tensors()]) if self.vector_repr is None else self.vector_repr

    def to_torch_layer(self, name: str) -> Tensor:
        """(p,): the coordinates of one layer."""
        self.layer_collection[name]  # raises for another name
        if self.dict_repr is not None:
            return torch.cat([x.flatten() for x in self.dict_repr[name]])
        return self.layer_collection.split(self.to_torch())[name]

    def to_dict(self) -> ByLayer:
        """{layer name: (weight, bias)}; views, if the vector is flat."""
        if self.dict_repr is not None:
            return dict(self.dict_repr)
        parts = self.layer_collection.split(self.to_torch())
        return {name: tuple(self.layer_collection.split_layer(name, part).values()) for name, part in parts.items()}

    def size(self) -> torch.Size:
        """(P,), as a tensor's."""
        return torch.Size([self.layer_collection.numel()])

    def restrict(self, layer_collection: LayerCollection) -> PVector:
        """The coordinates of some of the layers, in the order of their collection."""
        if checked_layers(layer_collection) == self.layer_collection:
            return self
        if not self.layer_collection.covers(layer_collection):
            raise ValueError(
                "A PVector can only be restricted to layers that it has: "
                + differences(self.layer_collection, layer_collection, "the PVector", "the collection")
            )
        if self.dict_repr is not None:
            return PVector(layer_collection, dict_repr={name: self.dict_repr[name] for name in layer_collection})
        return PVector(layer_collection, layer_collection.join(self.layer_collection.split(self.to_torch())))

    def embed(self, layer_collection: LayerCollection) -> PVector:
        """The vector over a larger collection, zero on the layers that it does not have."""
        if checked_layers(layer_collection) == self.layer_collection:
            return self
        if not layer_collection.covers(self.layer_collection):
            raise ValueError(
                "A PVector can only be embedded in a collection that has all of its layers: "
                + differences(self.layer_collection, layer_collection, "the PVector", "the collection")
            )
        tensors = self.to_dict()
        for name, layer in layer_collection.layers.items():
            if name not in tensors:
                zeros = (torch.zeros(shape, dtype=self.dtype, device=self.device) for shape in layer.shapes.values())
                tensors[name] = tuple(zeros)
        embedded = PVector(layer_collection, dict_repr=tensors)
        return embedded if self.vector_repr is None else PVector(layer_collection, embedded.to_torch())

    def __getitem__(self, name: str) -> Tensor | tuple[Tensor, ...]:
        """The tensors of a layer, as in `to_dict`, or the tensor of a parameter by its full name."""
        instance("name", name, str)
        by_layer, by_name = self.to_dict(), dict(self)
        if name not in by_layer and name not in by_name:
            raise self._unknown(name)
        return by_layer[name] if name in by_layer else by_name[name]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Full parameter names and tensors, in order."""
        tensors = (x for layer in self.to_dict().values() for x in layer)
        return zip(self.layer_collection.names, tensors, strict=True)

    def __repr__(self) -> str:
        layers, how = len(self.layer_collection), "by parameter" if self.vector_repr is None else "flat"
        return (
            f"PVector({self.layer_collection.numel()} coordinates of {layers} layer{'s'[: layers != 1]}, {how}, "
            f"{self.dtype}, {self.device})"
        )

    def _unknown(self, name: str) -> UnknownName:
        return UnknownName(f"No layer or parameter {name!r}; the layers are {listed(self.layer_collection)}.")

    def _tensors(self) -> list[Tensor]:
        if self.dict_repr is None:
            return [] if self.vector_repr is None else [self.vector_repr]
        return [x for tensors in self.dict_repr.values() for x in tensors]

    def _with(self, tensors: Sequence[Tensor]) -> PVector:
        if self.vector_repr is not None:
            return PVector(self.layer_collection, tensors[0])
        rest, layers = iter(tensors), self.layer_collection.layers.items()
        return PVector(
            self.layer_collection, dict_repr={name: tuple(next(rest) for _ in layer.shapes) for name, layer in layers}
        )

    def _like(self, other: PVector) -> list[Tensor]:
        if self.layer_collection != other.layer_collection:
            raise ValueError(
                "PVectors of different LayerCollections do not combine: "
                + differences(self.layer_collection, other.layer_collection, "the left one", "the right one")
            )
        return [other.to_torch()] if self.vector_repr is not None else [x for _, x in other]


def _checked(layers: LayerCollection, tensors: Mapping[str, Sequence[Tensor]]) -> ByLayer:
    """The tensors in the order of the layers, which must be the same, in the same shapes."""
    if not isinstance(tensors, Mapping):
        raise TypeError(f"`dict_repr` should be a dict, {{layer name: (weight, bias)}}; got {shown(tensors)}.")
    missing, unknown = [n for n in layers if n not in tensors], [n for n in tensors if n not in layers]
    if missing or unknown:
        raise ValueError(
            f"`dict_repr` does not fit the LayerCollection: {listed(missing)} missing, {listed(unknown)} unknown."
        )
    for name in layers:
        if not isinstance(tensors[name], Sequence):
            raise TypeError(f"`dict_repr` of layer {name!r} should be a tuple of tensors; got {shown(tensors[name])}.")
    checked = {name: tuple(tensor(f"dict_repr[{name!r}]", x, "", real=False) for x in tensors[name]) for name in layers}
    for name, layer in layers.layers.items():
        found = [tuple(x.shape) for x in checked[name]]
        if found != [tuple(shape) for shape in layer.shapes.values()]:
            raise ValueError(f"`dict_repr` of layer {name!r} should be {described(layer)}; found shapes {found}.")
    return checked
