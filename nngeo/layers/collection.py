"""Which parameters span a space, in which order, with which shapes. No tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import accumulate
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.jit import ScriptModule
from torch.nn.utils import parametrize

from nngeo.layers.fingerprint import fingerprint
from nngeo.layers.models import check_structure, is_whole
from nngeo.layers.turn import TURN
from nngeo.linalg.arguments import UnknownName, flag, instance, shown, tensor

LayerChoice = str | type[nn.Module]
Predicate = Callable[[str, nn.Module], bool]


@dataclass(frozen=True)
class Layer:
    """A module that owns parameters: its name in the model, its class, and the shapes of what it owns."""

    name: str
    kind: str  # the class name, for messages
    shapes: dict[str, torch.Size] = field(hash=False)  # local parameter name -> shape, in the module's order

    def __post_init__(self) -> None:
        instance("name", self.name, str)
        instance("kind", self.kind, str)
        instance("shapes", self.shapes, Mapping, "{parameter: shape}")

    def numel(self) -> int:
        """The number p of its parameters."""
        return sum(self.sizes())

    def sizes(self) -> list[int]:
        """The number of entries of each of its parameters."""
        return [prod(shape) for shape in self.shapes.values()]

    @property
    def weight(self) -> torch.Size | None:
        """The shape of its parameter "weight", None without one."""
        return self.shapes.get("weight")

    @property
    def bias(self) -> torch.Size | None:
        """The shape of its parameter "bias", None without one."""
        return self.shapes.get("bias")

    def has_bias(self) -> bool:
        """Whether it has a parameter "bias"."""
        return "bias" in self.shapes

    def full_name(self, local: str) -> str:
        """The parameter's name in the model: `"net.0" + "weight" -> "net.0.weight"`."""
        return f"{self.name}.{local}" if self.name else local


