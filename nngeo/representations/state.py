"""What identifies a saved matrix: its class, its layers and its count, as plain values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from nngeo.layers.collection import Layer, LayerCollection
from nngeo.linalg.arguments import shown

HEADER = ("class", "n_examples", "layers")


def header(name: str, n_examples: int | None, layers: LayerCollection) -> dict[str, Any]:
    """Class name, count, and kinds and shapes of the layers, of types that `torch.load(weights_only=True)` accepts."""
    described = {
        name: {"kind": layer.kind, "shapes": {local: list(shape) for local, shape in layer.shapes.items()}}
        for name, layer in layers.layers.items()
    }
    return {"class": name, "n_examples": n_examples, "layers": described}


def layers_of(state: Mapping[str, Any]) -> LayerCollection:
    """The layers that a header describes."""
    check_header(state)
    return LayerCollection(
        Layer(name, layer["kind"], {local: torch.Size(shape) for local, shape in layer["shapes"].items()})
        for name, layer in state["layers"].items()
    )


def check_header(state: Any) -> None:
    """Raise unless this is a state_dict of a matrix.

    Raises:
        TypeError, ValueError: it is no dict, or one without the entries of a header, or with others than they can be.
    """
    if not isinstance(state, Mapping):
        raise TypeError(f"Expected the dict of `state_dict()`, got {type(state).__name__}.")
    missing = [repr(key) for key in HEADER if key not in state]
    if missing:
        raise ValueError(f"This is not the state_dict of a matrix: it has no {', '.join(missing)}.")
    name, n, layers = (state[key] for key in HEADER)
    if not isinstance(name, str):
        raise ValueError(f"The state_dict is damaged: 'class' is {shown(name)}, not a name.")
    if n is not None and not (_is_int(n) and n > 0):
        raise ValueError(f"The state_dict is damaged: 'n_examples' is {shown(n)}, not a positive number or None.")
    if not isinstance(layers, Mapping) or not layers:
        raise ValueError(f"The state_dict is damaged: 'layers' is {shown(layers)}, not a dict of layers.")
    for key, layer in layers.items():
        if not (isinstance(key, str) and isinstance(layer, Mapping) and _describes(layer)):
            raise ValueError(f"The state_dict is damaged: layer {key!r:.80} is described by {layer!r:.200}.")


def _describes(layer: Mapping[str, Any]) -> bool:
    """Whether this is a kind with shapes."""
    kind, shapes = layer.get("kind"), layer.get("shapes")
    return (
        isinstance(kind, str)
        and isinstance(shapes, Mapping)
        and all(isinstance(local, str) and isinstance(shape, Sequence) for local, shape in shapes.items())
        and all(_is_int(size) and size >= 0 for shape in shapes.values() for size in shape)
    )


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def check_match(state: Mapping[str, Any], name: str, layers: LayerCollection) -> None:
    """Raise unless the state is of this class and of these layers.

    Raises:
        ValueError: of another class, or of other layers, with both.
    """
    check_header(state)
    if state["class"] != name:
        raise ValueError(f"This state_dict is of a {state['class']}, not of a {name}: load it into one of that class.")
    found = layers_of(state)
    if list(found) != list(layers) or not layers.covers(found):
        raise ValueError(f"This state_dict is of other layers: {found}; the matrix has {layers}.")
