"""The vectors of one side of a Jacobian: how many for each example, in which blocks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nngeo.layers.collection import LayerCollection


@dataclass(frozen=True)
class Space:
    """Flat vectors (b, d), d entries for each of b examples, in named blocks (arguments, or layers)."""

    what: str  # for messages
    b: int
    sizes: dict[str, int]
    like: Tensor = field(repr=False)  # of the dtype and device
    layers: LayerCollection | None = None  # whose parameters are the coordinates
    shape: torch.Size | None = None  # (b, ...), of the tensor whose entries they are, where it is one

    @property
    def d(self) -> int:
        """The number of coordinates."""
        return sum(self.sizes.values())

    def slices(self) -> dict[str, slice]:
        """The coordinates of each block."""
        found, start = {}, 0
        for name, size in self.sizes.items():
            found[name] = slice(start, start + size)
            start += size
        return found

    def check_kind(self, tensor: Tensor, name: str) -> None:
        """Raise where a tensor has another dtype or device."""
        if not isinstance(tensor, Tensor):
            raise TypeError(f"`{name}` is a {type(tensor).__name__}; it should be a tensor.")
        if tensor.dtype != self.like.dtype or tensor.device != self.like.device:
            raise ValueError(
                f"`{name}` is {tensor.dtype} on {tensor.device}, but the {self.what} are {self.like.dtype} on "
                f"{self.like.device}: convert it, {name}.to(device={str(self.like.device)!r}, dtype={self.like.dtype})."
            )


def outputs_space(outputs: Tensor) -> Space:
    """That of outputs (b, ...)."""
    return Space("outputs", len(outputs), {"outputs": outputs[0].numel()}, outputs, shape=outputs.shape)


def inputs_space(names: Iterable[str], inputs: Sequence[Tensor]) -> Space:
    """That of some inputs (b, ...), one after the other."""
    sizes = {name: x[0].numel() for name, x in zip(names, inputs, strict=True)}
    return Space("inputs", len(inputs[0]), sizes, inputs[0], shape=inputs[0].shape if len(inputs) == 1 else None)


def weights_space(layers: LayerCollection, outputs: Tensor) -> Space:
    """That of the parameters of some layers, the same for all examples of the outputs."""
    return Space("weights", len(outputs), {n: layer.numel() for n, layer in layers.layers.items()}, outputs, layers)