class LayerCollection:
    """The layers that span a parameter space, and the order of its P coordinates.

    Coordinates follow `model.named_parameters()`: layer by layer, each parameter flattened row by row.
    A parameter that two modules share belongs to the first of them.

    >>> model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1))
    >>> layers = LayerCollection.from_model(model)
    >>> layers
    LayerCollection(11 parameters: '0' Linear (8), '2' Linear (3))
    >>> [name for name, _ in layers.named_parameters(model)]
    ['0.weight', '0.bias', '2.weight', '2.bias']
    """

    def __init__(self, layers: Iterable[Layer] | Mapping[str, Layer] | None = None):
        values = layers.values() if isinstance(layers, Mapping) else () if layers is None else layers
        if isinstance(values, str | Tensor) or not isinstance(values, Iterable):
            raise TypeError(f"`layers` should be Layers; got {shown(values)}. {HOW}")
        self.layers: dict[str, Layer] = {}
        for layer in values:
            self.add_layer(layer)

    @classmethod
    @TURN  # in which flags and parameters are the user's
    def from_model(
        cls,
        model: nn.Module,
        layers: LayerChoice | Iterable[LayerChoice] | Predicate | None = None,
        *,
        frozen: bool = False,
    ) -> LayerCollection:
        """The layers of a model, or those of them that `layers` chooses.

        Args:
            layers: names (of a layer, or of a module that contains layers), module types, a mixture of both,
                or a predicate `(name, module) -> bool`. None takes all.
            frozen: whether parameters with `requires_grad=False` are taken, too.

        Raises:
            ValueError: a name or type that chooses nothing (the layers there are, are listed), or no layer left.
        """
        check_structure(instance("model", model, nn.Module))
        owners = list(_owners(model, flag("frozen", frozen)))
        chosen = [layer for _, layer in owners] if layers is None else _choose(owners, layers)
        if not chosen and owners:
            raise ValueError(f"`layers` chooses none of the layers {_listed(owners)}.")
        if not chosen:
            hint = (
                ""
                if frozen
                else " that require a gradient: for the others, give LayerCollection.from_model(model, frozen=True) as "
                "`layer_collection`"
            )
            raise ValueError(f"{type(model).__name__} has no parameters{hint}.")
        return cls(chosen)

    def add_layer(self, name: str | Layer, layer: Layer | None = None) -> None:
        """Append a layer, `add_layer(layer)` or `add_layer(name, layer)` under another name: its coordinates come last.

        Raises:
            ValueError: there already is one of this name.
            TypeError: it is no Layer.
        """
        new = name if layer is None else layer
        if not isinstance(new, Layer) or not isinstance(name, Layer if layer is None else str):
            raise TypeError(
                f"add_layer takes a Layer, or its name and a Layer; got {shown(name)} and {shown(layer)}. Layers come "
                "from another collection, `layers[name]`, or by add_layer_from_model(model, module)."
            )
        new = replace(new, name=name) if isinstance(name, str) else new
        if new.name in self.layers:
            raise ValueError(f"There already is a layer {new.name!r}.")
        self.layers[new.name] = new

    @TURN
    def add_layer_from_model(self, model: nn.Module, module: nn.Module) -> None:
        """Append the layer of one module of the model."""
        instance("model", model, nn.Module)
        found = [layer for owner, layer in _owners(model, frozen=True) if owner is module]
        if not found:
            raise ValueError(f"This {type(module).__name__} owns no parameters of the model, or is not part of it.")
        self.add_layer(found[0])

    def numel(self) -> int:
        """The number P of parameters."""
        return sum(layer.numel() for layer in self.layers.values())

    @property
    def p_pos(self) -> dict[str, int]:
        """The first coordinate of every layer."""
        starts = accumulate((layer.numel() for layer in self.layers.values()), initial=0)
        return dict(zip(self.layers, starts, strict=False))

    @property
    def names(self) -> list[str]:
        """Names of the parameters in the model, in order."""
        return [layer.full_name(local) for layer in self.layers.values() for local in layer.shapes]

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """(..., P) -> {layer name: (..., p)}, as views."""
        if tensor("flat", flat, "(..., P)", real=False).ndim == 0 or flat.shape[-1] != self.numel():
            raise ValueError(
                f"`flat` should be (..., {self.numel()}), a number for each parameter; it is {tuple(flat.shape)}."
            )
        return dict(zip(self.layers, flat.split([layer.numel() for layer in self.layers.values()], -1), strict=True))

    def split_layer(self, name: str, flat: Tensor) -> dict[str, Tensor]:
        """(..., p) of one layer -> {local parameter name: (..., *shape)}, as views where the memory allows."""
        layer = self[name]
        if tensor("flat", flat, "(..., p)", real=False).ndim == 0 or flat.shape[-1] != layer.numel():
            raise ValueError(f"`flat` of layer {name!r} should be (..., {layer.numel()}); it is {tuple(flat.shape)}.")
        pieces = flat.split(layer.sizes(), dim=-1)
        return {
            local: piece.reshape((*piece.shape[:-1], *shape))
            for (local, shape), piece in zip(layer.shapes.items(), pieces, strict=True)
        }

    def join(self, parts: Mapping[str, Tensor]) -> Tensor:
        """{layer name: (..., p)} -> (..., P)."""
        if not isinstance(parts, Mapping) or not parts.keys() >= self.layers.keys():
            found = ", ".join(map(str, parts)) if isinstance(parts, Mapping) else shown(parts)
            raise ValueError(f"`parts` should have the layers {', '.join(self.layers)}; it has {found or 'none'}.")
        return torch.cat([parts[name] for name in self.layers], -1)

    @TURN
    def named_parameters(self, model: nn.Module | Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters of a model (or of `get_layerid_module_map(model)`), in the order of the coordinates."""
        found = []
        modules = model if isinstance(model, Mapping) else self.get_layerid_module_map(model)
        if missing := [name for name in self.layers if name not in modules]:
            raise ValueError(f"`model` is a dict of modules without {', '.join(map(repr, missing))}.")
        for name, layer in self.layers.items():
            for local in layer.shapes:
                own = modules[name]._parameters.get(local)
                found.append((layer.full_name(local), modules[name].get_parameter(local) if own is None else own))
        return iter(found)

    def parameters(self, model: nn.Module | Mapping[str, nn.Module]) -> Iterator[nn.Parameter]:
        """The parameters of a model, in the order of the coordinates."""
        return (parameter for _, parameter in self.named_parameters(model))

    def get_layerid_module_map(self, model: nn.Module) -> dict[str, nn.Module]:
        """{layer name: module}, with a check that the model has these layers in these shapes."""
        instance("model", model, nn.Module)
        modules: dict[str, nn.Module] = {}
        for name, layer in self.layers.items():
            module = _submodule(model, name)
            for local, shape in layer.shapes.items():
                own = _parameter(module, local)
                if own is None or not is_whole(own) or own.shape != shape:
                    check_structure(model)
                    found = "none" if own is None else f"shape {tuple(own.shape)}"
                    raise ValueError(
                        f"This LayerCollection is of another model: parameter {layer.full_name(local)!r} should have "
                        f"shape {tuple(shape)}; {type(model).__name__} has {found}. "
                        "Make one with LayerCollection.from_model(model)."
                    )
            if module is not None:
                modules[name] = module
        return modules

    def fingerprint(self, model: nn.Module) -> str:
        """64 digits that are equal where the model's parameters of these layers are equal, bit by bit."""
        return fingerprint(self.named_parameters(model))

    def covers(self, other: LayerCollection) -> bool:
        """Whether every layer of the other is here, with the same shapes."""
        return all(self.layers.get(name) == layer for name, layer in checked_layers(other).layers.items())

    def get_common_layers(self, other: LayerCollection) -> list[Layer]:
        """The layers that both have."""
        checked_layers(other)
        return [layer for name, layer in self.layers.items() if other.layers.get(name) == layer]

    def merge(self, other: LayerCollection) -> LayerCollection:
        """A collection of the layers that both have."""
        return LayerCollection(self.get_common_layers(other))

    def __getitem__(self, name: str) -> Layer:
        if not isinstance(name, str) or name not in self.layers:
            raise UnknownName(f"No layer {name!r:.80}; the layers are {', '.join(map(repr, self.layers))}.")
        return self.layers[name]

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self.layers

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LayerCollection) and list(self.layers.items()) == list(other.layers.items())

    def __hash__(self) -> int:
        return hash(tuple((layer.name, *layer.shapes.items()) for layer in self.layers.values()))

    def __repr__(self) -> str:
        shown = ", ".join(f"{layer.name!r} {layer.kind} ({layer.numel()})" for layer in self.layers.values())
        return f"LayerCollection({self.numel()} parameters: {shown})"


