"""What can be added to a matrix as damping, in one form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from nngeo.layers.collection import LayerCollection
from nngeo.representations.coordinates import coordinates
from nngeo.vectors import PVector


@dataclass(frozen=True)
class Damping:
    """A diagonal matrix over the layers, as few numbers as it takes: 0-d, {layer: 0-d}, or (P,)."""

    layers: LayerCollection
    value: Tensor | dict[str, Tensor]

    @classmethod
    def of(cls, damping: Any, layers: LayerCollection, like: Tensor) -> Damping:
        """From a number, a 0-d tensor, one of them for each layer, a PVector or a tensor (P,); differentiable.

        Raises:
            TypeError: none of them.
            ValueError: of another size, of other layers, or not finite.
        """
        found = cls(layers, _parsed(damping, layers, like))
        if not bool(found.flat().isfinite().all()):
            raise ValueError("The damping is not finite.")
        return found

    def negative(self) -> Damping:
        """With the other sign."""
        value = self.value
        return Damping(self.layers, -value if isinstance(value, Tensor) else {n: -x for n, x in value.items()})

    def by_layer(self) -> dict[str, Tensor]:
        """{layer: 0-d or (p,)}."""
        if isinstance(self.value, dict):
            return self.value
        return self.layers.split(self.value) if self.value.ndim else dict.fromkeys(self.layers, self.value)

    def flat(self) -> Tensor:
        """0-d or (P,)."""
        if isinstance(self.value, Tensor):
            return self.value
        return torch.cat([self.value[name].expand(layer.numel()) for name, layer in self.layers.layers.items()])


def _parsed(damping: Any, layers: LayerCollection, like: Tensor) -> Tensor | dict[str, Tensor]:
    if isinstance(damping, PVector):
        return coordinates(damping, layers)[0].to(like)
    if isinstance(damping, Mapping):
        missing, unknown = [n for n in layers if n not in damping], [n for n in damping if n not in layers]
        if missing or unknown:
            raise ValueError(
                "Damping by layer takes one value for each layer: "
                f"missing {', '.join(map(repr, missing)) or 'none'}, unknown {', '.join(map(repr, unknown)) or 'none'}."
            )
        return {name: _scalar(damping[name], like) for name in layers}
    if isinstance(damping, Tensor) and damping.numel() > 1:
        if damping.shape == (layers.numel(),):
            return damping.to(like)
        if damping.shape != (len(layers),):
            raise ValueError(
                f"A damping tensor should be 0-d, ({len(layers)},) with one value for each layer, or "
                f"({layers.numel()},) with one for each parameter; it is {tuple(damping.shape)}."
            )
    if (isinstance(damping, Sequence) and not isinstance(damping, str)) or (
        isinstance(damping, Tensor) and damping.ndim and len(layers) > 1
    ):
        if len(damping) != len(layers):
            raise ValueError(f"Damping by layer takes {len(layers)} values, one for each layer; got {len(damping)}.")
        return {name: _scalar(value, like) for name, value in zip(layers, damping, strict=True)}
    return _scalar(damping, like)


def _scalar(value: Any, like: Tensor) -> Tensor:
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        return value.reshape(()).to(like)
    if isinstance(value, Real) and not isinstance(value, bool):
        return like.new_tensor(float(value))
    found = f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
    raise TypeError(
        "Damping is a number, a 0-d tensor, one of them for each layer (a dict or a sequence), or a PVector; "
        f"got {found}."
    )
