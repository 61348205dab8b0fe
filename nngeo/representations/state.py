"""What identifies a saved matrix: its class, its layers and its count, as plain values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from nngeo.layers.collection import Layer, LayerCollection

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
    """Nothing, if this is a state_dict of a matrix.

    Raises:
        TypeError, ValueError: it is no dict, or one without the entries of a header.
    """
    if not isinstance(state, Mapping):
        raise TypeError(f"Expected the dict of `state_dict()`, got {type(state).__name__}.")
    missing = [repr(key) for key in HEADER if key not in state]
    if missing:
        raise ValueError(f"This is not the state_dict of a matrix: it has no {', '.join(missing)}.")


def check_match(state: Mapping[str, Any], name: str, layers: LayerCollection) -> None:
    """Nothing, if the state is of this class and of these layers.

    Raises:
        ValueError: of another class, or of other layers, with both.
    """
    check_header(state)
    if state["class"] != name:
        raise ValueError(f"This state_dict is of a {state['class']}, not of a {name}: load it into one of that class.")
    found = layers_of(state)
    if list(found) != list(layers) or not layers.covers(found):
        raise ValueError(f"This state_dict is of other layers: {found}; the matrix has {layers}.")