HOW = "Make a LayerCollection by LayerCollection.from_model(model, layers=[...])."


def checked_layers(value: Any) -> LayerCollection:
    """The LayerCollection that an argument should be.

    Raises:
        TypeError: it is none.
    """
    if not isinstance(value, LayerCollection):
        raise TypeError(f"`layer_collection` should be a LayerCollection; got {shown(value)}. {HOW}")
    return value


def layers_of(model: nn.Module, layer_collection: Any) -> LayerCollection:
    """The layers that were asked for, or else all of the model."""
    return LayerCollection.from_model(model) if layer_collection is None else checked_layers(layer_collection)


def _owners(model: nn.Module, frozen: bool) -> Iterator[tuple[nn.Module, Layer]]:
    """Modules with the layers they form: the parameters that they own themselves and no earlier module owns.

    The parametrizations of a module without other children (weight norm, say) are its own parameters.
    """
    seen: set[int] = set()
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        if module in inside:
            continue
        alone = "parametrizations" in module._modules and len(list(module.children())) == 1
        whole = alone and parametrize.is_parametrized(module)
        if whole:
            inside.update(module.modules())
        shapes = {}
        for local, parameter in module.named_parameters() if whole else module._parameters.items():
            if parameter is not None and id(parameter) not in seen and (frozen or parameter.requires_grad):
                shapes[local] = parameter.shape
            seen.add(id(parameter))
        kind = type(module).__mro__[1].__name__ if whole else type(module).__name__
        if shapes:
            yield module, Layer(name, kind, shapes)


def _choose(owners: list[tuple[nn.Module, Layer]], layers: object) -> list[Layer]:
    if callable(layers) and not isinstance(layers, type | nn.Module):
        return [layer for module, layer in owners if layers(layer.name, module)]
    if isinstance(layers, nn.Module | Tensor) or not isinstance(layers, str | type | Iterable):
        raise TypeError(f"`layers` is {layers!r}; give names, module types, or one predicate (name, module).")
    choices = [layers] if isinstance(layers, str | type) else list(layers)
    chosen = set()
    for choice in choices:
        if isinstance(choice, str):
            names = {la.name for _, la in owners if la.name == choice or la.name.startswith(f"{choice}.") or not choice}
        elif isinstance(choice, type):
            names = {layer.name for module, layer in owners if isinstance(module, choice)}
        else:
            raise TypeError(f"`layers` holds {choice!r}; give names, module types, or one predicate (name, module).")
        if not names:
            raise ValueError(f"`layers` names {choice!r}, which no layer is; there are {_listed(owners)}.")
        chosen |= names
    return [layer for _, layer in owners if layer.name in chosen]


def _listed(owners: list[tuple[nn.Module, Layer]]) -> str:
    return ", ".join(f"{layer.name!r} ({layer.kind})" for _, layer in owners)


def _submodule(model: nn.Module, name: str) -> nn.Module | None:
    found: nn.Module | None = model
    for part in name.split(".") if name else ():
        found = found._modules.get(part) if found is not None and not isinstance(found, ScriptModule) else None
    return found


def _parameter(module: nn.Module | None, name: str) -> nn.Parameter | None:
    path, _, local = name.rpartition(".")
    owner = _submodule(module, path) if module is not None else None
    return owner._parameters.get(local) if owner is not None and not isinstance(owner, ScriptModule) else None
