"""What users give as vectors, in the shapes that products take."""

from __future__ import annotations

from functools import singledispatch
from typing import Any

from torch import Tensor

from nngeo.products.space import Space
from nngeo.vectors import PVector


@singledispatch
def flat(v: Any, name: str) -> Tensor:
    """A vector as a tensor, a PVector as its flat coordinates."""
    raise TypeError(f"`{name}` is a {type(v).__name__}; it should be a tensor (or, over parameters, a PVector).")


@flat.register(Tensor)
def _(v: Tensor, name: str) -> Tensor:
    return v


@flat.register(PVector)
def _(v: PVector, name: str) -> Tensor:
    return v.to_torch()


def vector(v: Any, name: str, space: Space) -> Tensor:
    """(b, d), or (1, d) where all examples have the same: from (b, d), (d,), or the shape of the space's tensor."""
    if isinstance(v, PVector) and (space.layers is None or v.layer_collection != space.layers):
        raise ValueError(f"`{name}` is a PVector over {v.layer_collection}; the {space.what} are {space.layers}.")
    tensor = flat(v, name)
    space.check_kind(tensor, name)
    b, d = space.b, space.d
    if tensor.shape == (b, d):
        return tensor
    if tensor.shape == space.shape:
        return tensor.reshape(b, d)
    if tensor.shape == (d,):
        return tensor[None]
    more = f", or {tuple(space.shape)}" if space.shape not in (None, (b, d)) else ""
    raise ValueError(
        f"`{name}` has shape {tuple(tensor.shape)}; vectors over the {space.what} are {(b, d)} or {(d,)}{more}."
    )


def columns(m: Any, name: str, space: Space, rows: bool) -> Tensor:
    """(c, b, d), or (c, 1, d), from columns m (b, d, c) or (d, c), or from rows (b, c, d) or (c, d)."""
    tensor = flat(m, name)
    space.check_kind(tensor, name)
    expected = "(b, c, {1}) or (c, {1})" if rows else "(b, {1}, c) or ({1}, c)"
    axis = -1 if rows else -2
    fits = tensor.ndim in (2, 3) and tensor.shape[axis] == space.d and (tensor.ndim == 2 or len(tensor) == space.b)
    if not fits:
        raise ValueError(
            f"`{name}` has shape {tuple(tensor.shape)}; over the {space.what} it should be "
            f"{expected.format(space.b, space.d)}, with b = {space.b}."
        )
    matrix = tensor if rows else tensor.mT
    return matrix[:, None] if tensor.ndim == 2 else matrix.transpose(0, 1)
