"""What the factories take, checked once."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

from nngeo import representations
from nngeo.generators.base import dtype_is_one
from nngeo.layers import LayerCollection
from nngeo.layers.collection import layers_of
from nngeo.variants import Variant

Mask = Callable[[Any], Tensor] | str
VariantChoice = str | Variant | Callable[..., Tensor]
Device = torch.device | str | None


def layers_for(model: nn.Module, loader: Any, layer_collection: LayerCollection | None) -> LayerCollection:
    """The layers asked for, by default all of the model; raises for a model or loader that is none."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` is a {type(model).__name__}; it should be a torch.nn.Module.")
    if loader is None:
        raise TypeError("`loader` is None; give a DataLoader, an iterable of batches, or one batch.")
    layers = layers_of(model, layer_collection)
    if not len(layers):
        raise ValueError("`layer_collection` has no layers; make one by LayerCollection.from_model(model).")
    dtype_is_one(model, layers)
    return layers


def checked(representation: Any, bases: tuple[type, ...], options: Collection[str] = ()) -> Any:
    """The class, if it is one of these or made of them, and takes the options."""
    if not (isinstance(representation, type) and issubclass(representation, bases)):
        raise TypeError(
            f"`representation` is {representation!r}; it should be a class: "
            f"{', '.join(name for name in representations.__all__ if _is_one(name, bases))}."
        )
    if inspect.isabstract(representation):
        raise TypeError(f"`representation` is {representation.__name__}, which is abstract: take a class made of it.")
    if not options:
        return representation
    known = list(inspect.signature(representation).parameters)
    if unknown := [name for name in options if name not in known]:
        takes = [name for name in known if name not in ("layer_collection", "generator", "data", "examples")]
        which = f"it takes {', '.join(takes)}" if takes else "it takes none"
        raise TypeError(f"{representation.__name__} has no option {', '.join(unknown)}; {which}.")
    return representation


def _is_one(name: str, bases: tuple[type, ...]) -> bool:
    kind = getattr(representations, name)
    return name.startswith(("PMat", "FMat", "PFMap")) and issubclass(kind, bases) and not inspect.isabstract(kind)
