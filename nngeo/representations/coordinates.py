"""The flat coordinates of whatever a matrix is applied to, and the way back.

A matrix over some layers acts on the vectors of all: it sees their coordinates in its own layers, and what comes back
is zero in all others.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import singledispatch
from typing import Any

from torch import Tensor

from nngeo.layers.collection import LayerCollection
from nngeo.vectors import PVector

Back = Callable[[Tensor], Any]


@singledispatch
def coordinates(x: Any, layers: LayerCollection) -> tuple[Tensor, Back]:
    """(..., P) on these layers, and a function that brings a tensor of that shape to the type and layers of x.

    Raises:
        TypeError: x is no PVector, PFMapDense or tensor.
        ValueError: x lacks some of the layers, or its last axis is not P.
    """
    raise TypeError(f"Expected a PVector, a PFMapDense or a tensor (..., {layers.numel()}), got {type(x).__name__}.")


@coordinates.register(Tensor)
def _(x: Tensor, layers: LayerCollection) -> tuple[Tensor, Back]:
    if x.ndim == 0 or x.shape[-1] != layers.numel():
        raise ValueError(
            f"Expected a tensor (..., {layers.numel()}), whose last axis are the parameters of {', '.join(layers)}; "
            f"got shape {tuple(x.shape)}. Vectors over other layers can be given as PVector."
        )
    return x, lambda y: y


@coordinates.register(PVector)
def _(x: PVector, layers: LayerCollection) -> tuple[Tensor, Back]:
    own = x.layer_collection
    return restrict(x.to_torch(), own, layers, "PVector"), lambda y: PVector(own, vector_repr=embed(y, layers, own))


def restrict(flat: Tensor, have: LayerCollection, want: LayerCollection, what: str) -> Tensor:
    """(..., P) of the layers there are -> (..., P) of the layers wanted."""
    if have == want:
        return flat
    if not have.covers(want):
        missing = [repr(name) for name, layer in want.layers.items() if have.layers.get(name) != layer]
        raise ValueError(
            f"The {what} lacks layers of the matrix, or has them in other shapes: {', '.join(missing)}; it has "
            f"{', '.join(map(repr, have))}. Make both with LayerCollections of the same model."
        )
    return want.join(have.split(flat))


def embed(flat: Tensor, have: LayerCollection, want: LayerCollection) -> Tensor:
    """(..., P) of the layers there are -> (..., P) of the layers wanted, zero where there are none."""
    if have == want:
        return flat
    parts = have.split(flat)
    lead = flat.shape[:-1]
    return want.join({n: parts[n] if n in parts else flat.new_zeros(*lead, want[n].numel()) for n in want})
